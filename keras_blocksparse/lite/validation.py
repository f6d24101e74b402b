"""Proof of a finished file: in a process of its own, a stock interpreter computes what the Keras model computes."""

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_blocksparse.lite.convert import Traced, call_model, layers_of, plain_inference
from keras_blocksparse.lite.delegate import delegate_path
from keras_blocksparse.lite.errors import ExportError

# Runtime -> (module to look for, what to install).
RUNTIMES = {
    "tf.lite": ("tensorflow", "pip install tensorflow"),
    "ai_edge_litert": ("ai_edge_litert", "pip install ai-edge-litert"),
    "tflite_runtime": ("tflite_runtime", "pip install tflite-runtime"),
}

_RUNNER = Path(__file__).with_name("_runner.py")
_STREAM_STEPS = 3
_REPEATS = 40
_SECONDS = 1.5

# float32: the order of additions differs between runtimes, and a recurrence carries the difference on. Relative to the
# largest output.
TOLERANCE_FLOAT32 = 2e-5
# Quantized: against the dense file of the same quantization, whose error is that of the number format alone.
TWIN_FACTOR = 2.0
TWIN_FLOOR = {"int8": 0.02, "float16": 2e-3, "bfloat16": 0.015}
# And against Keras: beyond this share of the largest output the model does not survive its quantization.
TOLERANCE_QUANTIZED = {"int8": 0.25, "float16": 0.05, "bfloat16": 0.1}


@dataclass(frozen=True)
class Cases:
    """Inputs to compare on and what Keras computes for them.

    Attributes:
        arrays: `"case{c}/step{s}/{input}"` to the input of that call.
        steps: number of calls of each case; the states go from one call to the next.
        expected: `"case{c}/step{s}/{output}"` to the output; states are not compared (a wrong one shows in the next
            call).
    """

    arrays: dict[str, np.ndarray]
    steps: list[int]
    expected: dict[str, np.ndarray]


@dataclass(frozen=True)
class RunResult:
    """What one runtime gave.

    Attributes:
        version: of the runtime.
        outputs: by `"{file}/case{c}/step{s}/{name}"`.
        times_ms: milliseconds of each call, by file.
        idle_bytes: most memory of the process before it loaded the files; None where the system does not tell.
        peak_bytes: most memory of the process.
    """

    version: str
    outputs: dict[str, np.ndarray]
    times_ms: dict[str, list[float]]
    idle_bytes: int | None
    peak_bytes: int | None

    def latency_ms(self, name: str) -> float:
        """Median milliseconds of a call."""
        return float(np.median(self.times_ms[name]))


def installed_runtimes(wanted: list[str] | None, composites: bool = False) -> list[str]:
    """Names of the runtimes to run on.

    Args:
        wanted: names from `RUNTIMES`; None means all that are installed.
        composites: leave out those that cannot load a file with composites.

    Raises:
        ValueError: an unknown name, or none.
        ImportError: one that is not installed, or none is, or none of them knows composites; says what to install.
    """
    if wanted is not None and (not isinstance(wanted, (list, tuple)) or not wanted or not set(wanted) <= set(RUNTIMES)):
        raise ValueError(f"runtimes must be None or a list of {sorted(RUNTIMES)}. Received: runtimes={wanted!r}")
    found = [name for name, (module, _) in RUNTIMES.items() if importlib.util.find_spec(module) is not None]
    for name in wanted or ():
        if name not in found:
            raise ImportError(
                f"Runtime {name!r} is not installed: {RUNTIMES[name][1]}. "
                "Or pass validate=False, measure_latency=False."
            )
    if composites:
        found = [name for name in found if _knows_composites(name)]
        if not found or not set(wanted or ()) <= set(found):
            raise ImportError(
                "target='fast' writes a STABLEHLO_COMPOSITE operator, which runtimes know from TensorFlow 2.18 and "
                "LiteRT 1.0 on: pip install ai-edge-litert. Or pass compat='custom', which older runtimes run with our "
                f"delegate, or validate=False, measure_latency=False. Received: runtimes={wanted!r}"
            )
    if not found:
        raise ImportError(
            "No TFLite runtime is installed: pip install ai-edge-litert. Or pass validate=False, measure_latency=False."
        )
    return [name for name in found if wanted is None or name in wanted]


def _knows_composites(runtime: str) -> bool:
    """Whether a runtime that is installed can load a file with STABLEHLO_COMPOSITE: see docs/runtimes.md."""
    if runtime != "tf.lite":
        return runtime == "ai_edge_litert"
    from importlib.metadata import PackageNotFoundError, version

    for name in ("tensorflow", "tensorflow-cpu", "tensorflow-intel"):
        try:
            major, minor = version(name).split(".")[:2]
        except PackageNotFoundError:
            continue
        return (int(major), int(minor)) >= (2, 18)
    return True  # a build of somebody's own: loading the file will tell


