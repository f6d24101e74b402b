"""What is told of a `.tflite` file, against the Keras model it came from; broken files."""

import contextlib
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from keras_blocksparse.lite.flatbuffer import Flatbuffer

sys.path.insert(0, str(Path(__file__).parent / "lite"))
from lite_helpers import prune


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    return prune(keras.Sequential([keras.Input((5, 32)), keras.layers.GRU(64), keras.layers.Dense(32)]), keep=0.1)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    settings = {"stock": {}, "fast": {"target": "fast"}, "int8": {"target": "fast", "quantize": "int8"},
                "bfloat16": {"target": "fast", "quantize": "bfloat16"},
                "custom": {"target": "fast", "compat": "custom"}}  # fmt: skip
    for name, options in settings.items():
        kbs.export_tflite(model, folder / f"{name}.tflite", validate=False, measure_latency=False, **options)
    return {name: folder / f"{name}.tflite" for name in settings}


@pytest.mark.parametrize("name", ["stock", "fast", "int8", "bfloat16", "custom"])
def test_weights_are_those_of_the_model(name, model, files):
    report = kbs.tflite_report(files[name])
    sparse = [w for w in report.weights if w.encoding != "dense"]
    kernels = {tuple(w.shape): w for w in model.weights if "bias" not in w.path}
    assert sorted(w.shape for w in sparse) == sorted(kernels)
    for weight in sparse:
        value = np.asarray(kernels[weight.shape])
        # int8 rounds the smallest to zero.
        assert weight.sparsity == pytest.approx(np.mean(value == 0), abs=0.01)
        assert weight.bytes_dense == value.nbytes
        assert weight.block_size[0] % 16 == 0
    assert report.bytes == files[name].stat().st_size == report.other_bytes + sum(w.bytes for w in report.weights)
    assert list(report.inputs.values()) == [((1, 5, 32), "float32")]
    assert list(report.outputs.values()) == [((1, 32), "float32")]


def test_what_the_delegate_runs_in_one_go_is_told(files):
    assert kbs.tflite_report(files["stock"]).fused == ()
    for name in ("fast", "int8", "bfloat16", "custom"):
        report = kbs.tflite_report(files[name])
        assert report.fused == ("GRU 64",)
        assert {"GRU kernel (z, r, h)", "GRU recurrent (z, r, h)"} <= {w.used_by for w in report.weights}
    assert "WHILE" not in kbs.tflite_report(files["custom"]).operators
    encodings = {name: {w.encoding for w in kbs.tflite_report(path).weights} for name, path in files.items()}
    assert encodings["stock"] == {"sparse 1x4"}
    assert encodings["int8"] == {"sparse 1x16"}
    assert all(e.startswith("densify") for e in encodings["bfloat16"])


def test_the_page_has_a_picture_of_each_sparse_weight(files, tmp_path):
    report = kbs.tflite_report(files["fast"])
    page = report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert page.count('src="data:image/png;base64,') == 3
    assert "GRU recurrent (z, r, h)" in page
    with pytest.raises(ValueError, match="cannot be written"):
        report.to_html(tmp_path / "nowhere" / "page.html")
    assert str(report) in report._repr_html_().replace("&#x27;", "'")


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x00" * 4 + b"TFL3", b"\xff" * 4 + b"TFL3" + b"\xff" * 64])
def test_what_is_no_model_is_refused(content, tmp_path):
    path = tmp_path / "broken.tflite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="TFLite model"):
        kbs.tflite_report(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        kbs.tflite_report(tmp_path / "none.tflite")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data, files, tmp_path):
    content = bytearray(files[data.draw(st.sampled_from(["fast", "stock"]))].read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(8, len(content)))]
    path = tmp_path / "damaged.tflite"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):  # and nothing else
        assert kbs.tflite_report(path).bytes == len(content)


def test_sparsity_that_lies_is_refused(files, tmp_path):
    file = Flatbuffer.read(files["stock"])
    sparse = next(t for g in file.tree.subgraphs for t in g.tensors if t.sparsity is not None)
    sparse.sparsity.dimMetadata[1].arrayIndices.values = np.array([250, 250], np.uint8)
    path = tmp_path / "lies.tflite"
    path.write_bytes(file.tobytes())
    with pytest.raises(ValueError, match="segments do not enclose|outside"):
        kbs.tflite_report(path)
