"""Which runtimes run our files, with the delegate and without: `make lite-matrix`.

Builds an environment for each runtime under .venv-matrix (once), exports files of every layer, number format and way of
writing a recurrent layer, runs them there, compares with Keras, and writes the table into docs/runtimes.md. Ends with 1
if a file gave wrong numbers or ended a process, or did not run where it should.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import write_between

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS_AT = ROOT / ".venv-matrix"
FILES_AT = ROOT / "build" / "lite-matrix"
PAGE = ROOT / "docs" / "runtimes.md"


@dataclass(frozen=True)
class Environment:
    """A runtime of one version, and whether it knows STABLEHLO_COMPOSITE."""

    name: str
    runtime: str
    requirements: tuple[str, ...]
    composites: bool = True

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return ENVIRONMENTS_AT / self.name / "bin" / "python"

    def build(self) -> None:
        """Makes it, unless it is there."""
        done = ENVIRONMENTS_AT / self.name / ".done"
        if done.exists():
            return
        print(f"building {self.name}", file=sys.stderr, flush=True)
        venv.create(ENVIRONMENTS_AT / self.name, with_pip=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *self.requirements], check=True)
        done.touch()


def _tf(version: str, composites: bool = True) -> Environment:
    return Environment(f"tf-{version}", "tf.lite", (f"tensorflow-cpu=={version}.*",), composites)


def _litert(version: str, *more: str, composites: bool = True) -> Environment:
    requirements = (f"ai-edge-litert=={version}", *(more or ("numpy",)))
    return Environment(f"litert-{version}", "ai_edge_litert", requirements, composites)


ENVIRONMENTS = (
    Environment("tflite-runtime-2.14", "tflite_runtime", ("tflite-runtime==2.14.0", "numpy<2"), composites=False),
    _tf("2.16", composites=False),
    _tf("2.17", composites=False),
    _tf("2.18"),
    _tf("2.19"),
    _tf("2.21"),
    _litert("1.0.1", "numpy<2"),
    _litert("1.4.0"),
    _litert("2.1.6"),
    _litert("2.3.0"),
)


@dataclass(frozen=True)
class Kind:
    """One row of the table: files written in one way."""

    title: str
    target: str
    quantize: str | None = None
    compat: str | None = None
    streaming: bool = False
    models: tuple[str, ...] = ("gru", "gru_reset_before", "lstm", "simple_rnn", "bidirectional", "masking")

    @property
    def tolerance(self) -> float:
        """Largest absolute error; all outputs are of the order of 1."""
        return 2e-5 if self.quantize is None else 2e-2

    def runs(self, environment: Environment, delegate: bool) -> bool:
        """Whether such files are meant to run there."""
        if self.compat == "custom":
            return delegate
        return self.target == "stock" or environment.composites


_STREAMS = ("gru", "lstm")
KINDS = (
    Kind("composite, float32", "fast"),
    Kind("composite, int8", "fast", "int8"),
    Kind("composite, bfloat16", "fast", "bfloat16"),
    Kind("composite, streaming", "fast", streaming=True, models=_STREAMS),
    Kind("custom, float32", "fast", compat="custom"),
    Kind("custom, int8", "fast", "int8", compat="custom"),
    Kind("custom, bfloat16", "fast", "bfloat16", compat="custom"),
    Kind("custom, streaming", "fast", compat="custom", streaming=True, models=_STREAMS),
    Kind("stock, float32", "stock", models=("gru", "lstm", "dense")),
    Kind("stock, int8", "stock", "int8", models=("gru", "lstm", "dense")),
)


def _models() -> dict[str, Any]:
    import keras
    from keras import layers

    def model(*stack: Any) -> Any:
        return keras.Sequential([keras.Input((8, 32)), *stack])

    keras.utils.set_random_seed(0)
    made = {
        "gru": model(layers.GRU(64, return_sequences=True)),
        "gru_reset_before": model(layers.GRU(64, reset_after=False, return_sequences=True)),
        "lstm": model(layers.LSTM(64, return_sequences=True)),
        "simple_rnn": model(layers.SimpleRNN(64, return_sequences=True), layers.Dense(16)),
        "bidirectional": model(layers.Bidirectional(layers.GRU(48, return_sequences=True)), layers.Dense(16)),
        "masking": model(layers.Masking(), layers.GRU(64, return_sequences=True), layers.LSTM(32)),
        "dense": model(layers.Dense(64, "relu"), layers.Dense(32)),
    }
    rng = np.random.default_rng(0)
    for each in made.values():
        for weight in each.weights:
            value = np.asarray(weight)
            if value.ndim == 2 and value.shape[0] % 16 == 0 and value.shape[1] % 16 == 0:
                keep = rng.random((value.shape[0] // 16, value.shape[1] // 16)) < 0.3
                weight.assign(value * np.kron(keep, np.ones((16, 16))))
            elif value.ndim == 1 or "bias" in weight.path:
                weight.assign(rng.uniform(-0.5, 0.5, value.shape))
    return made


def export_files() -> list[dict[str, Any]]:
    """Writes all files, with an input and what Keras makes of it beside each model; returns the cases to run."""
    import keras_blocksparse as kbs

    FILES_AT.mkdir(parents=True, exist_ok=True)
    rng, cases = np.random.default_rng(1), []
    models = _models()
    for name, model in models.items():
        x = rng.normal(size=(1, 8, 32)).astype(np.float32)
        if name == "masking":
            x[:, 3:5] = 0
        np.savez(FILES_AT / f"{name}.npz", x=x, y=np.asarray(model(x)))
    for number, kind in enumerate(KINDS):
        for name in kind.models:
            path = FILES_AT / f"{number}-{name}.tflite"
            kbs.export_tflite(
                models[name],
                path,
                kind.target,
                kind.quantize,
                compat=kind.compat,
                streaming=kind.streaming,
                validate=False,
                measure_latency=False,
            )
            for delegate in (False, True):
                cases.append(
                    {
                        "key": f"{number}/{name}/{int(delegate)}",
                        "path": str(path),
                        "data": str(FILES_AT / f"{name}.npz"),
                        "delegate": delegate,
                        "resize": kind.target == "fast" and not kind.streaming,
                        "tolerance": kind.tolerance,
                    }
                )
    return cases


@dataclass
class Outcome:
    """What one environment made of the cases: key to "ok" or what went wrong."""

    version: str = ""
    results: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def run(environment: Environment, cases: list[dict[str, Any]]) -> Outcome:
    """Runs the cases there. A process that dies is begun again behind the case that ended it."""
    from keras_blocksparse.lite import delegate_path

    outcome, left = Outcome(), list(cases)
    runner = Path(__file__).with_name("_lite_matrix_runner.py")
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    while left:
        job = FILES_AT / f"{environment.name}.json"
        job.write_text(json.dumps({"runtime": environment.runtime, "delegate": str(delegate_path()), "cases": left}))
        command = [str(environment.python), str(runner), str(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
        begun = None
        for line in done.stdout.splitlines():
            if not line.startswith("{"):
                continue
            message = json.loads(line)
            outcome.version = message.get("version", outcome.version)
            begun = message.get("begin", begun)
            if "end" in message:
                outcome.results[message["end"]], begun = message["result"], None
                if message["error"] is not None:
                    outcome.errors[message["end"]] = message["error"]
        if begun is None and done.returncode != 0:
            raise RuntimeError(f"{environment.name} could not begin: {done.stderr.strip()[-2000:]}")
        if begun is not None:
            outcome.results[begun] = (
                f"died of signal {-done.returncode}" if done.returncode < 0 else "ended the process"
            )
        left = [case for case in left if case["key"] not in outcome.results]
    return outcome


def cell(kind: Kind, number: int, environment: Environment, outcome: Outcome, delegate: bool) -> tuple[str, bool]:
    """A cell of the table, and whether it is as it should be."""
    keys = [f"{number}/{name}/{int(delegate)}" for name in kind.models]
    bad = {key.split("/")[1]: outcome.results[key] for key in keys if outcome.results[key] != "ok"}
    if not kind.runs(environment, delegate):
        crashed = [text for text in bad.values() if text.startswith(("died", "ended", "wrong"))]
        return ("refused" if len(bad) == len(keys) and not crashed else "; ".join(crashed) or "runs"), not crashed
    if bad:
        return "; ".join(f"{name}: {text}" for name, text in bad.items()), False
    return f"{max(outcome.errors[key] for key in keys):.0e}", True


def table(outcomes: dict[Environment, Outcome]) -> tuple[str, list[str]]:
    """The page's table, and what is not as it should be."""
    heads = [f"{e.runtime.replace('_', '-')} {o.version}" for e, o in outcomes.items()]
    lines = ["| files | delegate | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    faults = []
    for number, kind in enumerate(KINDS):
        for delegate in (False, True):
            cells = []
            for environment, outcome in outcomes.items():
                text, good = cell(kind, number, environment, outcome, delegate)
                cells.append(text)
                if not good:
                    faults.append(f"{environment.name}, {kind.title}, delegate {delegate}: {text}")
            lines.append(f"| {kind.title} | {'ours' if delegate else 'none'} | " + " | ".join(cells) + " |")
    return "\n".join(lines), faults


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lite_matrix", description=__doc__)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", help=f"names of environments, with commas between: {', '.join(names)}")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: no such environment: {', '.join(sorted(unknown))}")
    chosen = [environment for environment in ENVIRONMENTS if environment.name in wanted]
    for environment in chosen:
        environment.build()
    print("exporting files", file=sys.stderr, flush=True)
    cases = export_files()
    outcomes = {}
    for environment in chosen:
        print(f"running {len(cases)} cases on {environment.name}", file=sys.stderr, flush=True)
        outcomes[environment] = run(environment, cases)
    text, faults = table(outcomes)
    print(text)
    for fault in faults:
        print(f"NOT AS IT SHOULD BE: {fault}")
    if not options.only:
        write_between(PAGE, "make lite-matrix", text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
