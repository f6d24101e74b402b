"""What the benchmarks print and write: the machine, tables, bars and pictures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.table

console = rich.console.Console(width=None if rich.console.Console().is_terminal else 150, highlight=False)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_cache_bytes() -> int:
    """Size of the largest cache, 32 MiB if the machine does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(path.read_text().strip().removesuffix("K")) for path in sizes), default=32 << 20)


def machine(isa: str, packages: Iterable[str]) -> str:
    """One line on the processor and the versions, to stand beside every figure."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(packages), key=str.lower))
    return (
        f"{processor()}, {cores()} cores, load {os.getloadavg()[0]:.1f} before the run, libkbs on {isa}; "
        f"Python {platform.python_version()}, {versions}"
    )


def time_text(seconds: float) -> str:
    """Three digits: 152 us, 9.21 ms."""
    units = (("us", 1e6), ("ms", 1e3), ("s", 1.0))
    value, unit = next((seconds * scale, unit) for unit, scale in units if seconds * scale < 999.5 or unit == "s")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


@dataclasses.dataclass
class Table:
    """Rows of text below a caption; the first column is a name, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = dataclasses.field(default_factory=list)
    note: str = ""

    def show(self) -> None:
        """On the terminal."""
        table = rich.table.Table(
            title=self.title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        if self.note:
            console.print(self.note + "\n")

    def markdown(self) -> str:
        """As a section of a page."""
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|---" + "|---:" * (len(self.columns) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return f"## {self.title}\n\n" + "\n".join(lines) + (f"\n\n{self.note}" if self.note else "") + "\n"


@dataclasses.dataclass
class Bar:
    """One bar of the project and what was measured: a ratio that must not fall below, or rise above, its bound."""

    work: str
    text: str  #: the bar in words, with `{}` where the bound stands
    bound: float
    measured: float | None  #: None: nothing to compare with was there
    detail: str = ""  #: both times
    at_most: bool = False
    unit: str = "x"
    error: float = 0.0  #: standard error of what was measured, if it is known

    @property
    def met(self) -> bool | None:
        """Whether it holds; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def format(self, value: float) -> str:
        """With its unit."""
        if self.unit == "%":
            return f"{100 * value:.3g}%"
        return f"{value:.3g}{self.unit}" if self.unit in ("x", "") else f"{value:.3g} {self.unit}"

    def row(self) -> tuple[str, ...]:
        """For the table of bars."""
        sign = "<=" if self.at_most else ">="
        bar = self.text.format(f"{sign} {self.format(self.bound)}")
        if self.measured is None:
            return self.work, bar, "not measured", self.detail, "-"
        # Two figures that count, without an exponent; of a bound of nothing there is no share.
        off = f", {float(f'{100 * self.shortfall():.2g}'):g}% off" if self.bound else ""
        unsure = " within its error" if abs(self.measured - self.bound) < self.error else ""
        verdict = f"met{unsure}" if self.met else f"MISSED{unsure}{off}"
        return self.work, bar, self.format(self.measured), self.detail, verdict

    def shortfall(self) -> float:
        """How far off a missed bar is, as a share of it."""
        return abs((self.measured or 0) / self.bound - 1)


def bars_table(bars: Iterable[Bar], title: str = "Bars") -> Table:
    """Bar, measured, met or missed."""
    return Table(title, ("work", "bar", "measured", "times", "verdict"), [bar.row() for bar in bars])


def page(
    title: str, command: str, lead: str, machine_line: str, tables: Sequence[Table], pictures: dict[str, str]
) -> str:
    """A page of the documentation. `pictures` maps a file to the sentence below it."""
    head = f"# {title}\n\n<!-- Written by this command. -->\n\n    {command}\n\n{lead}\n\n{machine_line}.\n"
    shown = [f"![{Path(name).stem.replace('_', ' ')}]({name})\n\n{text}\n" for name, text in pictures.items()]
    sections = [table.markdown() for table in tables]
    return "\n".join([head, *sections[:1], *(["## Pictures\n", *shown] if shown else []), *sections[1:]])


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_between(path: Path, command: str, text: str) -> None:
    """Writes what a command has to say into a page, between the marks that are there for it.

    Raises:
        SystemExit: the page does not have both marks once.
    """
    begin, end = f"<!-- written by {command}: begin -->", "<!-- end -->"
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in after or end in after:
        raise SystemExit(f"{path} should have the lines {begin} and {end}, once each, around what is written there.")
    write(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def save_figure(figure: object, path: Path) -> None:
    """Writes a picture whole or not at all, the same bytes for the same figures."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with mpl.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "path"}):
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})  # type: ignore[attr-defined]
    os.replace(temporary, path)
