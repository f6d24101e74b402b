"""`target="fast"`: one file that runs on stock runtimes, and with our delegate."""

import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from flatbuffers import flexbuffers
from keras import layers
from lite_helpers import QUICK, op_names, prune, random_inputs, run_file, sequential
from lite_models import MODELS, bidirectional

import keras_blocksparse as kbs
from keras_blocksparse.lite import ExportError, export_tflite
from keras_blocksparse.lite.delegate import _runtime
from keras_blocksparse.lite.flatbuffer import Flatbuffer

TOLERANCE = {None: 2e-5, "int8": 0.08, "bfloat16": 0.02}
# What no fused loop can run stays as it was.
NOT_FUSED = {"rnn_of_cells": 0, "activations": 0, "dense": 0}
FUSED = {"bidirectional_concat": 2, "bidirectional_sum": 2, "bidirectional_mul": 2, "bidirectional_ave": 2}
FUSED |= {"bidirectional_none": 2, "stacked": 2, "masking": 2, "multi_io": 2, "initial_state": 2, "shared": 2}
NARROW = ["gru", "gru_reset_before", "lstm", "simple_rnn", "bidirectional_concat", "masking", "initial_state"]


def export(model, path, **options):
    return export_tflite(model, path, target="fast", runtimes=QUICK, measure_latency=False, **options)


def run_fused(path, num_threads=1, **inputs):
    return kbs.lite.Interpreter(path, num_threads, runtime=QUICK[0]).get_signature_runner()(**inputs)


def expected_of(model, report, inputs, by_name=False):
    given = list(inputs.values())
    expected = model(inputs if by_name else given if len(given) > 1 else given[0], training=False)
    if isinstance(expected, dict):
        expected = [expected[name] for name in report.outputs]
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    return dict(zip(report.outputs, map(np.asarray, expected), strict=True))


def check(outputs, expected, quantize):
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        assert outputs[name].shape == value.shape
        assert np.std(value) > 1e-3  # an answer that cannot be right by chance
        np.testing.assert_allclose(outputs[name], value, atol=TOLERANCE[quantize] * max(1, np.abs(value).max()))


CASES = [(kind, None) for kind in MODELS] + [(kind, q) for kind in NARROW for q in ("int8", "bfloat16")]


@pytest.mark.parametrize(("kind", "quantize"), CASES)
def test_one_file_with_the_delegate_and_without(kind, quantize, tmp_path):
    model, path = prune(MODELS[kind]()), tmp_path / "model.tflite"
    # In a process of its own, the export has compared both ways with Keras when this returns.
    report = export(model, path, quantize=quantize, batch_size=3)
    assert set(report.max_error) == {QUICK[0], f"{QUICK[0]} with delegate"}
    assert op_names(path).count("STABLEHLO_COMPOSITE") == NOT_FUSED.get(kind, FUSED.get(kind, 1))
    if kind in NOT_FUSED:
        assert not report.fused
        assert kind == "dense" or all("the native loop has no" in why for why in report.not_fused.values())
    inputs = random_inputs(report)
    expected = expected_of(model, report, inputs, by_name=kind == "dict_io")
    check(run_fused(path, **inputs), expected, quantize)
    check(run_file(path, **inputs), expected, quantize)


