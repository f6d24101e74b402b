"""What pruning costs while a model trains: the time of a step, of a mask update, and of the import.

Each kind of training is a real `fit()` in a thread of its own. The threads take turns of some batches, so that kinds
are compared within the same second of the same process; only one of them runs at a time. The time of a batch is taken
around all callbacks. Batches on which masks move are told from the others, and count once in `frequency` batches. There
are several models of each kind, since where the buffers of a model happen to lie makes a difference of about 1 %.

    python -m benchmarks.training_cost --json training_cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import keras_blocksparse as kbs

STEP_BAR, IMPORT_BAR = 0.02, 0.3
INPUTS, CLASSES, WARM_UP = 64, 10, 6

#: What `prune_low_magnitude_block` is given beside the schedule, for each kind; `None` does not prune.
KINDS: dict[str, dict | None] = {
    "not pruned": None,
    "BP": {},
    "BP, revival=False": {"revival": False},
    "GLP": {"group_lasso": 1e-4},
}


class Turns:
    """Lets threads run one at a time, in order."""

    def __init__(self, count: int) -> None:
        self._condition = threading.Condition()
        self._waiting = list(range(count))

    def take(self, number: int) -> None:
        """Waits until it is the turn of `number`."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting[0] == number)

    def give(self, number: int, *, leave: bool = False) -> None:
        """Ends the turn of `number`, for good with `leave`."""
        with self._condition:
            self._waiting.remove(number)
            if not leave:
                self._waiting.append(number)
            self._condition.notify_all()


class Begin(keras.callbacks.Callback):
    """First in the list: waits for its turn, and starts the clock."""

    def __init__(self, turns: Turns, number: int) -> None:
        super().__init__()
        self.turns, self.number, self.start = turns, number, 0.0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Keras calls this."""
        self.turns.take(self.number)
        self.start = time.perf_counter()


class End(keras.callbacks.Callback):
    """Last in the list: stops the clock, and lets the next one run."""

    def __init__(self, begin: Begin, turn: int, done: Callable[[], None]) -> None:
        super().__init__()
        self.begin, self.turn, self.done, self.seconds = begin, turn, done, list[float]()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Keras calls this."""
        self.seconds.append(time.perf_counter() - self.begin.start)
        self.done()
        if len(self.seconds) % self.turn == 0:
            self.begin.turns.give(self.begin.number)


def build(options: argparse.Namespace) -> keras.Model:
    """The network of all kinds."""
    return keras.Sequential(
        [
            keras.Input((options.timesteps, INPUTS)),
            keras.layers.GRU(options.units, name="gru"),
            keras.layers.Dense(CLASSES, name="head"),
        ]
    )


def prune(model: keras.Model, steps: int, options: argparse.Namespace, arguments: dict) -> None:
    """Puts `model` under pruning to 90 %, so that masks move for the last time at the last step."""
    schedule = kbs.PolynomialDecay(
        final_sparsity=0.9, begin_step=options.frequency, end_step=steps, frequency=options.frequency
    )
    kbs.prune_low_magnitude_block(model, schedule, block_size=(16, 16), filters="gru", **arguments)