# ---- inputs and what Keras makes of them


def make_cases(model: Any, traced: Traced, seed: int) -> Cases:
    """Random inputs with Keras' outputs for them.

    Two cases of one call; the second has timesteps masked if the model masks. A streaming model gets one case
    of three calls, and is compared with the Keras model on all frames at once.

    Raises:
        ExportError: a streaming model that cannot take three chunks at once.
    """
    rng = np.random.default_rng(seed)
    streaming = bool(traced.states)
    arrays: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    steps = [_STREAM_STEPS] if streaming else [1, 1]
    for case, count in enumerate(steps):
        whole = []
        for spec in traced.inputs:
            shape = list(spec.shape)
            if streaming and spec.time_axis:
                shape[1] *= count
            whole.append(_random(model, rng, shape, spec.dtype))
            if spec.time_axis and (case or streaming):
                _mask_some(model, whole[-1])
            chunks = np.split(whole[-1], count, axis=1) if spec.time_axis else [whole[-1]] * count
            for step, chunk in enumerate(chunks):
                arrays[f"case{case}/step{step}/{spec.name}"] = chunk
        for spec in traced.states:
            arrays[f"case{case}/step0/{spec.name}"] = np.zeros(spec.shape, spec.dtype)
        expected.update(_expect(model, traced, whole, case, count))
    return Cases(arrays, steps, expected)


def _expect(model: Any, traced: Traced, whole: list[np.ndarray], case: int, count: int) -> dict[str, np.ndarray]:
    import tensorflow as tf

    try:
        with plain_inference(model):
            outputs, _ = call_model(model, [tf.constant(a) for a in whole], streaming=count > 1)
    except Exception as error:
        if count == 1:
            raise
        raise ExportError(
            f"streaming=True compares {count} chunks with the Keras model on all their frames at once, and the model "
            f"does not take {[a.shape for a in whole]}: {error}"
        ) from error
    expected = {}
    for name, output, chunk in zip(traced.output_names, outputs, traced.outputs, strict=False):
        value = np.asarray(output)
        if not np.isfinite(value).all():
            raise ExportError(f"The Keras model gives NaN or infinite values for output {name!r} on random inputs.")
        # An output with a time axis comes in chunks; one without is that of the last frame, known after the last call.
        in_time = value.ndim > 1 and value.shape != tuple(chunk.shape) and value.shape[1] == count * chunk.shape[1]
        for step in range(count):
            if in_time:
                expected[f"case{case}/step{step}/{name}"] = np.split(value, count, axis=1)[step]
            elif step == count - 1:
                expected[f"case{case}/step{step}/{name}"] = value
    return expected


