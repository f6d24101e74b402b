"""`export_tflite`: the order of the steps from a Keras model to a proven TFLite file."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_blocksparse.lite import convert, validation
from keras_blocksparse.lite.delegate import delegate_path
from keras_blocksparse.lite.flatbuffer import Flatbuffer
from keras_blocksparse.lite.fuse import FusedCall, mark_layers, name_weights, outline, set_attributes
from keras_blocksparse.lite.hoist import hoist_input_projections
from keras_blocksparse.lite.report import ExportReport
from keras_blocksparse.lite.sparsify import fill_zeros, keras_weights, sparsify

TARGETS = ("stock", "fast")
QUANTIZE = (None, "int8", "float16", "bfloat16")
COMPAT = (None, "custom")


def export_tflite(
    model: Any,
    path: str | os.PathLike[str],
    target: str = "stock",
    quantize: str | None = None,
    *,
    batch_size: int = 1,
    timesteps: int | None = None,
    streaming: bool = False,
    compat: str | None = None,
    validate: bool = True,
    measure_latency: bool = True,
    tolerance: float | None = None,
    runtimes: list[str] | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    verbose: int = 0,
) -> ExportReport:
    """Writes a Keras model as a TFLite file in which zero blocks take no bytes and no time.

    With `target="stock"` recurrent layers stay loops of builtin operators, so that any TFLite or LiteRT runtime can run
    the file. With `target="fast"` each GRU, LSTM and SimpleRNN is one operator that our delegate (`kbs.lite`) runs in
    one go, with its zero blocks left out; a runtime without the delegate runs the loop of builtin operators that the
    same file holds on the same weights. Before a file is moved to `path` it is run in a subprocess on the runtimes
    installed here, with and without the delegate, and compared with the Keras model; if it does not compute the same,
    an `ExportError` is raised and whatever was at `path` stays as it was.

    The model is only read. It may still carry pruning constraints, and it may have a mixed precision policy (the file
    computes in float32). Outputs are compared on random inputs: normal for floats, token ids within the model's
    Embedding tables.

    Example:

    ```python
    model = keras.Sequential([keras.Input((32, 64)), keras.layers.GRU(512), keras.layers.Dense(9)])
    # ... prune, fit, strip ...
    report = export_tflite(model, "model.tflite")
    print(report)                      # bytes, error and latency against the dense file, encoding of each weight
    export_tflite(model, "model_int8.tflite", quantize="int8")

    export_tflite(model, "fast.tflite", target="fast")
    y = kbs.lite.Interpreter("fast.tflite").get_signature_runner()(x=x)["y"]
    ```

    A streaming file takes the states as inputs and gives them back. With one recurrent layer they are called `h_in` and
    `h_out` (and `c_in`, `c_out` for an LSTM), with several `<layer name>_h_in` and so on; `report.states` says what
    goes where. Zeros begin a stream:

    ```python
    report = export_tflite(model, "stream.tflite", streaming=True)      # one frame per call; timesteps=4 for four
    run = Interpreter("stream.tflite").get_signature_runner()
    h = np.zeros((1, 512), "float32")
    for frame in frames:                                                # (1, 1, 64) each
        out = run(x=frame, h_in=h)
        y, h = out["y"], out["h_out"]
    ```

    Args:
        model: a built `keras.Model` with float32 weights.
        path: file to write. Its directory must exist.
        target: `"stock"`, a file for the TFLite runtimes as they are distributed; `"fast"`, one that our delegate runs
            faster, and that they run too.
        quantize: None for float32 (zero blocks of 1x4 are skipped); `"int8"` for int8 weights and float32 activations
            (zero blocks of 1x16 are skipped); `"float16"` for float16 weights that are unpacked when the file is
            loaded, so the file is small but no faster than a dense one; `"bfloat16"`, for `target="fast"`, weights
            rounded to bfloat16, which the delegate computes with as they are (in the file they are float16 numbers, so
            that other runtimes can unpack them). A weight that does not fit or would not gain is stored otherwise; the
            report says how and why.
        batch_size: static batch of the file.
        timesteps: static number of timesteps, needed if the model leaves its time axis open. When streaming: frames per
            call, 1 by default.
        streaming: make the states of the recurrent layers inputs and outputs. Not for Bidirectional or `go_backwards`
            layers.
        compat: None, or `"custom"` for runtimes that do not know STABLEHLO_COMPOSITE (TensorFlow before 2.18,
            tflite-runtime): recurrent layers become custom operators, which only the delegate runs. For
            `target="fast"`.
        validate: run the file and compare it before it is moved to `path`. Leave it on: wrong files can be silent, or
            crash.
        measure_latency: time the file and its dense float32 twin, one thread, in turns.
        tolerance: largest absolute difference from Keras' outputs to accept. By default, for float32, 2e-5 of the
            largest output (or of 1); quantized, twice the error of the dense file of the same quantization plus 2 %
            (`"int8"`) or 0.2 % (`"float16"`) of the largest output, and at most 25 % or 5 % of it.
        runtimes: runtimes to run on, of `"tf.lite"`, `"ai_edge_litert"`, `"tflite_runtime"`. None means all that are
            installed.
        seed: seed of the random inputs.
        timeout: seconds a runtime may take.
        verbose: 1 prints the steps.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: `model` is not a Keras model, or `path` not a path.
        ValueError: an argument out of range; a path that cannot be written; a model that is not built, holds NaN
            weights, has open axes, is stateful, or cannot stream; each quotes what was received.
        ImportError: no TFLite runtime to run the file on, or TensorFlow is missing.
        ExportError: an operation of the model has no TFLite builtin, or the file failed its comparison.
    """
    _check_arguments(target, quantize, batch_size, timesteps, compat, tolerance, timeout)
    path = _check_path(path)
    _require_tensorflow()
    fast = target == "fast"
    run_on = (
        validation.installed_runtimes(runtimes, composites=fast and compat is None)
        if validate or measure_latency
        else []
    )
    if fast and run_on:
        delegate_path()
    convert.check_model(model)
    if streaming:
        convert.streaming_layers(model)
        timesteps = timesteps or 1
    specs = convert.input_specs(model, batch_size, timesteps, streaming)
    say = _Stages(verbose)

    with _temporary_directory(path) as workdir:
        say(f"tracing {model.name}")
        traced = convert.trace(model, specs, streaming)
        calls: list[FusedCall] = []
        not_fused: dict[str, str] = {}
        if fast:
            with mark_layers(model, streaming, calls, not_fused):
                marked = convert.trace(model, specs, streaming)
        input_names = [s.name for s in (*traced.inputs, *traced.states)]
        output_names = [*traced.output_names, *traced.state_outputs]

        say("converting to dense float32")
        files = {"dense": workdir / "dense.tflite", "export": workdir / "export.tflite"}
        twins = {"dense": convert.to_tflite(traced, None)}
        convert_to = "float16" if quantize == "bfloat16" else quantize
        if quantize is not None:
            say(f"converting to dense {convert_to}")
            files["twin"] = workdir / "twin.tflite"
            twins["twin"] = convert.to_tflite(traced, convert_to)

        say("encoding weights")
        for name, data in twins.items():
            twin = Flatbuffer(data)
            twin.set_signature(input_names, output_names)
            files[name].write_bytes(twin.tobytes())
        if fast:
            file = Flatbuffer(convert.to_tflite(marked, convert_to, marked=True))
            outline(file, calls)
        else:
            file = Flatbuffer(twins.get("twin", twins["dense"]))
        convert.refuse_custom_ops(file.custom_ops())
        # Up to about TF 2.16, XNNPACK mixes up what it unpacks in one subgraph with what it unpacks in the next (a
        # dense float16 file of the converter's own can be wrong there); leaving float16 weights where they are gives it
        # the least to mix up.
        if quantize != "float16" or fast:
            hoist_input_projections(file)
        fill_zeros(file)
        name_weights(file, calls)
        records = sparsify(file, quantize, keras_weights(model))
        set_attributes(file, calls, quantize == "bfloat16", compat)
        file.set_signature(input_names, output_names)
        finished = files["export"]
        finished.write_bytes(file.tobytes())

        states = dict(zip(traced.state_outputs, [s.name for s in traced.states], strict=True))
        # The same file may run twice, with the delegate and without.
        runs = ["export"] if compat is None else []
        if fast:
            files["fused"] = files["export"]
            runs.append("fused")
        if compat is not None:
            del files["export"]
        labels = {"export": "{}", "fused": "{} with delegate"}
        max_error, allowed, latency, latency_dense, versions = {}, {}, {}, {}, {}
        if run_on:
            cases = validation.make_cases(model, traced, seed)
        for runtime in run_on:
            say(f"running on {runtime}")
            result = validation.run(
                runtime,
                files,
                ["fused"] if fast else [],
                cases,
                states,
                checked=(runs if quantize is None else list(files)) if validate else [],
                timed=[*runs, "dense"] if measure_latency else [],
                workdir=workdir,
                timeout=timeout,
            )
            versions[runtime] = result.version
            for name in runs:
                label = labels[name].format(runtime)
                if validate:
                    max_error[label], allowed[label] = validation.check(
                        label, name, result, cases, quantize, tolerance, streaming
                    )
                if measure_latency:
                    latency[label], latency_dense[label] = result.latency_ms(name), result.latency_ms("dense")

        report = ExportReport(
            path=str(path),
            target=target,
            quantize=quantize,
            streaming=streaming,
            compat=compat,
            fused=tuple(dict.fromkeys(call.layer for call in calls)),
            not_fused=not_fused,
            bytes=finished.stat().st_size,
            bytes_dense=len(twins["dense"]),
            weights=tuple(records),
            inputs={s.name: (s.shape, s.dtype) for s in (*traced.inputs, *traced.states)},
            outputs={n: (tuple(t.shape), t.dtype.name) for n, t in zip(output_names, traced.outputs, strict=True)},
            states=states,
            max_error=max_error,
            tolerance=allowed,
            latency_ms=latency,
            latency_dense_ms=latency_dense,
            runtimes=versions,
            cpu=validation.cpu_name() if run_on else "",
        )
        os.replace(finished, path)
    say(f"wrote {path}")
    return report


# ---- arguments


def _check_arguments(
    target: str,
    quantize: str | None,
    batch_size: int,
    timesteps: int | None,
    compat: str | None,
    tolerance: float | None,
    timeout: float,
) -> None:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {list(TARGETS)}. Received: target={target!r}")
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize must be one of {list(QUANTIZE)}. Received: quantize={quantize!r}")
    if compat not in COMPAT:
        raise ValueError(f"compat must be one of {list(COMPAT)}. Received: compat={compat!r}")
    if target != "fast":
        for name, value in (("quantize", quantize if quantize == "bfloat16" else None), ("compat", compat)):
            if value is not None:
                raise ValueError(f"{name}={value!r} is for target='fast'. Received: target={target!r}")
    if not _is_count(batch_size):
        raise ValueError(f"batch_size must be a positive integer. Received: batch_size={batch_size!r}")
    if timesteps is not None and not _is_count(timesteps):
        raise ValueError(f"timesteps must be None or a positive integer. Received: timesteps={timesteps!r}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be None or at least 0. Received: tolerance={tolerance!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive. Received: timeout={timeout!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_path(path: Any) -> Path:
    """The path, absolute, if a file can be written there; found out now and not after a long conversion."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike. Received: path={path!r} of type {type(path).__name__}")
    full = Path(path).absolute()
    if not str(path) or full.is_dir():
        raise ValueError(f"path must name a file, and this is a directory. Received: path={str(path)!r}")
    if not full.parent.is_dir():
        raise ValueError(f"The directory of path does not exist. Received: path={str(path)!r}")
    if not os.access(full.parent, os.W_OK | os.X_OK) or (full.exists() and not os.access(full, os.W_OK)):
        raise ValueError(f"path cannot be written: permission denied. Received: path={str(path)!r}")
    return full


def _require_tensorflow() -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ImportError("export_tflite needs TensorFlow's converter: pip install tensorflow") from error


# ---- helpers


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path`, hence on the same file system, so that the finished file can be moved in one step."""
    try:
        workdir = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(f"path cannot be written: {error.strerror}. Received: path={str(path)!r}") from error
    try:
        yield workdir
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


class _Stages:
    """Prints the steps with the seconds since the start, if asked to."""

    def __init__(self, verbose: int) -> None:
        self._verbose, self._start = verbose, time.monotonic()

    def __call__(self, text: str) -> None:
        if self._verbose:
            print(f"export_tflite [{time.monotonic() - self._start:5.1f} s] {text}", flush=True)
