"""Pictures of block-sparse weights: one pixel path in numpy, framed by matplotlib or sent to TensorBoard as it is."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_blocksparse.blocks import BlockSize
from keras_blocksparse.report import WeightSparsity, sparsity_report, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From small to large magnitude: ColorBrewer's YlGnBu without its palest colours. Lightness falls all the way, so it is
# read without seeing hues, and its first colour still differs from the white of a zero block.
_ANCHORS = ((0xA1, 0xDA, 0xB4), (0x41, 0xB6, 0xC4), (0x1D, 0x91, 0xC0), (0x22, 0x5E, 0xA8), (0x08, 0x1D, 0x58))
_COLOURS = np.stack(
    [np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in zip(*_ANCHORS, strict=True)], axis=1
)
_ALIVE, _DEAD, _GREY = "#225ea8", "#d55e00", "#8c8c8c"
_DPI = 110


def block_pixels(weight: WeightSparsity, limit: int = 640) -> np.ndarray:
    """The blocks of a weight as colours: white where a block is zero, else by its score.

    Args:
        weight: a weight in blocks.
        limit: most pixels on a side of a gate. Where there are more blocks, a pixel is the mean of several.

    Returns:
        uint8 `(gates, pixels down, pixels across, 3)`.
    """
    assert weight.kept is not None
    assert weight.scores is not None
    low, high = score_range(weight)
    levels = np.clip((np.nan_to_num(weight.scores, nan=high, posinf=high) - low) / ((high - low) or 1.0), 0, 1)
    colours = np.where(weight.kept[..., None], _COLOURS[(255 * levels).astype(np.uint8)], 255).astype(np.uint8)
    for axis in (1, 2):
        starts = np.arange(0, colours.shape[axis], -(-colours.shape[axis] // limit))
        if len(starts) < colours.shape[axis]:
            counts = np.diff(np.append(starts, colours.shape[axis]))
            sums = np.add.reduceat(colours, starts, axis=axis, dtype=np.uint32)
            colours = (sums // np.expand_dims(counts, [a for a in range(4) if a != axis])).astype(np.uint8)
    return colours


def score_range(weight: WeightSparsity) -> tuple[float, float]:
    """Between which scores colours differ: nearly all that kept blocks have, so that one outlier hides nothing."""
    assert weight.scores is not None
    scores = weight.scores[weight.kept]
    scores = scores[np.isfinite(scores)]
    low, high = np.percentile(scores, (2, 98)) if scores.size else (0.0, 1.0)
    return float(low), float(high)


def mask_image(weight: WeightSparsity, size: int = 512) -> np.ndarray:
    """The blocks of a weight as one image: gates side by side, a grey line between them and around.

    Args:
        weight: a weight in blocks.
        size: pixels that the longer side is brought near to, if it has fewer.

    Returns:
        uint8 `(height, width, 3)`.
    """
    gates = block_pixels(weight)
    scale = max(1, size // max(gates.shape[1], gates.shape[0] * gates.shape[2]))
    gates = np.pad(
        gates.repeat(scale, axis=1).repeat(scale, axis=2), ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=140
    )
    return np.concatenate(list(gates), axis=1)


def plot_masks(
    model: Any,
    weights: str | None = None,
    path: str | os.PathLike[str] | None = None,
    block_size: BlockSize | None = None,
) -> Figure:
    """Draws the blocks of each sparse weight of a model, and how many blocks its inputs and outputs have left.

    The gates of a weight lie side by side. A zero block is blank, others are coloured by their score (their largest
    magnitude, unless pruning was told otherwise). Beside them, two histograms show for how many inputs and outputs how
    many blocks are kept: those with none are dead.

    Example:

    >>> kbs.plot_masks(model, weights="gru", path="masks.png")

    Args:
        model: built Keras model or layer, or a list of either.
        weights: regex (`re.search`) on paths such as "encoder/gru/recurrent_kernel". By default all weights that are
            under pruning or hold zero blocks.
        path: file to write the picture to, if any; its suffix says the format, such as ".png" or ".pdf".
        block_size: as in `sparsity_report`; lets a dense weight be drawn in blocks too.

    Returns:
        A matplotlib `Figure`, made without pyplot: there is nothing to close.

    Raises:
        ValueError: the model is not built, nothing is to be drawn, or `path` cannot be written.
        TypeError: `model` is no Keras model or layer, or `weights` no string.
        ImportError: matplotlib is not installed.
    """
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"`weights` must be a regex on the paths of weights. Received: weights={weights!r}")
    with writing(path) as temporary:
        report = sparsity_report(model, block_size)
        chosen = [
            w
            for w in report.weights
            if w.grid and (w.under_pruning or w.sparse if weights is None else re.search(weights, w.path))
        ]
        if not chosen:
            paths = "\n".join(f"  {w.path}: {w.note or 'in blocks'}" for w in report.weights)
            asked = (
                "no weight holds zero blocks" if weights is None else f"weights={weights!r} matches no weight in blocks"
            )
            raise ValueError(
                f"Nothing to draw: {asked}. `block_size` cuts dense weights into blocks too. There are\n{paths}"
            )
        figure = draw(chosen)
        if temporary is not None:
            supported = figure.canvas.get_supported_filetypes()
            if temporary.suffix.lstrip(".").lower() not in supported:
                raise ValueError(
                    f"`path` must end in one of {sorted(supported)}, the formats that matplotlib writes. "
                    f"Received: path={str(path)!r}"
                )
            figure.savefig(temporary, dpi=_DPI)
    return figure


# All in inches: the left margin, width of all gates together, between them, of the colour bar with and without its
# numbers, and of a histogram with and without its own; height of a weight's titles, of what stands below the axes, and
# the least and greatest side of a gate.
_LEFT, _GATES, _GAP, _BAR, _COLOUR_BAR, _HISTOGRAM, _COLUMN = 0.75, 6.3, 0.14, 1.33, 0.13, 1.6, 2.35
_HEAD, _FOOT, _LEAST, _MOST = 0.95, 0.6, 1.1, 3.4


def draw(weights: Sequence[WeightSparsity]) -> Figure:
    """A figure of weights in blocks, one below the other."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures of masks need matplotlib: pip install "keras_blocksparse[plot]"') from error
    sizes = [_gate_size(weight) for weight in weights]
    heights = [_HEAD + max(height, _LEAST) + _FOOT for _, height in sizes]
    gates = [len(weight.gates) * (width + _GAP) for weight, (width, _) in zip(weights, sizes, strict=True)]
    width = _LEFT + max(gates) + _BAR + 2 * _COLUMN - 0.5
    figure = Figure(figsize=(width, sum(heights)), dpi=_DPI, facecolor="white")
    top = sum(heights)
    for weight, size, height in zip(weights, sizes, heights, strict=True):
        _draw_weight(figure, weight, size, top)
        top -= height
    return figure


