"""The C++ example, compiled and run here: LiteRT without Python, with our delegate and without."""

import subprocess

import pytest

from examples.cpp import check
from keras_blocksparse.lite import delegate_path


@pytest.fixture(scope="module")
def machine():
    try:
        return check.Machine(check.litert_of_this_environment(), delegate_path())
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def program(machine, tmp_path_factory):
    return check.build_example(machine, tmp_path_factory.mktemp("example"))


def test_outputs_are_those_of_keras(machine, program, tmp_path, capsys):
    assert check.compare(machine, program, tmp_path) < 1e-5
    assert len(capsys.readouterr().out.splitlines()) == 18


def test_what_cannot_be_loaded_is_said(machine, program, tmp_path):
    def fails(*arguments):
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode in (1, 2), done
        return done.stderr

    assert "usage:" in fails()
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    assert "broken.tflite failed" in fails(broken, "none")
    assert "cannot load" in fails(broken, tmp_path / "no.so")


@pytest.mark.parametrize("clang", [False, True])
def test_missing_tools_are_named(tmp_path, monkeypatch, clang):
    monkeypatch.setattr(check.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="g.*-aarch64-linux-gnu and qemu-user.*apt-get install"):
        check.aarch64(tmp_path, clang)
