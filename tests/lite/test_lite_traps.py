"""Encodings that stock runtimes read wrongly, without a word or with a crash, cannot come out of an export."""

import keras
import numpy as np
import pytest
from keras import layers
from lite_helpers import QUICK, encodings, fully_connected, prune, random_inputs, run_file, sequential

from keras_blocksparse.lite import ExportError, export_tflite, sparsify
from keras_blocksparse.lite.flatbuffer import Flatbuffer

INT8, FLOAT16 = 9, 1


def export(model, path, quantize, **options):
    return export_tflite(model, path, quantize=quantize, runtimes=QUICK, measure_latency=False, **options)


def agrees(model, path, report, atol):
    inputs = random_inputs(report)
    np.testing.assert_allclose(run_file(path, **inputs)["y"], model(inputs["x"]), atol=atol)


def gru(units=64, keep=0.1, block=(16, 16), features=None):
    return prune(sequential(layers.GRU(units), features=features or units), block, keep)


# 1: sparse int8 weights in a FULLY_CONNECTED newer than version 8 are read by XNNPACK as if they were dense.


def test_sparse_weights_are_read_by_version_8(tmp_path):
    for quantize in (None, "int8"):
        model, path = gru(), tmp_path / "model.tflite"
        report = export(model, path, quantize)
        found = [version for version, weight, _ in fully_connected(path) if weight.sparsity is not None]
        assert found == [8, 8]
        agrees(model, path, report, 0.05)


def test_the_version_the_converter_writes_would_not_pass(tmp_path, monkeypatch):
    """The trap itself: were the version not rewritten, the file would be found out and not written."""
    monkeypatch.setattr(sparsify, "_FC_VERSION", 12)
    with pytest.raises(ExportError):
        export(gru(), tmp_path / "model.tflite", "int8")
    assert list(tmp_path.iterdir()) == []


# 2: a sparse float16 weight that is not unpacked first gives NaN.


def test_sparse_float16_is_unpacked_before_anything_reads_it(tmp_path):
    model, path = gru(), tmp_path / "model.tflite"
    report = export(model, path, "float16")
    assert set(encodings(report).values()) == {"densify 16x16"}
    agrees(model, path, report, 5e-3)
    file = Flatbuffer(path.read_bytes())
    sparse = 0
    for graph in file.tree.subgraphs:
        for op in graph.operators:
            for tensor in (graph.tensors[i] for i in op.inputs if i >= 0):
                if tensor.sparsity is not None:
                    assert (file.op_name(op), tensor.type) == ("DENSIFY", FLOAT16)
                    sparse += 1
    assert sparse == 2


def test_unpacked_float16_has_a_reader_that_xnnpack_leaves_alone(tmp_path):
    """Without one, DENSIFY is dropped where the last reader is not XNNPACK's: an Embedding, a layer without bias."""
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(64, 64),
            layers.GRU(64, reset_after=False, return_sequences=True, use_bias=False),
        ]
    )
    prune(model, keep=0.3)
    path = tmp_path / "model.tflite"
    report = export(model, path, "float16")
    assert encodings(report)["embeddings"].startswith("densify")
    agrees(model, path, report, 5e-3)
    file = Flatbuffer(path.read_bytes())
    for graph, op in file.operators("DENSIFY"):
        readers = [file.op_name(o) for o in graph.operators if op.outputs[0] in list(o.inputs)]
        assert "SHAPE" in readers
        assert len(readers) > 1


# 3: the int8 kernel reads sixteen inputs at a time, whatever the tensor says.


@pytest.mark.parametrize("block", [(4, 4), (8, 8), (4, 1), (1, 1)])
def test_smaller_blocks_are_padded_to_sixteen_inputs(block, tmp_path):
    model, path = gru(block=block, keep=0.03), tmp_path / "model.tflite"
    report = export(model, path, "int8")
    sparse = [w for _, w, _ in fully_connected(path) if w.sparsity is not None and w.type == INT8]
    assert sparse
    for weight in sparse:
        assert weight.sparsity.dimMetadata[-1].denseSize == 16
    agrees(model, path, report, 0.05)


def test_inputs_that_sixteen_does_not_divide(tmp_path):
    """40 features and 24 units: no int8 blocks of 16; sparse float32 is smaller than dense int8."""
    model = prune(sequential(layers.GRU(24), features=40), (4, 4), keep=0.1)
    path = tmp_path / "model.tflite"
    report = export(model, path, "int8")
    assert [w.encoding for w in report.weights] == ["sparse 1x4", "sparse 1x4"]
    assert all("not a multiple of 16" in w.why and w.dtype == "float32" for w in report.weights)
    assert all(w.bytes < w.bytes_dense / 4 for w in report.weights)
    agrees(model, path, report, 1e-4)


def test_odd_shapes_stay_dense_or_are_unpacked(tmp_path):
    model, path = prune(sequential(layers.GRU(26), features=45), (1, 1), keep=0.1), tmp_path / "model.tflite"
    for quantize, allowed in ((None, "densify"), ("int8", "dense"), ("float16", "densify")):
        report = export(model, path, quantize)
        assert all(w.encoding.startswith(allowed) and w.why for w in report.weights)
        agrees(model, path, report, 0.05)


# 4: the int8 kernel keeps block numbers and counts in bytes and does not say when they overflow.


def test_more_blocks_than_a_byte_counts(tmp_path):
    for features, kept in ((16 * 257, [256]), (16 * 1000, range(0, 1000, 10))):
        model = keras.Sequential([keras.Input((features,)), layers.Dense(16)])
        kernel = np.zeros((features // 16, 16, 16), np.float32)
        kernel[list(kept)] = np.random.default_rng(0).normal(size=(len(kept), 16, 16))
        model.layers[0].kernel.assign(kernel.reshape(features, 16))
        path = tmp_path / "model.tflite"
        report = export(model, path, "int8")
        (weight,) = report.weights
        assert (weight.encoding, weight.dtype) == ("sparse 1x4", "float32")
        assert "byte" in weight.why
        agrees(model, path, report, 1e-3)


def test_as_many_blocks_as_a_byte_counts(tmp_path):
    model = keras.Sequential([keras.Input((16 * 256,)), layers.Dense(16)])
    kernel = np.zeros((4096, 16), np.float32)
    kernel[-16:] = np.random.default_rng(0).normal(size=(16, 16))
    kernel[:1600] = np.random.default_rng(1).normal(size=(1600, 16))
    model.layers[0].kernel.assign(kernel)
    path = tmp_path / "model.tflite"
    report = export(model, path, "int8")
    assert report.weights[0].encoding == "sparse 1x16"
    agrees(model, path, report, 2.0)  # outputs are around 40


# 5: a scale per row is ignored by runtimes older than it.


def test_one_scale_per_weight(tmp_path):
    path = tmp_path / "model.tflite"
    export(prune(sequential(layers.GRU(64), layers.Dense(32), features=64)), path, "int8")
    weights = [w for _, w, _ in fully_connected(path) if w.type == INT8]
    assert len(weights) == 3
    assert all(len(w.quantization.scale) == 1 for w in weights)
    assert max(version for version, _, _ in fully_connected(path)) <= 9


# Too dense for the sparse kernel to pay.


@pytest.mark.parametrize("quantize", [None, "int8", "float16"])
def test_a_dense_model_stays_dense(quantize, tmp_path):
    model, path = prune(sequential(layers.GRU(64), features=64), keep=1.0), tmp_path / "model.tflite"
    report = export(model, path, quantize)
    assert set(encodings(report).values()) == {"dense"}
    assert all(w.why for w in report.weights)
    agrees(model, path, report, 0.08)
