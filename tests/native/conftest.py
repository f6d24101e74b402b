"""The native library once for each instruction set that this machine runs."""

import shutil

import pytest

from keras_blocksparse.sparse import _native


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """A library for each instruction set. It is chosen when a library is first used, so each gets its own copy."""
    folder = tmp_path_factory.mktemp("libkbs")
    loaded = {}
    for isa in _native.available_isas():
        path = shutil.copy(_native.library_path(), folder / f"libkbs-{isa}.so")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KBS_ISA", isa)
            loaded[isa] = _native.open_library(path)
            loaded[isa].kbs_available_isas()  # the choice is made here
    return loaded


@pytest.fixture(autouse=True)
def seeded():
    """Instead of the suite's: nothing here needs Keras's state reset, which takes longer than most of these tests."""


@pytest.fixture(params=_native.available_isas())
def isa(request, libraries, monkeypatch):
    """Runs the test on one instruction set."""
    monkeypatch.setattr(_native, "library", lambda: libraries[request.param])
    assert _native.get_isa() == request.param
    return request.param
