"""Pictures of the results, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from benchmarks._report import save_figure
from benchmarks.accuracy.summary import Cell

COLOURS = ("#1f4e9c", "#c0392b", "#3c8d5a", "#e08e2b", "#8e5aa8", "#7a7a7a")


def draw(network: str, cells: dict[str, Cell], asked: dict[str, Any], output: Path) -> dict[str, str]:
    """Draws what there is enough for; maps each file to the sentence below it.

    Args:
        network: its name, with which files begin.
        cells: its rows that were run.
        asked: for each picture, which rows make which line.
        output: folder to write to.
    """
    sentences = {}
    for kind, (drawn, sentence) in {
        "parameters": (_against_parameters, "Score on test against the parameters that are kept, the lower, the better."
         " Bars are standard errors."),
        "sparsity": (_against_sparsity, "Loss against the dense network, on test, as the share of zeros grows."),
        "course": (_over_steps, "Share of zeros in the recurrent layers while training."),
    }.items():  # fmt: skip
        lines = {label: [cells[row] for row in rows if row in cells] for label, rows in asked[kind].items()}
        lines = {label: found for label, found in lines.items() if len(found) > (kind != "course")}
        if lines:
            path = output / f"{network}-{kind}.svg"
            figure, axes = plt.subplots(figsize=(6.4, 4.0))
            axes.grid(alpha=0.25, which="both", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            drawn(axes, lines, cells["dense"])
            axes.legend(frameon=False, fontsize=8)
            save_figure(figure, path)
            plt.close(figure)
            sentences[path.name] = sentence
    return sentences


def _against_parameters(axes: Any, lines: dict[str, Sequence[Cell]], dense: Cell) -> None:
    for (label, found), colour in zip(lines.items(), COLOURS, strict=False):
        points = sorted((cell.mean("kept_parameters"), cell.score("test")) for cell in found)
        kept, scores = zip(*points, strict=True)
        axes.errorbar(
            kept, [s.mean for s in scores], [s.error if s.error == s.error else 0 for s in scores], fmt="o-", ms=4,
            color=colour, label=label, capsize=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters kept")
    axes.set_ylabel(dense.results[0]["unit"])


def _against_sparsity(axes: Any, lines: dict[str, Sequence[Cell]], dense: Cell) -> None:
    for (label, found), colour in zip(lines.items(), COLOURS, strict=False):
        points = sorted((100 * cell.mean("sparsity"), -100 * cell.gain(dense, "test").mean) for cell in found)
        axes.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=label)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel("zero, %")
    axes.set_ylabel("loss against dense, %")


def _over_steps(axes: Any, lines: dict[str, Sequence[Cell]], dense: Cell) -> None:
    for (label, (cell, *_)), colour in zip(lines.items(), COLOURS, strict=False):
        zeros = cell.results[0]["course"]["zeros"]
        axes.plot(
            [100 * (n + 1) / len(zeros) for n in range(len(zeros))], [100 * z for z in zeros], color=colour, label=label
        )
    axes.set_xlabel("of the training, %")
    axes.set_ylabel("zero, %")
