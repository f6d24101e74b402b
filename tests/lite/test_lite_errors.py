"""What is refused, in which words, and what is left behind: nothing."""

import os
import signal
import sys

import keras
import numpy as np
import pytest
from keras import layers
from lite_helpers import QUICK, prune, sequential

from keras_blocksparse.lite import ExportError, convert, export, export_tflite, validation


@pytest.fixture
def model():
    return prune(sequential(layers.GRU(32)))


@pytest.fixture
def path(tmp_path):
    """A path where an earlier file lies that must outlive every failure."""
    path = tmp_path / "model.tflite"
    path.write_bytes(b"earlier")
    yield path
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["model.tflite"]


@pytest.fixture
def no_conversion(monkeypatch):
    """Fails the test if the conversion was begun."""

    def started(*args):
        raise AssertionError("the conversion was begun")

    monkeypatch.setattr(convert, "to_tflite", started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "quick"}, r"\['stock', 'fast'\].*target='quick'"),
        ({"compat": "custom"}, r"for target='fast'. Received: target='stock'"),
        ({"quantize": "bfloat16"}, r"for target='fast'. Received: target='stock'"),
        ({"target": "fast", "compat": "flex"}, r"\[None, 'custom'\].*compat='flex'"),
        ({"target": None}, "target=None"),
        ({"quantize": "int4"}, "quantize='int4'"),
        ({"quantize": 8}, "quantize=8"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.0}, "batch_size=1.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": None}, "batch_size=None"),
        ({"timesteps": -3}, "timesteps=-3"),
        ({"timesteps": "8"}, "timesteps='8'"),
        ({"timesteps": 7}, r"\(None, 6, 32\).*timesteps=7"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"timeout": 0}, "timeout=0"),
        ({"runtimes": ["onnx"]}, r"runtimes=\['onnx'\]"),
        ({"runtimes": []}, r"runtimes=\[\]"),
        ({"runtimes": "tf.lite"}, "runtimes='tf.lite'"),
    ],
)
def test_bad_arguments(model, path, no_conversion, options, message):
    with pytest.raises(ValueError, match=message):
        export_tflite(model, path, **options)


@pytest.mark.parametrize("thing", [None, "model.keras", layers.GRU(4), 3])
def test_not_a_model(thing, path):
    with pytest.raises(TypeError, match=f"Received: model=.*{type(thing).__name__}"):
        export_tflite(thing, path)


@pytest.mark.parametrize("bad", [None, 3, b"model.tflite"])
def test_not_a_path(model, bad):
    with pytest.raises(TypeError, match="Received: path="):
        export_tflite(model, bad)


