"""Every layer kind, exported and run: the file computes what the Keras model computes, with sparse weights."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from lite_helpers import (
    QUICK,
    encodings,
    fully_connected,
    op_names,
    prune,
    random_inputs,
    run_file,
    sequential,
)
from lite_models import MODELS, bidirectional, dict_io, multi_io

from keras_blocksparse.lite import ExportReport, export_tflite
from keras_blocksparse.lite.validation import installed_runtimes

TOLERANCE = {None: 2e-5, "float16": 5e-3, "int8": 0.08}


def test_model_that_its_first_batch_built(tmp_path):
    model = keras.Sequential([layers.GRU(32), layers.Dense(3)])
    model(np.zeros((4, 6, 8), "float32"))
    assert model.inputs[0].shape[0] == 4
    report = export_tflite(model, tmp_path / "model.tflite", runtimes=QUICK, measure_latency=False)
    assert report.inputs["x"][0] == (1, 6, 8)


@pytest.mark.parametrize("quantize", [None, "int8", "float16"])
@pytest.mark.parametrize("kind", MODELS)
def test_file_computes_what_the_model_computes(kind, quantize, tmp_path):
    model, path = prune(MODELS[kind]()), tmp_path / "model.tflite"
    report = export_tflite(model, path, quantize=quantize, batch_size=3, runtimes=QUICK, measure_latency=False)
    assert path.stat().st_size == report.bytes < report.bytes_dense
    assert not any(name.startswith("Flex") for name in op_names(path))
    assert ("WHILE" in op_names(path)) == (kind not in ("dense", "gru_unrolled"))
    kernel = "densify" if quantize == "float16" else "sparse"
    assert any(w.encoding.startswith(kernel) for w in report.weights), report

    # On other inputs than the export itself looked at, by an interpreter of this process.
    inputs = random_inputs(report)
    outputs = run_file(path, **inputs)
    given = list(inputs.values())
    expected = model(inputs if kind == "dict_io" else given if len(given) > 1 else given[0], training=False)
    if isinstance(expected, dict):
        expected = [expected[name] for name in report.outputs]
    expected = list(expected) if isinstance(expected, (list, tuple)) else [expected]
    assert list(outputs)
    assert set(outputs) == set(report.outputs)
    assert len(expected) == len(report.outputs)
    for name, value in zip(report.outputs, expected, strict=True):
        value = np.asarray(value)
        assert outputs[name].shape == value.shape == report.outputs[name][0]
        assert np.std(value) > 1e-3  # an answer that cannot be right by chance
        np.testing.assert_allclose(outputs[name], value, atol=TOLERANCE[quantize] * max(1, np.abs(value).max()))


@pytest.mark.parametrize("quantize", [None, "int8", "float16"])
def test_every_installed_runtime_agrees(quantize, tmp_path):
    model = prune(bidirectional("concat", layers.GRU(32, return_sequences=True)))
    report = export_tflite(model, tmp_path / "model.tflite", quantize=quantize)
    assert list(report.max_error) == list(report.latency_ms) == installed_runtimes(None)
    assert all(ms > 0 for ms in report.latency_ms.values())


def test_names_of_inputs_and_outputs(tmp_path):
    one = export_tflite(prune(MODELS["gru"]()), tmp_path / "a", runtimes=QUICK, measure_latency=False)
    assert (list(one.inputs), list(one.outputs)) == (["x"], ["y"])
    several = export_tflite(prune(multi_io()), tmp_path / "b", runtimes=QUICK, measure_latency=False)
    assert (list(several.inputs), list(several.outputs)) == (["a", "b"], ["sequence", "classes"])
    keys = export_tflite(prune(dict_io()), tmp_path / "c", runtimes=QUICK, measure_latency=False)
    assert (list(keys.inputs), list(keys.outputs)) == (["a", "b"], ["first", "second"])


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (8, 8), (4, 4), (8, 4), (16, 1), (4, 1), (1, 1)])
def test_any_block_shape_gives_right_numbers(block, quantize, tmp_path):
    model, path = prune(sequential(layers.GRU(64), features=64), block, keep=0.1), tmp_path / "model.tflite"
    report = export_tflite(model, path, quantize=quantize, runtimes=QUICK, measure_latency=False)
    inputs = random_inputs(report)
    np.testing.assert_allclose(run_file(path, **inputs)["y"], model(inputs["x"]), atol=TOLERANCE[quantize])
    # The float kernel reads four inputs at a time, the int8 kernel sixteen; smaller blocks are padded with zeros.
    expected = {None: "sparse 1x4", "int8": "sparse 1x16"}[quantize]
    if (block[0] >= 4 and quantize is None) or block[0] >= 16:
        assert set(encodings(report).values()) == {expected}


def test_open_time_axis_is_closed_by_timesteps(tmp_path):
    model, path = prune(sequential(layers.GRU(32, return_sequences=True), timesteps=None)), tmp_path / "model.tflite"
    report = export_tflite(model, path, timesteps=9, batch_size=2, runtimes=QUICK, measure_latency=False)
    assert report.inputs["x"][0] == (2, 9, 32)
    inputs = random_inputs(report)
    np.testing.assert_allclose(run_file(path, **inputs)["y"], model(inputs["x"]), atol=2e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_exported_in_float32(policy, tmp_path):
    model = sequential(layers.GRU(32, return_sequences=True, dtype=policy), layers.Dense(32, dtype=policy))
    prune(model)
    exact = sequential(layers.GRU(32, return_sequences=True), layers.Dense(32))
    exact.set_weights(model.get_weights())
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path, runtimes=QUICK, measure_latency=False)
    inputs = random_inputs(report)
    np.testing.assert_allclose(run_file(path, **inputs)["y"], exact(inputs["x"]), atol=2e-5)
    # The model itself is as it was.
    assert [layer.dtype_policy.name for layer in model.layers] == [policy] * 2
    assert model(inputs["x"]).dtype == policy.removeprefix("mixed_")


def test_exporting_leaves_the_model_alone(tmp_path):
    model = prune(sequential(layers.GRU(32, dropout=0.5, recurrent_dropout=0.5)))
    before = [np.asarray(v).copy() for v in model.variables]
    export_tflite(model, tmp_path / "a", runtimes=QUICK, measure_latency=False)
    export_tflite(model, tmp_path / "b", streaming=True, runtimes=QUICK, measure_latency=False)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.layers[0].cell.dropout == model.layers[0].cell.recurrent_dropout == 0.5
    assert "call" not in vars(model.layers[0])
    assert "inner_loop" not in vars(model.layers[0])


def test_a_pruning_constraint_does_not_matter(tmp_path):
    class Zeros(keras.constraints.Constraint):
        def __call__(self, w):
            return w * 0

    model = prune(sequential(layers.GRU(32, kernel_constraint=Zeros(), recurrent_constraint=Zeros())))
    report = export_tflite(model, tmp_path / "model.tflite", runtimes=QUICK, measure_latency=False)
    inputs = random_inputs(report)
    np.testing.assert_allclose(run_file(tmp_path / "model.tflite", **inputs)["y"], model(inputs["x"]), atol=2e-5)


def test_zeros_only(tmp_path):
    """A weight without one element left."""
    model = prune(sequential(layers.GRU(32), layers.Dense(32)))
    model.layers[1].kernel.assign(np.zeros((32, 32)))
    for quantize in (None, "int8"):
        report = export_tflite(
            model, tmp_path / "model.tflite", quantize=quantize, runtimes=QUICK, measure_latency=False
        )
        inputs = random_inputs(report)
        y = run_file(tmp_path / "model.tflite", **inputs)["y"]
        np.testing.assert_allclose(y, model.layers[1].bias[None], atol=1e-6)


def test_the_time_loop_is_left_with_the_recurrent_weight(tmp_path):
    """The input projection is one operator before the loop; with it in the loop there would be two inside."""
    path = tmp_path / "model.tflite"
    export_tflite(prune(sequential(layers.GRU(32))), path, runtimes=QUICK, measure_latency=False)
    assert op_names(path).count("FULLY_CONNECTED") == 2
    keeps = [options.keepNumDims for _, _, options in fully_connected(path)]
    assert sorted(keeps) == [False, True]


def test_zero_sequences_take_no_bytes(tmp_path):
    """What a loop writes its outputs to would be a constant of timesteps x units floats."""
    path = tmp_path / "model.tflite"
    model = prune(sequential(layers.GRU(32, return_sequences=True), timesteps=500))
    report = export_tflite(model, path, runtimes=QUICK, measure_latency=False)
    assert "FILL" in op_names(path)
    assert report.bytes < 500 * 32 * 4


# ---- the report


def test_report(tmp_path):
    path = tmp_path / "model.tflite"
    model = prune(sequential(layers.GRU(64, name="memory"), layers.Dense(9, name="head"), features=64), keep=0.1)
    report = export_tflite(model, path, quantize="int8", runtimes=QUICK)
    assert isinstance(report, ExportReport)
    assert (report.path, report.target, report.quantize) == (str(path), "stock", "int8")
    assert report.ratio == report.bytes_dense / report.bytes > 3
    assert report.speedup == {r: report.latency_dense_ms[r] / report.latency_ms[r] for r in QUICK}
    assert set(report.runtimes) == set(QUICK)
    assert all(report.max_error[r] <= report.tolerance[r] for r in QUICK)

    weights = {w.name: w for w in report.weights}
    kernel = weights[model.layers[0].cell.kernel.path]
    value = np.asarray(model.layers[0].cell.kernel)
    assert (kernel.shape, kernel.dtype, kernel.encoding) == ((192, 64), "int8", "sparse 1x16")
    assert kernel.sparsity == pytest.approx(np.mean(value == 0), abs=0.01)
    assert kernel.bytes_dense == value.size * 4 > kernel.bytes
    assert weights[model.layers[1].kernel.path].encoding == "dense"
    assert weights[model.layers[1].kernel.path].why

    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["name"] in weights
    table = str(report)
    for text in ("memory/gru_cell/recurrent_kernel", "sparse 1x16", "smaller", "1 thread", QUICK[0], "max error"):
        assert text in table
    with pytest.raises(AttributeError):
        report.bytes = 0


def test_stages_are_printed_if_asked_for(tmp_path, capfd):
    model = prune(sequential(layers.GRU(32)))
    export_tflite(model, tmp_path / "a", runtimes=QUICK, measure_latency=False)
    assert "export_tflite" not in capfd.readouterr().out
    export_tflite(model, tmp_path / "a", runtimes=QUICK, measure_latency=False, verbose=1)
    out = capfd.readouterr().out
    assert "converting" in out
    assert "running on" in out
    assert "wrote" in out


def test_without_validation_nothing_is_run(tmp_path):
    model = prune(sequential(layers.GRU(32)))
    report = export_tflite(model, tmp_path / "model.tflite", validate=False, measure_latency=False)
    assert report.max_error == report.latency_ms == report.runtimes == {}
    assert (tmp_path / "model.tflite").stat().st_size == report.bytes


def test_import_loads_neither_converter_nor_runtime():
    code = (
        "import sys, keras; before = set(sys.modules); import keras_blocksparse.lite\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "keras_blocksparse" in loaded
    assert not loaded & {"tensorflow", "ai_edge_litert", "tflite_runtime", "flatbuffers"}
