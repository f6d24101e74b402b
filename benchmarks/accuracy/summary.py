"""What a row of the grid came to: mean and standard error over seeds, and both against the dense network's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.grid import Run


@dataclass(frozen=True)
class Figure:
    """A mean over seeds.

    Attributes:
        mean: of the runs.
        error: standard error of the mean; NaN for a single run.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The figure of some runs."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def text(self, digits: int) -> str:
        """As in "0.152 ± 0.003"."""
        spread = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def percent(self) -> str:
        """As in "-8.8 ± 0.5 %"."""
        spread = "" if math.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return f"{round(100 * self.mean, 1) + 0.0:+.1f}{spread} %"  # + 0.0: no "-0.0"


@dataclass(frozen=True)
class Cell:
    """A row of the grid for one network.

    Attributes:
        network: its name.
        row: the row's.
        results: lines of the results file, one for each seed that was run.
    """

    network: str
    row: str
    results: list[dict[str, Any]]

    def score(self, split: str) -> Figure:
        """Errors or bits: the smaller, the better."""
        return Figure.of([result["scores"][split] for result in self.results])

    @property
    def seeds(self) -> set[str]:
        """With which it was run."""
        return {_seed(result) for result in self.results}

    def with_seeds(self, seeds: set[str]) -> Cell:
        """The same row, without the runs with other seeds."""
        return Cell(self.network, self.row, [result for result in self.results if _seed(result) in seeds])

    def mean(self, key: str) -> float:
        """Of a count or share in the results."""
        return statistics.fmean(result[key] for result in self.results)

    def gain(self, dense: Cell, split: str) -> Figure:
        """The paper's relative figure, (dense - this) / dense; its error is made of those of both.

        Of the seeds that both were run with, if there are any: others would move the figure by which seeds they are.
        """
        common = self.seeds & dense.seeds
        ours, theirs = (cell.with_seeds(common or cell.seeds).score(split) for cell in (self, dense))
        ratio = ours.mean / theirs.mean
        return Figure(1 - ratio, ratio * math.hypot(ours.error / ours.mean, theirs.error / theirs.mean))


def _seed(result: dict[str, Any]) -> str:
    return result["run"].rpartition("/")[2]


def cells(runs: Sequence[Run], found: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Cell]:
    """Those of which at least one seed was run, by network and row."""
    gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.name in found:
            gathered.setdefault((run.network, run.row), []).append(found[run.name])
    return {key: Cell(*key, results) for key, results in gathered.items()}