def test_paths_that_cannot_be_written(model, tmp_path, no_conversion, monkeypatch):
    with pytest.raises(ValueError, match=r"does not exist.*missing"):
        export_tflite(model, tmp_path / "missing" / "model.tflite")
    with pytest.raises(ValueError, match="directory"):
        export_tflite(model, tmp_path)
    with pytest.raises(ValueError, match="directory"):
        export_tflite(model, "")
    # Whoever runs the tests as root may write anywhere.
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ValueError, match=r"permission denied.*model\.tflite"):
        export_tflite(model, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_unbuilt_models(path, no_conversion):
    with pytest.raises(ValueError, match="built"):
        export_tflite(keras.Sequential([layers.GRU(4)]), path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(model, path, no_conversion, value):
    model.layers[0].cell.recurrent_kernel.assign(np.full((32, 96), value))
    with pytest.raises(ValueError, match="gru/gru_cell/recurrent_kernel"):
        export_tflite(model, path)


def test_weights_of_another_dtype(path, no_conversion):
    with pytest.raises(ValueError, match="float16"):
        export_tflite(sequential(layers.GRU(4, dtype="float16")), path)


def test_open_axes(path, no_conversion):
    with pytest.raises(ValueError, match=r"\(None, None, 32\).*timesteps="):
        export_tflite(sequential(layers.GRU(4), timesteps=None), path)
    with pytest.raises(ValueError, match=r"\(None, 4, None\)"):
        export_tflite(keras.Sequential([keras.Input((4, None)), layers.Lambda(lambda x: x)]), path)
    with pytest.raises(ValueError, match="no time axis"):
        export_tflite(keras.Sequential([keras.Input((4,)), layers.Dense(4)]), path, timesteps=3)
    stateful = layers.GRU(4, stateful=True)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\).*batch_size=1"):
        export_tflite(keras.Sequential([keras.Input(batch_shape=(2, 4, 8)), stateful]), path, streaming=True)


def test_stateful_without_streaming(path, no_conversion):
    stateful = keras.Sequential([keras.Input(batch_shape=(1, 4, 8)), layers.GRU(4, stateful=True)])
    with pytest.raises(ValueError, match="streaming=True"):
        export_tflite(stateful, path)


@pytest.mark.parametrize("name", ["Erfinv", "MatrixInverse"])
def test_operations_without_a_builtin_are_named(name, path):
    import tensorflow as tf

    function = {"Erfinv": tf.math.erfinv, "MatrixInverse": lambda x: tf.linalg.inv(tf.reshape(x[:, :16], (1, 4, 4)))}
    model = sequential(layers.GRU(32), layers.Lambda(function[name], output_shape=lambda shape: shape))
    with pytest.raises(ExportError, match=f"no TFLite builtin: {name}"):
        export_tflite(prune(model), path)


def test_a_model_that_changes_variables(path):
    class Counts(layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.count.assign_add(1.0)
            return x * self.count

    with pytest.raises(ExportError, match="changes variables"):
        export_tflite(sequential(layers.GRU(8), Counts()), path)


def test_outputs_that_are_no_numbers(path):
    model = sequential(layers.GRU(32), layers.Lambda(lambda x: x / 0.0))
    with pytest.raises(ExportError, match="NaN or infinite"):
        export_tflite(prune(model), path, runtimes=QUICK)


def test_wrong_numbers_are_found_out(model, path, monkeypatch):
    real = export.sparsify

    def damaged(file, *args):
        records = real(file, *args)
        weight = next(t for g in file.tree.subgraphs for t in g.tensors if t.sparsity is not None)
        file.tree.buffers[weight.buffer].data = np.array(file.tree.buffers[weight.buffer].data)[::-1].copy()
        return records

    monkeypatch.setattr(export, "sparsify", damaged)
    for quantize in (None, "int8", "float16"):
        with pytest.raises(ExportError, match=r"does not compute what the Keras model computes.*'case0/step0/y'"):
            export_tflite(model, path, quantize=quantize, runtimes=QUICK)


def test_tolerance_is_the_callers(model, path):
    with pytest.raises(ExportError, match="is allowed"):
        export_tflite(model, path, quantize="int8", tolerance=1e-9, runtimes=QUICK)


def test_a_crash_is_an_error(model, path, monkeypatch, tmp_path_factory):
    script = tmp_path_factory.mktemp("runner") / "crash.py"
    script.write_text(f"import os, signal\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    monkeypatch.setattr(validation, "_RUNNER", script)
    with pytest.raises(ExportError, match="SIGSEGV"):
        export_tflite(model, path, runtimes=QUICK)


def test_a_file_no_interpreter_takes(model, path, monkeypatch):
    monkeypatch.setattr(export.Flatbuffer, "tobytes", lambda self: b"not a flatbuffer" * 10)
    with pytest.raises(ExportError, match=f"{QUICK[0]} cannot run the file"):
        export_tflite(model, path, runtimes=QUICK)


def test_a_runtime_that_does_not_come_back(model, path, monkeypatch, tmp_path_factory):
    script = tmp_path_factory.mktemp("runner") / "sleep.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(validation, "_RUNNER", script)
    with pytest.raises(ExportError, match="did not finish"):
        export_tflite(model, path, runtimes=QUICK, timeout=0.5)


def test_an_interrupt_leaves_nothing(model, path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_tflite(model, path, runtimes=QUICK)


def test_missing_runtimes(model, path, no_conversion, monkeypatch):
    monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install ai-edge-litert"):
        export_tflite(model, path, runtimes=["ai_edge_litert"])
    with pytest.raises(ImportError, match="pip install"):
        export_tflite(model, path)


def test_missing_tensorflow(model, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="pip install tensorflow"):
        export_tflite(model, path)


def test_another_backend(model, path, no_conversion, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="'jax'"):
        export_tflite(model, path)


def test_success_replaces_the_earlier_file(model, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"earlier")
    report = export_tflite(model, path, runtimes=QUICK, measure_latency=False)
    assert path.stat().st_size == report.bytes > 100
    assert os.listdir(tmp_path) == ["model.tflite"]
    # As any file the user writes, not as private as a temporary one.
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
