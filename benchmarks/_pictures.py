"""Pictures of what kernels.py and layers.py measured, as SVG."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks._products import BATCHES, BLOCKS, COLS, PEER_BATCHES, ROWS, SPARSITIES, Bench, Case, block_text
from benchmarks._report import save_figure

#: Ours by dtype, and peers, each always in the same colour.
OURS = {"float32": "#1f4e9c", "bfloat16": "#4f8fd6", "int8": "#8fc1f0"}
PEERS = ("#c0392b", "#e08e2b", "#7a7a7a", "#8e5aa8", "#3c8d5a", "#b8860b")
SIZE = (6.4, 4.0)


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=SIZE)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Any, path: Path, legend: bool = True) -> None:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
    if legend:
        figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)
    plt.close(figure)


def kernel_pictures(bench: Bench, folder: Path) -> dict[str, str]:
    """Writes those of kernels.py; maps each file to the sentence below it."""
    _against_sparsity(bench, folder / "sparsity.svg")
    _against_block_size(bench, folder / "block_size.svg")
    _against_batch(bench, folder / "batch.svg")
    _roofline(bench, folder / "roofline.svg")
    return {
        "sparsity.svg": "Time against the share of zeros, 16x16 blocks, batch 1. Ours in float32, a read of as many "
        "bytes, the other block-sparse products, and the quickest dense one, which does not care.",
        "block_size.svg": "Time against block size (inputs x outputs), 90 % zero, batch 1; nothing is drawn where a "
        "library does not take the shape.",
        "batch.svg": "Time against batch, 90 % zero. Ours, the other block-sparse products, and the quickest dense.",
        "roofline.svg": "Roofline of one core: useful GFLOP/s against useful operations for each byte of weights read. "
        "Lines are what the machine was measured to do in the same run: the read of a buffer as large as the weights, "
        "and multiply-adds in registers. Each chain of points is one block size at batches 1 to 32.",
    }


def _against_sparsity(bench: Bench, path: Path) -> None:
    figure, axes = _axes("zero, %", "time, us")
    names = [peer.name for peer in bench.peers if peer.kind == "block-sparse"]
    for name, colour, style in [
        ("ours", OURS["float32"], "o-"),
        ("read", "black", ":"),
        *zip(names, PEERS, ["o-"] * len(names), strict=False),
    ]:
        found = [(100 * s, 1e6 * t) for s in SPARSITIES if (t := bench.seconds.get(Case(name, sparsity=s)))]
        if found:
            axes.plot(
                *zip(*found, strict=True),
                style,
                color=colour,
                label="read of as many bytes" if name == "read" else name,
            )
    if best := bench.best(["dense"], 1):
        axes.axhline(1e6 * best[1], color=PEERS[2], linestyle="--", label=best[0])
    axes.set_yscale("log")
    _finish(figure, path)


def _against_block_size(bench: Bench, path: Path) -> None:
    figure, axes = _axes("block, inputs x outputs", "time, us")
    blocks = sorted(BLOCKS, key=lambda block: (block[0] * block[1], block))
    names = [peer.name for peer in bench.peers if peer.kind == "block-sparse"]
    kinds: list[tuple[str, str, str]] = [("ours", dtype, colour) for dtype, colour in OURS.items()]
    kinds += [(name, "float32", colour) for name, colour in zip(names, PEERS, strict=False)]
    width, shown = 0.8 / len(kinds), []
    for number, (name, dtype, colour) in enumerate(kinds):
        times = [bench.seconds.get(Case(name, block=block, dtype=dtype)) for block in blocks]
        bars = {place + (number - len(kinds) / 2 + 0.5) * width: 1e6 * t for place, t in enumerate(times) if t}
        axes.bar(bars.keys(), bars.values(), width, color=colour, label=f"ours, {dtype}" if name == "ours" else name)
        shown += bars.values()
    axes.set_xticks(range(len(blocks)), [block_text(block) for block in blocks])
    axes.set_yscale("log")
    axes.set_ylim(0.5 * min(shown), 2 * max(shown))
    _finish(figure, path)


def _against_batch(bench: Bench, path: Path) -> None:
    figure, axes = _axes("batch", "time, us")
    for block, style in (((16, 16), "o-"), ((4, 4), "^--")):
        for dtype in ("float32", "int8"):
            times = [1e6 * bench[Case("ours", batch, block, dtype)] for batch in BATCHES]
            axes.plot(BATCHES, times, style, color=OURS[dtype], label=f"ours, {dtype}, {block_text(block)}")
    for peer, colour in zip([peer for peer in bench.peers if peer.kind == "block-sparse"], PEERS, strict=False):
        found = [(batch, 1e6 * t) for batch in PEER_BATCHES if (t := bench.seconds.get(Case(peer.name, batch)))]
        if found:
            axes.plot(*zip(*found, strict=True), "s-", color=colour, label=f"{peer.name}, 16x16")
    best = [(batch, 1e6 * found[1]) for batch in PEER_BATCHES if (found := bench.best(["dense"], batch))]
    if best:
        axes.plot(*zip(*best, strict=True), "s-", color=PEERS[2], label="the quickest dense")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(BATCHES)
    _finish(figure, path)


def _roofline(bench: Bench, path: Path) -> None:
    figure, axes = _axes("useful operations / byte of weights", "useful GFLOP/s")
    base = Case("ours")
    bandwidth = bench.matrices[base].nbytes / bench[Case("read")]
    reach = np.geomspace(0.02, 40)
    axes.plot(reach, np.minimum(bandwidth * reach, bench.peak) / 1e9, color="black", linewidth=1,
              label=f"{bandwidth / 1e9:.0f} GB/s, {bench.peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(BLOCKS)))
    for block, colour in zip(BLOCKS, shades, strict=True):
        cases = [Case("ours", batch, block) for batch in BATCHES]
        matrix = bench.matrices[cases[0]]
        useful = [2 * matrix.density * ROWS * COLS * case.batch / matrix.nbytes for case in cases]
        axes.plot(useful, [bench.flops(case) / 1e9 for case in cases], "o-", markersize=4, linewidth=0.8, color=colour,
                  label=f"ours, {block_text(block)}")  # fmt: skip
    best = []
    for batch in PEER_BATCHES:
        if found := bench.best(["dense"], batch):
            useful_flops = 2 * bench.matrices[base].density * ROWS * COLS * batch
            best.append((useful_flops / (4 * ROWS * COLS), useful_flops / found[1] / 1e9))
    if best:
        axes.plot(
            *zip(*best, strict=True), "s-", markersize=4, linewidth=0.8, color=PEERS[2], label="the quickest dense"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(figure, path)


@dataclasses.dataclass(frozen=True)
class Bars:
    """A group of horizontal bars: milliseconds by name."""

    title: str
    milliseconds: dict[str, float]


def layer_pictures(groups: Sequence[Bars], folder: Path, name: str, text: str) -> dict[str, str]:
    """Writes that of layers.py or device.py; maps the file to the sentence below it."""
    figure, all_axes = plt.subplots(
        len(groups), 1, figsize=(6.4, 0.4 + 0.27 * sum(len(group.milliseconds) + 3 for group in groups)), squeeze=False,
        height_ratios=[len(group.milliseconds) + 1 for group in groups], layout="constrained",
    )  # fmt: skip
    for axes, group in zip(all_axes[:, 0], groups, strict=True):
        names = sorted(group.milliseconds, key=group.milliseconds.__getitem__, reverse=True)
        values = [group.milliseconds[name] for name in names]
        colours = [OURS["int8" if "int8" in name else "float32"] if "ours" in name else PEERS[2] for name in names]
        axes.barh(names, values, color=colours)
        for place, value in enumerate(values):
            axes.text(value * 1.08, place, f"{value:.3g}", va="center", fontsize=8)
        axes.set_title(f"{group.title}, ms", fontsize=9, loc="left")
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 2.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _finish(figure, folder / name, legend=False)
    return {name: text}
