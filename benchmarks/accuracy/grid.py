"""The grid of trainings as `grid.toml` lists it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
GRID, RESULTS = FOLDER / "grid.toml", FOLDER / "results.jsonl"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: what is trained, a name in the grid.
        row: how it is made sparse, a name in the grid.
        seed: of the training.
        program: module to run.
        options: its options on the command line, without the dashes. "@" and a run's name is the model of that run.
    """

    network: str
    row: str
    seed: int
    program: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Network, row and seed."""
        return f"{self.network}/{self.row}/{self.seed}"

    @property
    def others(self) -> set[str]:
        """Names of the runs whose models it needs."""
        return {word[1:] for value in self.options.values() for word in _words(value) if word.startswith("@")}

    @property
    def arguments(self) -> list[str]:
        """The options as a command line has them."""
        words = []
        for option, value in self.options.items():
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *_words(value)]
        return [*words, "--seed", str(self.seed)]


def load(path: Path = GRID) -> list[Run]:
    """The runs, all with the first seed before any with the second, in the order of the file otherwise.

    A row's options are laid over its network's, and over those of the row that it is `like`. "$name" stands for the
    value of that name among the network's `values`; a row of which a network has not all is not for this network, while
    "$name?" leaves out the option alone. "@row" stands for the model of that row with the same network and seed,
    "@row/1" for that with seed 1. A network may want fewer `seeds` than rows.

    Raises:
        ValueError: the file names a network or row that it does not have.
    """
    grid = tomllib.loads(path.read_text())
    networks = grid["networks"]
    runs = []
    rows: dict[str, dict[str, Any]] = {}
    for row in grid["rows"]:
        if "like" in row:
            if row["like"] not in rows:
                raise ValueError(f"{path}: row {row['name']!r} is like {row['like']!r}, which is no row before it")
            like = rows[row["like"]]
            row = {**like, **row, "options": {**like["options"], **row.get("options", {})}}
        rows[row["name"]] = row
        if unknown := set(row.get("networks", ())) - set(networks):
            raise ValueError(f"{path}: row {row['name']!r} is for {sorted(unknown)}, which are no networks of it")
        for name in row.get("networks", networks):
            network = networks[name]
            options, values = {**network["options"], **row["options"]}, network.get("values", {})
            for seed in range(min(row["seeds"], network.get("seeds", row["seeds"]))):
                filled = {
                    key: _filled(value, name, values, seed)
                    for key, value in options.items()
                    if not _left_out(value, values)
                }
                if None not in filled.values():
                    runs.append(Run(name, row["name"], seed, network["program"], filled))
    names = [run.name for run in runs]
    for run in runs:
        for other in run.others:
            if other not in names:
                raise ValueError(f"{path}: {run.name} needs {other}, which is no run of it")
        if names.count(run.name) > 1:
            raise ValueError(f"{path}: {run.name} is there twice")
    return sorted(runs, key=lambda run: run.seed)


def pick(runs: list[Run], only: str | None) -> list[Run]:
    """Those whose name has the regular expression `only`, and what they need.

    Raises:
        SystemExit: there is none.
    """
    if only is None:
        return runs
    picked = {run.name: run for run in runs if re.search(only, run.name)}
    if not picked:
        raise SystemExit(f"No run's name has {only!r}. Names are network/row/seed, such as {runs[0].name}")
    needed = {other for run in picked.values() for other in run.others}
    return [run for run in runs if run.name in picked or run.name in needed]


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def _left_out(value: Any, values: dict[str, Any]) -> bool:
    return isinstance(value, str) and value.startswith("$") and value.endswith("?") and value[1:-1] not in values


def _filled(value: Any, network: str, values: dict[str, Any], seed: int) -> Any:
    if isinstance(value, str) and value.startswith("$"):
        return values.get(value[1:].removesuffix("?"))
    if isinstance(value, str) and value.startswith("@"):
        return f"@{network}/{value[1:]}" if re.search(r"/\d+$", value) else f"@{network}/{value[1:]}/{seed}"
    if isinstance(value, list):
        return [_filled(item, network, values, seed) for item in value]
    return value
