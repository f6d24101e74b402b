"""Size and latency of the networks that were trained, as files for devices, against the dense one of the same kind."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks._report import console, processor
from benchmarks.accuracy import results
from benchmarks.accuracy.grid import FOLDER, RESULTS, Run
from benchmarks.accuracy.running import MODEL, WORK, folder_of, has_model

DEVICE = FOLDER / "device.jsonl"
#: Time steps of the inference that is timed: two seconds of speech, as many characters.
STEPS = 200
REPEATS = 5


def measure(
    runs: Sequence[Run],
    grid: Sequence[Run],
    work: Path = WORK,
    path: Path = DEVICE,
    results_path: Path = RESULTS,
) -> None:
    """Adds a line to `device.jsonl` for each row that has none yet, by the first seed whose model is at hand.

    A network's rows are measured in turns with its dense one, whose figures are kept beside theirs: a machine that is
    slower on another day is slower for both.

    Args:
        runs: whose rows to measure.
        grid: all there are, for the dense networks.
        work: where models are.
        path: of the lines.
        results_path: of the trainings.

    Raises:
        SystemExit: no model is there at all.
    """
    done = results.of_runs(grid, results.load(results_path))
    measured = of_rows(grid, path)
    here: dict[tuple[str, str], Run] = {}
    for run in grid:
        if run.name in done and has_model(run, work):
            here.setdefault((run.network, run.row), run)
    if not here:
        raise SystemExit(f"There is no trained model in {work}: python -m benchmarks.accuracy run")
    for network in dict.fromkeys(network for network, _ in here):
        asked = {(run.network, run.row) for run in runs if run.network == network}
        missing = [run for key, run in here.items() if key in asked and key not in measured]
        dense = here.get((network, "dense"))
        if not missing:
            continue
        if dense is None:
            names = ", ".join(run.name for run in missing)
            console.print(f"{names}: not measured, for no dense network to compare with is in {work}.", soft_wrap=True)
            continue
        others = [run for run in missing if run is not dense]
        base, *figures = _measured([folder_of(run.name, work) / MODEL for run in (dense, *others)])
        found = [(dense, base)] if dense in missing else []
        found += [(run, figure | {"dense": base}) for run, figure in zip(others, figures, strict=True)]
        for run, line in found:
            about = {"run": run.name, "arguments": run.arguments, "others": results.others(run, grid)}
            with path.open("a") as file:
                file.write(json.dumps(line | about | {"cpu": processor()}, sort_keys=True) + "\n")
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


def _measured(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Size and latency of the files of each model, medians over rounds in which all have their turn."""
    import keras

    import keras_blocksparse as kbs

    models = [keras.saving.load_model(path, compile=False) for path in paths]
    targets = ("stock", "fast")
    reports: dict[tuple[int, str], list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(REPEATS), "Measuring in turns", console=console):
            for number, model in enumerate(models):
                for target in targets:
                    report = kbs.export_tflite(model, Path(folder) / "model.tflite", target=target, timesteps=STEPS)
                    reports.setdefault((number, target), []).append(report)
    return [{target: _medians(reports[number, target]) for target in targets} for number in range(len(models))]


def _medians(reports: Sequence[Any]) -> dict[str, Any]:
    first = reports[0]
    latencies = {
        key: {name: statistics.median(getattr(report, key)[name] for report in reports) for name in getattr(first, key)}
        for key in ("latency_ms", "latency_dense_ms")
    }
    return {"bytes": first.bytes, "bytes_dense": first.bytes_dense, "runtimes": first.runtimes, **latencies}