@pytest.mark.parametrize("quantize", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("kind", NARROW)
def test_custom_operators_hold_no_decomposition(kind, quantize, tmp_path):
    model, path = prune(MODELS[kind]()), tmp_path / "model.tflite"
    report = export(model, path, quantize=quantize, compat="custom")
    assert "KerasBlocksparseRnn" in op_names(path)
    assert not {"WHILE", "STABLEHLO_COMPOSITE"} & set(op_names(path))
    assert list(report.max_error) == [f"{QUICK[0]} with delegate"]
    inputs = random_inputs(report)
    check(run_fused(path, **inputs), expected_of(model, report, inputs), quantize)
    with pytest.raises((RuntimeError, ValueError), match="KerasBlocksparseRnn"):
        run_file(path, **inputs)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_streaming_keeps_the_states(kind, tmp_path):
    make = {"gru": layers.GRU, "lstm": layers.LSTM}[kind]
    model, path = prune(sequential(make(32, return_sequences=True))), tmp_path / "model.tflite"
    report = export(model, path, streaming=True)
    x = np.random.default_rng(3).normal(size=(1, 6, 32)).astype(np.float32)
    for run in (
        kbs.lite.Interpreter(path, runtime=QUICK[0]).get_signature_runner(),
        lambda **inputs: run_file(path, **inputs),
    ):
        states = {name: np.zeros(report.inputs[name][0], np.float32) for name in report.states.values()}
        steps = []
        for step in range(6):
            out = run(x=x[:, step : step + 1], **states)
            states = {incoming: out[outgoing] for outgoing, incoming in report.states.items()}
            steps.append(out["y"])
        np.testing.assert_allclose(np.concatenate(steps, 1), model(x), atol=2e-5)


def test_the_batch_may_be_resized(tmp_path):
    model, path = prune(bidirectional("concat", layers.GRU(32, return_sequences=True))), tmp_path / "model.tflite"
    export(model, path)
    interpreter = kbs.lite.Interpreter(path, runtime=QUICK[0])
    for batch in (5, 1, 2):
        x = np.random.default_rng(batch).normal(size=(batch, 6, 32)).astype(np.float32)
        details = interpreter.get_input_details()[0]
        interpreter.resize_tensor_input(details["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(details["index"], x)
        interpreter.invoke()
        y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        np.testing.assert_allclose(y, model(x), atol=2e-5)


def test_the_file_is_hardly_larger_than_the_stock_one(tmp_path):
    model = prune(sequential(layers.GRU(256), features=256, timesteps=32), keep=0.1)
    for quantize in (None, "int8"):
        stock = export_tflite(model, tmp_path / "a", quantize=quantize, validate=False, measure_latency=False)
        fast = export_tflite(model, tmp_path / "b", "fast", quantize, validate=False, measure_latency=False)
        assert fast.bytes <= 1.1 * stock.bytes + 8192  # at this size, operators are a tenth of the file
        # Weights are in it once.
        assert [w.bytes for w in fast.weights] == [w.bytes for w in stock.weights]


def test_many_interpreters_in_threads_with_one_delegate(tmp_path):
    model, path = prune(sequential(layers.GRU(64, return_sequences=True), layers.Dense(32))), tmp_path / "model.tflite"
    report = export(model, path)
    delegate = kbs.lite.load_delegate(2, runtime=QUICK[0])
    plain = type(kbs.lite.Interpreter(path, runtime=QUICK[0]))
    interpreters = [plain(str(path), experimental_delegates=[delegate]) for _ in range(3)]
    interpreters += [kbs.lite.Interpreter(path, num_threads=2, runtime=QUICK[0])]
    inputs = [random_inputs(report, seed) for seed in range(len(interpreters))]
    errors: list[float] = []

    def work(interpreter, x):
        run = interpreter.get_signature_runner()
        errors.extend(float(np.abs(run(**x)["y"] - model(x["x"])).max()) for _ in range(20))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(interpreters, inputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20 * len(interpreters)
    assert max(errors) < 2e-5


def claimed(path, tmp_path):
    """What the delegate says of each operator of a file, in a new process."""
    code = (
        f"import keras_blocksparse as kbs; kbs.lite.Interpreter({str(path)!r}, runtime={QUICK[0]!r}).allocate_tensors()"
    )
    env = {**os.environ, "KBS_TFLITE_LOG": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return [line for line in done.stderr.splitlines() if line.startswith("keras_blocksparse: operator")]


def test_sparse_fully_connected_operators_of_any_file(tmp_path):
    """Of the stock target's too: in the main graph and in the loops."""
    model, path = prune(sequential(layers.GRU(64, return_sequences=True), layers.Dense(32, "relu"))), tmp_path / "a"
    export_tflite(model, path, runtimes=QUICK, measure_latency=False)
    ours = [line for line in claimed(path, tmp_path) if line.endswith("is ours: FULLY_CONNECTED")]
    assert len(ours) == 3
    x = np.random.default_rng(1).normal(size=(1, 6, 32)).astype(np.float32)
    np.testing.assert_allclose(run_fused(path, x=x)["y"], model(x), atol=2e-5)


# ---- files that are not as they should be


@pytest.fixture
def gru_file(tmp_path):
    model, path = prune(sequential(layers.GRU(32))), tmp_path / "model.tflite"
    export(model, path)
    return model, path


def tampered(path, compat, **changes):
    """The file with other attributes; `None` for bytes that are none at all."""
    file = Flatbuffer(path.read_bytes())
    (_, op), *_ = file.operators("STABLEHLO_COMPOSITE" if compat is None else "KerasBlocksparseRnn")
    owner, name = (op, "customOptions") if compat else (op.builtinOptions2, "compositeAttributes")
    attributes = flexbuffers.Loads(bytes(getattr(owner, name)))
    data = b"no flexbuffer" if changes.pop("garbage", False) else bytes(flexbuffers.Dumps({**attributes, **changes}))
    setattr(owner, name, np.frombuffer(data, np.uint8))
    path.write_bytes(file.tobytes())


CHANGES = [
    ({"garbage": True}, "no FlexBuffer map"),
    ({"version": 2}, "version should be from 1 to 1, and is 2"),
    ({"cell": 7}, "cell should be from 0 to 2, and is 7"),
    ({"units": 64}, "kernel should have 192 columns, and has 96"),
    ({"units": -3}, "units"),
    ({"mask": 1}, "should have 2 inputs and 1 outputs, and has 1 and 1"),
    ({"states_out": 1}, "should have 1 inputs and 2 outputs, and has 1 and 1"),
    ({"kernel": [-1, 1 << 20]}, "no tensor for its kernel"),
    ({"kernel": [99, 0]}, "subgraph 99, which there is not"),
    ({"kernel": []}, "names no weights"),
    ({"recurrent": [1]}, "recurrent should be at most 64 pairs"),
    ({"bias": [-1, 0]}, "bias"),
    ({"activation_limit": float("nan")}, "activation_limit"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_attributes_that_lie(changes, message, gru_file, tmp_path, capfd):
    """The delegate leaves the operator alone, and the file goes on computing what it should."""
    model, path = gru_file
    tampered(path, None, **changes)
    x = np.random.default_rng(0).normal(size=(1, 6, 32)).astype(np.float32)
    np.testing.assert_allclose(run_fused(path, x=x)["y"], model(x), atol=2e-5)
    assert any("left to the runtime" in line and message in line for line in claimed(path, tmp_path))


def test_custom_operator_that_lies_is_an_error(tmp_path):
    model, path = prune(sequential(layers.GRU(32))), tmp_path / "model.tflite"
    export(model, path, compat="custom")
    tampered(path, "custom", units=64)
    with pytest.raises((RuntimeError, ValueError), match="kernel should have 192 columns, and has 96"):
        run_fused(path, x=np.zeros((1, 6, 32), np.float32))


def test_inputs_that_do_not_fit_are_an_error(gru_file):
    _, path = gru_file
    interpreter = kbs.lite.Interpreter(path, runtime=QUICK[0])
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], (1, 6, 33))
    with pytest.raises(RuntimeError, match=r"input should have shape \(\?, \?, 32\), and has \(1, 6, 33\)"):
        interpreter.allocate_tensors()


def test_a_file_cut_short_is_an_error(gru_file):
    _, path = gru_file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((RuntimeError, ValueError)):
        run_fused(path, x=np.zeros((1, 6, 32), np.float32))


def test_bfloat16_refuses_what_float16_cannot_hold(tmp_path):
    model = keras.Sequential([keras.Input((4, 32)), layers.GRU(32)])
    model.layers[0].cell.kernel.assign(np.full((32, 96), 1e5, np.float32))
    with pytest.raises((ValueError, ExportError), match="float16|NaN|infinite|off by"):
        export(model, tmp_path / "model.tflite", quantize="bfloat16")
    assert not (tmp_path / "model.tflite").exists()


# ---- loading


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_that_make_no_sense(threads):
    with pytest.raises(ValueError, match="num_threads must be a positive integer"):
        kbs.lite.load_delegate(threads)


def test_unknown_runtime_and_missing_library(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="runtime must be None or one of"):
        kbs.lite.load_delegate(runtime="onnx")
    monkeypatch.setattr(kbs, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"libkbs_tflite.so is missing.*g\+\+"):
        kbs.lite.delegate_path()


@pytest.mark.parametrize(
    ("options", "message"), [({"num_threads": "two"}, 'received "two"'), ({"threads": "2"}, 'unknown option "threads"')]
)
def test_options_that_the_library_refuses(options, message):
    _, load = _runtime(QUICK[0])
    with pytest.raises(ValueError, match=message):
        load(str(kbs.lite.delegate_path()), options)
