"""Size and latency of the networks that were trained, as files for devices, against the dense one of the same kind."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import console, processor
from benchmarks.accuracy import results
from benchmarks.accuracy.grid import FOLDER, RESULTS, Run
from benchmarks.accuracy.running import MODEL, WORK, folder_of, has_model

DEVICE = FOLDER / "device.jsonl"
#: Time steps of the inference that is timed: two seconds of speech, as many characters.
STEPS = 200
REPEATS = 5


def measure(runs: Sequence[Run], work: Path = WORK, path: Path = DEVICE, results_path: Path = RESULTS) -> None:
    """Adds a line to `device.jsonl` for each row that has none yet, by the first seed whose model is at hand.

    Raises:
        SystemExit: no model is there at all.
    """
    done = results.of_runs(runs, results.load(results_path))
    measured = set(of_rows(runs, path))
    here = [run for run in runs if run.name in done and has_model(run, work)]
    if not here:
        raise SystemExit(f"There is no trained model in {work}: python -m benchmarks.accuracy run")
    for run in here:
        if (run.network, run.row) in measured:
            continue
        measured.add((run.network, run.row))
        line = _measured(folder_of(run.name, work) / MODEL)
        line |= {"run": run.name, "arguments": run.arguments, "others": results.others(run, runs), "cpu": processor()}
        with path.open("a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        fast = line["fast"]["latency_ms"]
        console.print(
            f"{run.name}: {line['stock']['bytes']:,} bytes stock, {line['fast']['bytes']:,} fast; "
            + ", ".join(f"{name} {ms:.2f} ms" for name, ms in fast.items()),
            soft_wrap=True,
        )


def keep_masks(runs: Sequence[Run], rows: Sequence[str], output: Path, work: Path = WORK) -> None:
    """Copies the pictures of the masks that trainings of these rows have left, of the first seed that is at hand.

    Args:
        runs: what to look at.
        rows: of the grid.
        output: folder for `<network>-masks.png`.
        work: where models are.
    """
    copied = set()
    for run in runs:
        picture = folder_of(run.name, work) / "masks.png"
        if run.row in rows and run.network not in copied and has_model(run, work) and picture.exists():
            copied.add(run.network)
            output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, output / f"{run.network}-masks.png")


def of_rows(runs: Sequence[Run], path: Path = DEVICE) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured of each row, by network and row. A model trained with other options has other sizes."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = results.of_runs(runs, lines)
    return {(run.network, run.row): found[run.name] for run in runs if run.name in found}


def _measured(model_path: Path) -> dict[str, Any]:
    import keras

    import keras_blocksparse as kbs

    model = keras.saving.load_model(model_path, compile=False)
    line: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in ("stock", "fast"):
            reports = [
                kbs.export_tflite(model, Path(folder) / "model.tflite", target=target, timesteps=STEPS)
                for _ in range(REPEATS)
            ]
            line[target] = {
                "bytes": reports[0].bytes,
                "bytes_dense": reports[0].bytes_dense,
                **{
                    key: {
                        name: statistics.median(getattr(report, key)[name] for report in reports)
                        for name in getattr(reports[0], key)
                    }
                    for key in ("latency_ms", "latency_dense_ms")
                },
                "runtimes": reports[0].runtimes,
            }
    return line
