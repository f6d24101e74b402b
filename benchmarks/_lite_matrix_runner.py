"""Runs files on the one runtime of an environment: `python _lite_matrix_runner.py job.json`, one line of JSON a result.

It imports numpy and the runtime, and nothing of this project. A file that ends the process is known by being begun and
not finished: lines are `{"begin": key}` and `{"end": key, "result": "ok" or what went wrong, "error": number}`.
"""

import json
import sys
import threading


def load(runtime):
    """Interpreter, load_delegate and version."""
    from importlib import import_module
    from importlib.metadata import version

    if runtime == "tf.lite":
        import tensorflow as tf

        return tf.lite.Interpreter, tf.lite.experimental.load_delegate, tf.__version__
    module = import_module(f"{runtime}.interpreter")
    return module.Interpreter, module.load_delegate, version(runtime.replace("_", "-"))


def outputs_of(interpreter, x, np):
    """Runs a file over x (batch, time, features); one with states step by step."""
    run = interpreter.get_signature_runner()
    states = {k: np.zeros(d["shape"], np.float32) for k, d in run.get_input_details().items() if k != "x"}
    if not states:
        return run(x=x)["y"]
    steps = []
    for t in range(x.shape[1]):
        out = run(x=x[:, t : t + 1], **states)
        states = {k.replace("_out", "_in"): v for k, v in out.items() if k != "y"}
        steps.append(out["y"])
    return np.concatenate(steps, 1)


def resized(interpreter, x, np):
    """The first row of a batch of three, for a file of one input."""
    batch = np.concatenate([x, 0.5 * x, -x])
    detail = interpreter.get_input_details()[0]
    interpreter.resize_tensor_input(detail["index"], batch.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(detail["index"], batch)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[:1]


def check(make, case, np):
    """Largest error over all ways of running a file."""
    data = np.load(case["data"])
    x, want = data["x"], data["y"]
    errors = []

    def compare(y):
        if y.shape != want.shape:
            raise ValueError(f"shape {y.shape}, not {want.shape}")
        errors.append(float(np.abs(y - want).max()))

    interpreters = [make(case["path"], delegate) for delegate in ((0, 0) if case["delegate"] else (None, None))]
    for _ in range(3):
        compare(outputs_of(interpreters[0], x, np))
    threads = [threading.Thread(target=lambda i=i: compare(outputs_of(i, x, np))) for i in interpreters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(errors) != 5:
        raise ValueError("an interpreter in a thread of its own gave no result")
    if case["delegate"]:
        compare(outputs_of(make(case["path"], 1), x, np))  # with a delegate of two threads
        if case["resize"]:
            compare(resized(make(case["path"], 0), x, np))
    return max(errors)


def main(job_path):
    import numpy as np

    with open(job_path) as file:
        job = json.load(file)
    interpreter_class, load_delegate, version = load(job["runtime"])
    print(json.dumps({"version": version}), flush=True)
    delegates = [load_delegate(job["delegate"], {"num_threads": n}) for n in ("1", "2")]

    def make(path, delegate):
        given = None if delegate is None else [delegates[delegate]]
        return interpreter_class(path, num_threads=1, experimental_delegates=given)

    for case in job["cases"]:
        print(json.dumps({"begin": case["key"]}), flush=True)
        result = {"end": case["key"], "result": "ok", "error": None}
        try:
            result["error"] = check(make, case, np)
            if not result["error"] <= case["tolerance"]:  # so that NaN fails
                result["result"] = f"wrong: off by {result['error']:.1e}"
        except Exception as error:
            result["result"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