def to_png_uri(weight: WeightSparsity) -> str:
    """The picture of one weight as a `data:` URI."""
    png = io.BytesIO()
    draw([weight]).savefig(png, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _gate_size(weight: WeightSparsity) -> tuple[float, float]:
    """Width and height of a gate's picture: the matrix's own proportions, as far as it can be seen then."""
    assert weight.grid is not None
    gates = len(weight.gates)
    width = min((_GATES - _GAP * (gates - 1)) / gates, _MOST)
    height = min(max(width * weight.grid.rows / weight.grid.cols, _LEAST), _MOST)
    return min(width, max(height * weight.grid.cols / weight.grid.rows, _LEAST)), height


def _draw_weight(figure: Figure, weight: WeightSparsity, size: tuple[float, float], top: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    assert weight.grid is not None
    grid, total, (width, height) = weight.grid, weight.total, size
    figure_width, figure_height = figure.get_size_inches()

    def axes(left: float, below: float, wide: float, high: float) -> Any:
        """Axes by their distance from the left and from the top of this weight."""
        bottom = (top - below - high) / figure_height
        return figure.add_axes((left / figure_width, bottom, wide / figure_width, high / figure_height))

    def title(text: str, below: float, **style: Any) -> None:
        figure.text(_LEFT / figure_width, (top - below) / figure_height, text, **style)

    shape, block = ("\N{MULTIPLICATION SIGN}".join(map(str, sides)) for sides in (weight.shape, grid.block_size))
    blocks = f"{total.kept_blocks:,} of {total.blocks:,} blocks kept"
    title(weight.path, 0.28, weight="bold", fontsize=11)
    title(f"{shape} in {block} blocks, {total.sparsity:.1%} zero, {blocks}", 0.5, fontsize=9.5)
    left = _LEFT
    _, down, across = grid.grid_shape
    for row, pixels in zip(weight.rows, block_pixels(weight), strict=True):
        picture = axes(left, _HEAD, width, height)
        # Drawn to the end of the last blocks and cut off at the end of the matrix, so that ragged blocks look ragged.
        extent = (0, across * grid.block_size[1], down * grid.block_size[0], 0)
        picture.imshow(pixels, extent=extent, aspect="auto", interpolation="auto", interpolation_stage="rgba")
        picture.set(xlim=(0, grid.cols), ylim=(grid.rows, 0), xticks=[0, grid.cols], yticks=[0, grid.rows])
        picture.set_xticklabels(["0", str(grid.cols)], fontsize=8)
        picture.set_title(f"gate {row.gate}, {row.sparsity:.1%}" if row.gate else "", fontsize=9, pad=4)
        for label, alignment in zip(picture.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(alignment)
        picture.set_xlabel("outputs", fontsize=9, labelpad=-7)
        if left == _LEFT:
            picture.set_yticklabels(["0", str(grid.rows)], fontsize=8)
            picture.set_ylabel("inputs", fontsize=9, labelpad=-4)
        else:
            picture.set_yticks([])
        picture.tick_params(length=0)
        for spine in picture.spines.values():
            spine.set_color(_GREY)
        left += width + _GAP

    low, high = score_range(weight)
    if low < high:
        colours = ScalarMappable(Normalize(low, high), ListedColormap(_COLOURS / 255))
        bar = figure.colorbar(colours, cax=axes(left, _HEAD, _COLOUR_BAR, height), ticks=_few_ticks(), format="%.4g")
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
        bar.ax.set_title("score", fontsize=8, pad=4)

    assert weight.kept is not None
    left += _BAR
    for name, kept, lengths, dead in (
        ("inputs", weight.kept.sum(axis=(0, 2)), grid.heights, total.dead_inputs),
        ("outputs", weight.kept.sum(axis=(0, 1)), grid.widths, total.dead_outputs),
    ):
        most = weight.kept.size // len(kept)
        histogram = axes(left, _HEAD, _HISTOGRAM, min(height, 2.2))
        _draw_histogram(histogram, kept, lengths)
        histogram.set_title(f"{dead:,} of {lengths.sum():,} {name} dead", fontsize=9, pad=4)
        histogram.set_xlabel(f"blocks kept, of {most:,}", fontsize=9)
        histogram.set_ylabel(name, fontsize=9)
        left += _COLUMN


def _draw_histogram(axes: Any, kept: np.ndarray, lengths: np.ndarray) -> None:
    """How many rows (or columns) of a matrix have how many kept blocks; those with none by themselves, in orange."""
    units = np.bincount(kept, weights=lengths)
    step = -(-len(units) // 40)
    starts = np.arange(1, len(units), step)
    axes.bar([0], units[:1], width=0.9 * step, color=_DEAD)
    if len(starts):
        axes.bar(starts + (step - 1) / 2, np.add.reduceat(units, starts), width=0.9 * step, color=_ALIVE)
    axes.set_xlim(-0.6 * step, len(units) - 1 + 0.6 * step)
    axes.xaxis.set_major_locator(_few_ticks(integer=True))
    axes.yaxis.set_major_locator(_few_ticks(integer=True))
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _few_ticks(integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=integer)
