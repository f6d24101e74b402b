"""Does the runs that have no result yet, side by side, each on a core of its own."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks._report import console, processor
from benchmarks.accuracy import results
from benchmarks.accuracy.grid import RESULTS, Run

WORK = Path("build/accuracy")
MODEL, MADE_BY = "model.keras", "arguments.json"
#: What each training is told beside the grid's options. Two with a thread each do more than one with two.
ALWAYS = ("--threads", "1", "--no-export", "--evaluate", "test")
#: TensorFlow gives back the memory of each step, and glibc by default returns it to the system, which then clears it
#: page by page: a quarter of a training's time on virtual machines. One heap that is never cut back; no digit differs.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1",
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40),
}  # fmt: skip
#: What of a program's result.json is kept.
KEPT = ("scores", "unit", "parameters", "kept_parameters", "sparsity", "sparsity_by_weight", "course", "versions")


@dataclass
class Runner:
    """Runs side by side, and what became of them.

    Attributes:
        runs: what the grid holds, or a part of it.
        workers: how many at a time.
        work: folder for models, logs and unfinished trainings.
        path: results file.
        execute: runs a command line with output to a file, on a core, and returns its exit code.
    """

    runs: list[Run]
    workers: int = 2
    work: Path = WORK
    path: Path = RESULTS
    execute: Callable[[list[str], Path, int, int], int] = field(default_factory=lambda: execute)
    failed: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Does what is missing, until nothing is left that can be done.

        Raises:
            SystemExit: another process is at it, or a run failed.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SystemExit(f"Another process is running the grid in {self.work}.") from error
            self._lock = lock.fileno()
            self._go()
        if self.failed:
            raise SystemExit(f"{len(self.failed)} failed: {', '.join(self.failed)}. Logs are in {self.work}.")

    def _go(self) -> None:
        done = results.of_runs(self.runs, results.load(self.path))
        missing = [run for run in self.runs if run.name not in done]
        # A result is kept, a model is not: on another machine, what others begin with or learn from is trained again.
        # If it comes out otherwise, its new result counts: it is what the others were taught by.
        needed = {other for run in missing for other in run.others} - {run.name for run in missing}
        again = [run for run in self.runs if run.name in needed and not has_model(run, self.work)]
        waiting = [run for run in self.runs if run in missing or run in again]
        more = f", and {len(again)} to do again for their models" if again else ""
        console.print(f"{len(done)} of {len(self.runs)} runs are done; {len(missing)} to do{more}.")
        self._known = {name: result["scores"] for name, result in done.items()}
        self._models = {run.name for run in self.runs if run not in waiting and has_model(run, self.work)}
        cores: queue.Queue[int] = queue.Queue()
        for core in sorted(os.sched_getaffinity(0))[: self.workers]:
            cores.put(core)
        finished: queue.Queue[tuple[Run, int]] = queue.Queue()
        busy = 0
        while True:
            # In the grid's order, but for those whose dense network is still being trained.
            ready = [run for run in waiting if run.others <= self._models]
            while ready and not cores.empty():
                run, core = ready.pop(0), cores.get()
                waiting.remove(run)
                busy += 1
                threading.Thread(target=lambda r=run, c=core: finished.put((r, self._train(r, c))), daemon=True).start()
            if not busy:
                self.failed += [run.name for run in waiting]
                return
            run, core = finished.get()
            cores.put(core)
            busy -= 1

    def _train(self, run: Run, core: int) -> int:
        folder = folder_of(run.name, self.work)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MADE_BY).unlink(missing_ok=True)
        words = [str(folder_of(word[1:], self.work) / MODEL) if word[:1] == "@" else word for word in run.arguments]
        command = [sys.executable, "-m", run.program, *words, *ALWAYS, "--output", str(folder)]
        start = time.perf_counter()
        code = self.execute(command, folder / "log.txt", core, self._lock)
        minutes = (time.perf_counter() - start) / 60
        try:
            if code:
                raise ValueError(f"exit code {code}; see {folder / 'log.txt'}")
            found = json.loads((folder / "result.json").read_text())
            result = {key: found[key] for key in KEPT}
            (folder / MADE_BY).write_text(json.dumps(run.arguments))
        except (OSError, ValueError, KeyError) as error:
            console.print(f"FAILED  {run.name}: {error}", soft_wrap=True)
            self.failed.append(run.name)
            return core
        self._models.add(run.name)
        if self._known.get(run.name) == found["scores"]:
            console.print(f"{run.name}: trained again, the same; {minutes:.1f} minutes", soft_wrap=True)
            return core
        result |= {
            "run": run.name, "arguments": run.arguments, "others": results.others(run, self.runs),
            "commit": _commit(), "cpu": processor(),
        }  # fmt: skip
        results.append(result, self.path)
        scores = ", ".join(f"{split} {score:.4f}" for split, score in found["scores"].items())
        console.print(f"{run.name}: {scores}, {found['sparsity']:.1%} zero, {minutes:.1f} minutes", soft_wrap=True)
        return core


def has_model(run: Run, work: Path = WORK) -> bool:
    """Whether the model is at hand that a run leaves, with the options that it has now."""
    made_by = folder_of(run.name, work) / MADE_BY
    return made_by.exists() and json.loads(made_by.read_text()) == run.arguments


def folder_of(name: str, work: Path = WORK) -> Path:
    """Where the run of that name leaves its files."""
    return work / name.replace(" ", "_")


def execute(command: list[str], log: Path, core: int, lock: int) -> int:
    """Runs a command on one core. It holds the lock, too: nobody does its work again while it is still alive."""
    if taskset := shutil.which("taskset"):
        command = [taskset, "--cpu-list", str(core), *command]
    with log.open("w") as file:
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, pass_fds=(lock,), check=False
        ).returncode


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "keras_blocksparse", "examples")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
