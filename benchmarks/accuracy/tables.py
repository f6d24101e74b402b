"""Pages in docs/results: a table for each network and question, the project's bars, pictures."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import Bar, Table, bars_table, console, page, write, write_between
from benchmarks.accuracy import device, pictures, results
from benchmarks.accuracy.grid import GRID, Run
from benchmarks.accuracy.summary import Cell, cells

COMMAND = (
    "python -m benchmarks.accuracy run     # trains what has no result yet\n    python -m benchmarks.accuracy tables"
)
LEAD = """\
Every line is the mean over seeds and, where there is more than one, its standard error. *Relative* is the paper's
figure, (dense - this) / dense of the score, of the seeds that both were run with: negative is worse than dense.
*Kept* counts what is not pruned away, of all parameters; *zero* is the share of zeros in the recurrent layers, which
are what is pruned. Settings were chosen on dev; test was scored for this page. Files are float32; latencies are those
of 200 time steps on one thread, stock files on the quickest stock runtime, fast ones with the delegate: how many times
smaller and quicker than the dense network's stock file is."""


def write_pages(runs: Sequence[Run], output: Path, grid: Path = GRID, results_path: Path = results.RESULTS) -> None:
    """Writes a page for each network that has results, and where all of them stand into `index.md`.

    Args:
        runs: what the grid holds.
        output: folder for pages and pictures.
        grid: the grid's file, which says which tables and bars there are.
        results_path: results file.

    Raises:
        SystemExit: there is no result at all, or `index.md` has no place for where they stand.
    """
    found = results.of_runs(runs, results.load(results_path))
    if not found:
        raise SystemExit(f"There are no results in {results_path}: python -m benchmarks.accuracy run")
    content = tomllib.loads(grid.read_text())
    gathered = cells(runs, found)
    measured = device.of_rows(runs)
    wanted: dict[tuple[str, str], int] = {}
    for run in runs:
        wanted[run.network, run.row] = wanted.get((run.network, run.row), 0) + 1
    stand: dict[str, tuple[str, list[Bar]]] = {}
    for network, facts in content["networks"].items():
        of_network = {row: cell for (name, row), cell in gathered.items() if name == network}
        if "dense" not in of_network:
            continue
        asked = [row for (name, row) in wanted if name == network]
        of_bars = bars(of_network, content["bars"], network)
        tables = [bars_table(of_bars, "Bars")]
        for table in content["tables"]:
            rows = [row for row in table["rows"] if row in asked]
            if len(rows) > 1 and network in table.get("networks", [network]):
                tables.append(_table(table, rows, of_network, network, measured))
        shown = pictures.draw(network, of_network, content["pictures"], output)
        if (masks := output / f"{network}-masks.png").exists():
            shown[masks.name] = f"The blocks that are kept, of {' and '.join(content['pictures']['masks'])}."
        first = next(iter(of_network["dense"].results))
        done = sum(len(cell.results) for cell in of_network.values())
        total = sum(count for (name, _), count in wanted.items() if name == network)
        line = f"{done} of {total} runs are done. Trained on one core of {_names(of_network, 'cpu')}, " + ", ".join(
            f"{name} {version}" for name, version in first["versions"].items()
        )
        text = page(facts["title"], COMMAND, f"{facts['lead'].strip()}\n\n{LEAD}", line, tables, shown)
        write(output / f"{network}.md", text)
        console.print(f"{output / network}.md: {done} of {total} runs")
        stand[f"[{facts['title']}]({network}.md)"] = f"{done} of {total}", of_bars
    write_between(output / "index.md", "python -m benchmarks.accuracy tables", overview(stand).markdown().strip())


def overview(stand: dict[str, tuple[str, list[Bar]]]) -> Table:
    """All networks in one table: how many runs are done, and what became of the bars.

    Args:
        stand: of each network, how many are done and its bars.
    """
    made = Table("Where it stands", ["", *stand])
    made.rows.append(["runs done", *(done for done, _ in stand.values())])
    for work in dict.fromkeys(bar.work for _, of_bars in stand.values() for bar in of_bars):
        row = [work]
        for _, of_bars in stand.values():
            bar = next((bar for bar in of_bars if bar.work == work), None)
            if bar is None:
                row.append("")
            elif bar.measured is None:
                row.append("not measured")
            else:
                _, asked, _, detail, verdict = bar.row()
                row.append(f"{detail}; {asked}: **{verdict.partition(',')[0]}**")
        made.rows.append(row)
    return made


