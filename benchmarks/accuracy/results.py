"""The results file: one JSON line for each training that was done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.grid import RESULTS, Run


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    """All that were written, the oldest first.

    Raises:
        SystemExit: a line is none of ours.
    """
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            assert {"run", "arguments", "others", "scores"} <= set(result)
        except (ValueError, TypeError, AssertionError) as error:
            raise SystemExit(f"{path}:{number} is no result of a run. Restore the file from git.") from error
        results.append(result)
    return results


def append(result: dict[str, Any], path: Path = RESULTS) -> None:
    """Adds a line."""
    with path.open("a") as file:
        file.write(json.dumps(result, sort_keys=True) + "\n")


def others(run: Run, runs: Sequence[Run]) -> dict[str, list[str]]:
    """The options of the runs that a run is made of, by their names."""
    return {other.name: other.arguments for other in runs if other.name in run.others}


def of_runs(runs: Sequence[Run], results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The latest result of each run, by its name, without what was done with other options than the grid has now."""
    wanted = {run.name: (run.arguments, others(run, runs)) for run in runs}
    return {
        result["run"]: result
        for result in results
        if (result["arguments"], result["others"]) == wanted.get(result["run"])
    }
