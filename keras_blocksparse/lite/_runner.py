"""Runs TFLite files on one interpreter, in a process of its own: `python _runner.py job.npz out.npz`.

A wrong file may end in a segmentation fault, so this never runs inside the exporting process. It imports numpy and the
one runtime it was asked for, and nothing of this package. job.npz holds

    job                      JSON: runtime, files (name -> path), delegate (path of our delegate, or null), delegated
                             (names of the files that run with it), cases (number of calls of each), carry (output name
                             -> input name), checked and timed (names of files), threads, repeats, seconds
    case{c}/step{s}/{name}   inputs of call s of case c; names in `carry` come from the call before

and out.npz gets

    result                           JSON: version, times_ms (file -> list), and most memory that this process ever had,
                                     before the files were loaded and at the end: idle_bytes, peak_bytes (null where
                                     there is no /proc)
    {file}/case{c}/step{s}/{name}    outputs
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any


def load(runtime: str) -> tuple[Any, Any, str]:
    """Returns the Interpreter class of a runtime, its load_delegate, and its version."""
    if runtime == "tf.lite":
        import tensorflow as tf

        return tf.lite.Interpreter, tf.lite.experimental.load_delegate, tf.__version__
    if runtime == "ai_edge_litert":
        from importlib.metadata import version

        from ai_edge_litert.interpreter import Interpreter, load_delegate

        return Interpreter, load_delegate, version("ai-edge-litert")
    if runtime == "tflite_runtime":
        from importlib import import_module

        module = import_module("tflite_runtime.interpreter")
        return module.Interpreter, module.load_delegate, import_module("tflite_runtime").__version__
    raise ValueError(f"Unknown runtime: {runtime}")


def run_cases(
    interpreter: Any, arrays: dict[str, Any], carry: dict[str, str], cases: list[int]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Calls the signature for each case and step; yields `(case, step, outputs)`."""
    signature = interpreter.get_signature_runner()
    for case, steps in enumerate(cases):
        carried: dict[str, Any] = {}
        for step in range(steps):
            prefix = f"case{case}/step{step}/"
            inputs = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
            outputs = signature(**{**inputs, **carried})
            carried = {target: outputs[source] for source, target in carry.items()}
            yield case, step, outputs


def feed(interpreter: Any, arrays: dict[str, Any]) -> None:
    """Sets the inputs of the first call of the first case."""
    signature = interpreter.get_signature_runner()
    details = signature.get_input_details()
    for name, detail in details.items():
        interpreter.set_tensor(detail["index"], arrays[f"case0/step0/{name}"])


# A turn's first calls bring the weights back into the caches, which others have filled since.
WARM_UP_SECONDS, WARM_UP_CALLS = 0.004, 5
TURN_SECONDS, TURN_CALLS = 0.010, 20
LEAST_CALLS = 5


def latencies(
    interpreters: dict[str, Any], arrays: dict[str, Any], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each call of each interpreter; they take short turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in interpreters}
    for interpreter in interpreters.values():
        feed(interpreter, arrays)
        interpreter.invoke()
    deadline = time.perf_counter() + seconds
    while (fewest := min(map(len, times.values()))) < repeats:
        if fewest >= LEAST_CALLS and time.perf_counter() > deadline:
            break
        for name, interpreter in interpreters.items():
            feed(interpreter, arrays)
            _calls(interpreter, WARM_UP_SECONDS, WARM_UP_CALLS)
            times[name] += _calls(interpreter, TURN_SECONDS, TURN_CALLS)
    return {name: values[: max(repeats, LEAST_CALLS)] for name, values in times.items()}


def _calls(interpreter: Any, seconds: float, most: int) -> list[float]:
    """Milliseconds of each of some calls, one at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or (len(times) < most and time.perf_counter() < end):
        start = time.perf_counter()
        interpreter.invoke()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_bytes() -> int | None:
    """The most memory this process has had. getrusage would count that of the process it was started from."""
    try:
        with open("/proc/self/status") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def main(job_path: str, out_path: str) -> None:
    import numpy as np

    with np.load(job_path) as file:
        arrays = dict(file)
    job = json.loads(str(arrays.pop("job")))
    interpreter_class, load_delegate, version = load(job["runtime"])
    outputs: dict[str, Any] = {}
    result: dict[str, Any] = {"version": version, "times_ms": {}, "idle_bytes": peak_bytes()}
    interpreters = {}
    for name, path in job["files"].items():
        delegates = (
            [load_delegate(job["delegate"], {"num_threads": str(job["threads"])})] if name in job["delegated"] else None
        )
        interpreters[name] = interpreter_class(
            model_path=path, num_threads=job["threads"], experimental_delegates=delegates
        )
        interpreters[name].allocate_tensors()
    for name in job["checked"]:
        for case, step, values in run_cases(interpreters[name], arrays, job["carry"], job["cases"]):
            for key, value in values.items():
                outputs[f"{name}/case{case}/step{step}/{key}"] = value
    if job["repeats"]:
        timed = {name: interpreters[name] for name in job["timed"]}
        result["times_ms"] = latencies(timed, arrays, job["repeats"], job["seconds"])
    result["peak_bytes"] = peak_bytes()
    np.savez(out_path, result=json.dumps(result), **outputs)


if __name__ == "__main__":
    # The package's own modules lie beside this script and must not stand in for those of the runtime.
    sys.path.pop(0)
    main(*sys.argv[1:])