def _random(model: Any, rng: np.random.Generator, shape: list[int], dtype: str) -> np.ndarray:
    import keras

    if dtype == "bool":
        return rng.random(shape) < 0.5
    if "int" in dtype:
        tables = [layer.input_dim for layer in layers_of(model) if isinstance(layer, keras.layers.Embedding)]
        return rng.integers(0, min(tables, default=2), shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def _mask_some(model: Any, value: np.ndarray) -> None:
    """Masks the second third of the timesteps in place, if the model has a Masking layer or an Embedding that masks."""
    import keras

    third = slice(value.shape[1] // 3, value.shape[1] // 3 * 2)
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.Masking) and value.ndim > 2:
            value[:, third] = layer.mask_value
        if isinstance(layer, keras.layers.Embedding) and layer.mask_zero and value.ndim == 2:
            value[:, third] = 0


# ---- running


def run(
    runtime: str,
    files: dict[str, Path],
    delegated: list[str],
    cases: Cases,
    carry: dict[str, str],
    *,
    checked: list[str],
    timed: list[str],
    workdir: Path,
    timeout: float,
    num_threads: int = 1,
    repeats: int = _REPEATS,
    seconds: float = _SECONDS,
) -> RunResult:
    """Runs files on one runtime in a process of its own.

    Args:
        runtime: a name from `RUNTIMES`.
        files: name to path of each file.
        delegated: names of the files that run with our delegate.
        cases: what to feed.
        carry: outgoing to incoming state, by name.
        checked: names of the files whose outputs are wanted.
        timed: names of the files to time; they take turns.
        workdir: directory for the exchange files.
        timeout: seconds until the process is ended.
        num_threads: of the runtime and of the delegate.
        repeats: timed calls of each file.
        seconds: time for all of them, after which there are fewer.

    Raises:
        ExportError: the process failed, was killed by a signal, or took too long.
    """
    job = {
        "runtime": runtime,
        "files": {k: str(v) for k, v in files.items()},
        "delegate": str(delegate_path()) if delegated else None,
        "delegated": delegated,
        "carry": carry,
        "cases": cases.steps,
        "checked": checked,
        "timed": timed,
        "threads": num_threads,
        "repeats": repeats if timed else 0,
        "seconds": seconds,
    }
    tag = runtime.replace(".", "_")
    job_path, out_path = workdir / f"{tag}.job.npz", workdir / f"{tag}.out.npz"
    arrays: dict[str, Any] = {"job": json.dumps(job), **cases.arrays}
    np.savez(job_path, **arrays)
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(_RUNNER), str(job_path), str(out_path)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{runtime} did not finish running the file in {timeout:g} s.") from error
    if done.returncode != 0 or not out_path.exists():
        raise ExportError(f"{runtime} cannot run the file: {_failure(done)}")
    with np.load(out_path) as out:
        outputs = dict(out)
    result = json.loads(str(outputs.pop("result")))
    return RunResult(outputs=outputs, **result)


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    last = " ".join(lines[-1:])[:500]
    if done.returncode < 0:
        return f"it died of {signal.Signals(-done.returncode).name}. {last}".strip()
    return last or f"exit code {done.returncode}"


# ---- comparing


def check(
    runtime: str,
    name: str,
    result: RunResult,
    cases: Cases,
    quantize: str | None,
    tolerance: float | None,
    streaming: bool,
) -> tuple[float, float]:
    """Compares the outputs of one runtime with Keras' own.

    Args:
        runtime: its name, for the message.
        name: of the file to check.
        result: outputs of that file and, if quantized, of `"dense"` (float32) and `"twin"` (dense, same
            quantization).
        cases: with the expected outputs.
        quantize: None, `"int8"`, `"float16"` or `"bfloat16"`.
        tolerance: largest absolute error allowed, instead of the rule below.
        streaming: for the message: says what else may be the cause.

    Returns:
        `(largest absolute error, the tolerance it was checked against)`. By rule, for float32, `TOLERANCE_FLOAT32`
        times the largest expected output (at least 1); quantized, twice the error of the dense twin plus `TWIN_FLOOR`
        of the largest output, and no more than `TOLERANCE_QUANTIZED` of it.

    Raises:
        ExportError: an output is missing, of another shape, NaN or infinite, or too far off; names it.
    """
    worst, allowed = 0.0, 0.0
    peak = max((float(np.abs(v).max(initial=0)) for v in cases.expected.values()), default=0.0)
    # Rounding is that of the numbers inside, which are around 1 even where the outputs are smaller; quantization is not
    # so modest.
    scale = max(1.0, peak) if quantize is None else max(1e-3, peak)
    for key, want in cases.expected.items():
        got = result.outputs.get(f"{name}/{key}")
        if got is None or got.shape != want.shape:
            shape = None if got is None else got.shape
            raise ExportError(f"{runtime} gives output {key!r} of shape {shape}, the Keras model {want.shape}.")
        error = _distance(got, want)
        float_bound = TOLERANCE_FLOAT32 * max(1.0, peak) if tolerance is None else tolerance
        if quantize is not None and not _distance(result.outputs[f"dense/{key}"], want) <= float_bound:
            # The graph is wrong before any weight is: the twin would be off by as much, and make the bound as wide.
            error, bound = _distance(result.outputs[f"dense/{key}"], want), float_bound
        elif quantize is None or tolerance is not None:
            bound = float_bound
        else:
            twin = _distance(result.outputs[f"twin/{key}"], want)
            bound = min(TWIN_FACTOR * twin + TWIN_FLOOR[quantize] * scale, TOLERANCE_QUANTIZED[quantize] * scale)
        # Written so that a NaN fails.
        if not error <= bound:
            hint = ""
            if streaming:
                hint = " Layers that mix timesteps without a state, such as a convolution, cannot stream."
            elif quantize is not None and not _distance(result.outputs[f"twin/{key}"], want) <= bound:
                hint = f" The dense {quantize} file that TensorFlow's converter writes is off on {runtime}, too."
            raise ExportError(
                f"The exported file does not compute what the Keras model computes: on {runtime}, output {key!r} "
                f"is off by {error:.3g}, where {bound:.3g} is allowed.{hint}"
            )
        worst, allowed = max(worst, error), max(allowed, bound)
    return worst, allowed


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0))


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