def bars(of_network: dict[str, Cell], asked: Sequence[dict[str, Any]], network: str) -> list[Bar]:
    """The project's bars for a network, as far as its rows were run."""
    made = []
    for bar in asked:
        if network not in bar["networks"]:
            continue
        row, against = (of_network.get(bar[key]) for key in ("row", "against"))
        gain, detail = None, ""
        if row is not None and against is not None:
            gain = row.gain(against, "test")
            detail = f"{gain.percent()}, {_seeds(row.with_seeds(row.seeds & against.seeds or row.seeds))}"
        kind, bound = next((key, value) for key, value in bar.items() if key.endswith(("_at_least", "_at_most")))
        what, _, side = kind.partition("_")
        measured = None if gain is None else gain.mean if what == "gain" else -gain.mean
        at_most, text = side == "at_most", what + " {}"
        why = f" ({bar['why']})" if "why" in bar else ""
        work, error = f"{bar['row']} against {bar['against']}{why}", 0.0 if gain is None else gain.error
        made.append(Bar(work, text, bound, measured, detail, at_most, "%", error))
    return made


def _table(
    table: dict[str, Any],
    rows: Sequence[str],
    of_network: dict[str, Cell],
    network: str,
    measured: dict[tuple[str, str], Any],
) -> Table:
    dense = of_network["dense"]
    split = table.get("split", "test")
    unit = dense.results[0]["unit"]
    columns = ["", "parameters", "kept", "zero", f"{unit}, {split}", "relative"]
    if with_device := table.get("device", True):
        columns += ["stock file", "its latency", "fast file", "its latency"]
    made = Table(table["title"], columns, note=table.get("note", "").strip())
    base = measured.get((network, "dense"))
    for row in rows:
        cell = of_network.get(row)
        if cell is None:
            made.rows.append([row, *["not run yet"], *["-"] * (len(columns) - 2)])
            continue
        relative = "0" if row == "dense" else cell.gain(dense, split).percent()
        made.rows.append(
            [
                f"{row} ({_seeds(cell)})", _count(cell.mean("parameters")), _count(cell.mean("kept_parameters")),
                f"{100 * cell.mean('sparsity'):.1f} %", cell.score(split).text(4), relative,
                *(_device(measured.get((network, row)), base) if with_device else ()),
            ]
        )  # fmt: skip
    return made


def _device(line: dict[str, Any] | None, base: dict[str, Any] | None) -> list[str]:
    """Sizes of both files, the fast one with the delegate, and how far below the dense stock file's; latencies, too.

    A line that was measured in turns with a dense network is compared with that; milliseconds of different days are
    not comparable, so only the dense network's are shown.
    """
    if line is None:
        return ["-"] * 4
    base = line.get("dense", base)
    figures = []
    for target in ("stock", "fast"):
        kibibytes, ms = _size_and_time(line, target)
        if base is None:
            figures += [f"{kibibytes:,.0f} KiB", f"{ms:.2f} ms"]
            continue
        base_kibibytes, base_ms = _size_and_time(base, "stock")
        times = f"{base_ms / ms:.1f}x"
        figures += [
            f"{kibibytes:,.0f} KiB ({base_kibibytes / kibibytes:.1f}x)",
            f"{ms:.2f} ms ({times})" if line is base else times,
        ]
    return figures


def _size_and_time(line: dict[str, Any], target: str) -> tuple[float, float]:
    """KiB, and milliseconds on the quickest runtime that runs the file as it is meant to be run."""
    delegated = target == "fast"
    found = line[target]
    times = [ms for name, ms in found["latency_ms"].items() if name.endswith("with delegate") == delegated]
    return found["bytes"] / 1024, min(times)


def _names(of_network: dict[str, Cell], key: str) -> str:
    return " and ".join(sorted({result[key] for cell in of_network.values() for result in cell.results}))


def _seeds(cell: Cell) -> str:
    count = len(cell.results)
    return f"{count} seed{'s' if count > 1 else ''}"


def _count(number: float) -> str:
    return f"{number / 1000:,.0f} k"