def measure_steps(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Seconds of each batch by kind, `(models, batches)`."""
    steps, kinds = WARM_UP + options.cycles * options.frequency, list(KINDS) * options.models
    random = np.random.default_rng(0)
    x = random.normal(size=(options.batch, options.timesteps, INPUTS)).astype("float32")
    y = random.integers(0, CLASSES, options.batch)
    data = tf.data.Dataset.from_tensors((x, y)).repeat(steps)

    total = steps * len(kinds)
    turns, done, ends, failures = Turns(len(kinds)), iter(range(1, total + 1)), [], []

    def tell() -> None:
        if (batch := next(done)) % len(kinds) == 0:
            print(f"\r{batch} of {total} batches", end="", file=sys.stderr, flush=True)

    def fit(number: int, model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        try:
            model.fit(data, verbose=0, callbacks=callbacks)
        except Exception as error:
            failures.append(error)
        turns.give(number, leave=True)

    threads = []
    for number, kind in enumerate(kinds):
        model, arguments = build(options), KINDS[kind]
        if arguments is not None:
            prune(model, steps, options, arguments)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        begin = Begin(turns, number)
        end = End(begin, options.turn, tell)
        pruning = [] if arguments is None else [kbs.UpdatePruningStep()]
        threads.append(threading.Thread(target=fit, args=(number, model, [begin, *pruning, end]), daemon=True))
        ends.append(end)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(file=sys.stderr)
    if failures:
        raise failures[0]
    return {kind: np.array([e.seconds for e, k in zip(ends, kinds, strict=True) if k == kind]) for kind in KINDS}


def costs(seconds: dict[str, np.ndarray], options: argparse.Namespace) -> list[dict]:
    """One row for each kind: a plain step, a mask update, and what both add to the step that is not pruned."""
    dense = seconds["not pruned"].mean(axis=0)
    plain = np.arange(len(dense)) >= WARM_UP
    updates = plain & (np.arange(1, len(dense) + 1) % options.frequency == 0)
    plain &= ~updates
    step = float(np.median(dense[plain]))
    rows, zero = [], 0.0
    for kind, times in seconds.items():
        extra = times - dense  # of batches that ran one after the other
        each = np.median(extra[:, plain], axis=1)
        zero = float(each.mean()) if KINDS[kind] is None else zero  # by how much a median lies below a mean
        each -= zero
        update = float(np.median(extra[:, updates]) - np.median(extra[:, plain])) if KINDS[kind] is not None else 0.0
        rows.append(
            {
                "kind": kind,
                "step_ms": 1e3 * float(np.median(times[:, plain])),
                "extra_each_step": float(each.mean()) / step,
                "extra_by_model": [float(e) / step for e in each],
                "update_ms": 1e3 * update,
                "cost": (float(each.mean()) + update / options.frequency) / step,
            }
        )
    return rows


def measure_update(options: argparse.Namespace, repeats: int = 15) -> float:
    """Median seconds of one mask update by itself."""
    model = build(options)
    prune(model, repeats * options.frequency, options, {})
    pruner = kbs.Pruner(model)
    seconds = []
    for number in range(1, repeats + 1):
        start = time.perf_counter()
        pruner.step(number * options.frequency)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_import(repeats: int) -> tuple[float, float, list[str]]:
    """Median seconds of `import keras`, of `import keras_blocksparse` after it, and the packages the latter loads."""
    code = (
        "import sys, time; t = [time.perf_counter()]\n"
        "import keras; t.append(time.perf_counter()); before = set(sys.modules)\n"
        "import keras_blocksparse; t.append(time.perf_counter())\n"
        "print(t[1] - t[0], t[2] - t[1], *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(repeats)
    ]
    medians = [statistics.median(float(run[index]) for run in runs) for index in (0, 1)]
    return medians[0], medians[1], sorted(runs[0][2:])


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_cost",
        description="What pruning costs while a model trains, against the same fit() without pruning.",
    )
    parser.add_argument("--units", type=int, default=512, help="of the GRU")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--frequency", type=int, default=100, help="steps between mask updates")
    parser.add_argument("--cycles", type=int, default=2, help="mask updates, and so many times FREQUENCY steps")
    parser.add_argument(
        "--turn",
        type=int,
        default=10,
        help="batches in a row of one model; with 1, each begins with caches full of the other models (default: 10)",
    )
    parser.add_argument("--models", type=int, default=3, help="of each kind")
    parser.add_argument("--imports", type=int, default=7, help="processes to time the import in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: --units 64 --cycles 1 --frequency 20 --models 1 --imports 1"
    )
    options = parser.parse_args()
    if options.quick:
        options.units, options.cycles, options.frequency, options.models, options.imports = 64, 1, 20, 1, 1
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"the directory of --json {options.json} does not exist")

    keras_seconds, import_seconds, packages = measure_import(options.imports)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update = measure_update(options)
        rows = costs(measure_steps(options), options)
    facts = {
        "cpu": processor(),
        "load_average": os.getloadavg()[1],  # of the last five minutes; 1 is this benchmark waiting for nobody
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "keras_blocksparse": kbs.__version__},
        "setting": {k: v for k, v in vars(options).items() if k != "json"},
        "training": rows,
        "update_alone_ms": 1e3 * update,
        "import": {"keras_s": keras_seconds, "keras_blocksparse_s": import_seconds, "packages": packages},
    }

    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['cpu']}, {facts['threads']} threads, load {facts['load_average']:.1f}; {versions}")
    batches = options.models * options.cycles * options.frequency
    print(
        f"GRU({options.units}), batch {options.batch}, T {options.timesteps}, {INPUTS} inputs, 16x16 blocks to 90 %, "
        f"masks move every {options.frequency} steps; medians of {batches} batches, {options.models} models of a kind"
    )
    print(f"{'':18}  {'step':>9}  {'more each step, and by model':>36}  {'mask update':>11}  {'cost':>7}")
    for row in rows:
        each = f"{row['extra_each_step']:+.2%} ({' '.join(f'{e:+.1%}' for e in row['extra_by_model'])})"
        print(
            f"{row['kind']:18}  {row['step_ms']:6.1f} ms  {each:>36}  {row['update_ms']:8.1f} ms  {row['cost']:+7.2%}"
        )
    worst = max(row["cost"] for row in rows if row["kind"].startswith("BP"))
    print(f"bar for block pruning: {STEP_BAR:.0%}, {'held' if worst <= STEP_BAR else 'NOT held'}")
    print(f"one mask update by itself: {1e3 * update:.1f} ms")
    verdict = "held" if import_seconds <= IMPORT_BAR else "NOT held"
    print(f"import keras {keras_seconds:.2f} s, then keras_blocksparse {1e3 * import_seconds:.0f} ms", end=" ")
    print(f"(bar {IMPORT_BAR} s, {verdict}); it loads {', '.join(packages)}")
    if options.json is not None:
        temporary = options.json.with_name(f".{options.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
