"""The dense twin of a file, and what `kbs.lite.benchmark` tells; no times, which lie in benchmarks/."""

import numpy as np
import pytest
from keras import layers
from lite_helpers import QUICK, op_names, prune, random_inputs, run_file, sequential
from lite_models import MODELS

import keras_blocksparse as kbs
from keras_blocksparse.lite import export_tflite
from keras_blocksparse.lite.flatbuffer import Flatbuffer
from keras_blocksparse.lite.twin import make_dense

UNPROVEN = {"validate": False, "measure_latency": False}


WAYS = [(target, quantize) for target in ("stock", "fast") for quantize in (None, "int8", "float16")]


@pytest.mark.parametrize(("target", "quantize"), [*WAYS, ("fast", "bfloat16")])
@pytest.mark.parametrize("kind", ["gru", "lstm", "bidirectional_concat", "masking", "dense"])
def test_the_twin_computes_the_same_from_dense_float32_weights(kind, quantize, target, tmp_path):
    path, dense = tmp_path / "model.tflite", tmp_path / "dense.tflite"
    report = export_tflite(prune(MODELS[kind]()), path, target, quantize, **UNPROVEN)
    file = Flatbuffer.read(path)
    make_dense(file)
    dense.write_bytes(file.tobytes())
    assert not {"STABLEHLO_COMPOSITE", "DENSIFY", "DEQUANTIZE"} & set(op_names(dense))
    assert all(t.sparsity is None for g in Flatbuffer.read(dense).tree.subgraphs for t in g.tensors)
    inputs = random_inputs(report)
    expected, got = run_file(path, **inputs), run_file(dense, **inputs)
    for name, value in expected.items():
        # int8 kernels round activations, which the twin does not.
        np.testing.assert_allclose(got[name], value, atol=0.05 if quantize == "int8" else 2e-5)


def test_the_twin_is_as_large_as_the_converters_dense_file(tmp_path):
    model, path = prune(sequential(layers.GRU(64), layers.Dense(32)), keep=0.1), tmp_path / "model.tflite"
    report = export_tflite(model, path, "fast", "int8", **UNPROVEN)
    file = Flatbuffer.read(path)
    make_dense(file)
    assert len(file.tobytes()) == pytest.approx(report.bytes_dense, rel=0.1)


def test_variants_are_told_apart(tmp_path):
    path = tmp_path / "model.tflite"
    export_tflite(prune(MODELS["gru"]()), path, "fast", **UNPROVEN)
    report = kbs.lite.benchmark(path, num_threads=[1, 2], runs=5, seconds=1, runtime=QUICK[0])
    variants = ["dense float32", "without delegate", "with delegate"]
    assert [(row.variant, row.num_threads) for row in report.rows] == [(v, n) for n in (1, 2) for v in variants]
    for row in report.rows:
        assert row.calls == 5
        assert 0 < row.min_ms <= row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.max_difference < 2e-5
        assert row.peak_bytes > row.model_bytes >= 0
        assert row.bytes == path.stat().st_size or row.variant == "dense float32"
    assert report.to_dict()["rows"][2]["variant"] == "with delegate"
    assert "with delegate" in str(report)


def test_of_a_file_for_the_delegate_alone_nothing_else_is_run(tmp_path):
    path = tmp_path / "model.tflite"
    export_tflite(prune(MODELS["gru"]()), path, "fast", compat="custom", **UNPROVEN)
    report = kbs.lite.benchmark(path, runs=5, seconds=1, runtime=QUICK[0])
    assert [(row.variant, row.speedup) for row in report.rows] == [("with delegate", None)]
    assert "compat='custom'" in str(report)


def test_a_file_without_a_signature_is_run(tmp_path):
    path = tmp_path / "model.tflite"
    export_tflite(prune(MODELS["dense"]()), path, **UNPROVEN)
    file = Flatbuffer.read(path)
    file.tree.signatureDefs = None
    path.write_bytes(file.tobytes())
    assert len(kbs.lite.benchmark(path, runs=5, seconds=1, runtime=QUICK[0]).rows) == 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_threads": 0}, "num_threads must be positive"),
        ({"num_threads": []}, "num_threads must be positive"),
        ({"runs": -1}, "runs must be positive"),
        ({"seconds": float("nan")}, "seconds must be positive"),
        ({"runtime": "torch"}, "runtimes must be"),
    ],
)
def test_wrong_arguments(options, why, tmp_path):
    path = tmp_path / "model.tflite"
    export_tflite(prune(MODELS["dense"]()), path, **UNPROVEN)
    with pytest.raises(ValueError, match=why):
        kbs.lite.benchmark(path, **options)
