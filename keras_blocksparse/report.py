"""What is left of each weight of a model, gate by gate: numbers, a table, and a page with pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_blocksparse._text import by, html_table, percent, text_table
from keras_blocksparse.blocks import BlockGrid, BlockSize, check_block_size, infer_block_size
from keras_blocksparse.constraints import pruning_of
from keras_blocksparse.prunable import PrunableLayer, PrunableWeight, find_prunable_layers, refuse_block_sparse
from keras_blocksparse.variables import to_numpy


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """The sparsity of one gate of one weight, or of the whole weight where `gate` is "all".

    Attributes:
        layer: names from the model's top to the layer, joined by "/".
        weight: attribute of the layer that holds the weight.
        gate: name of the gate; "" in a weight that has no gates.
        shape: `(inputs, outputs)` of the gate; the shape of the Keras weight where `gate` is "all".
        block_size: `(rows, cols)` of a block; `None` for a weight that is not looked at in blocks.
        sparsity: share of zero elements.
        kept_blocks: blocks that hold an element that is not zero; `None` without blocks.
        blocks: all blocks; `None` without blocks.
        kept_parameters: elements that are not zero.
        parameters: all elements.
        dead_inputs: inputs whose blocks are all zero; `None` without blocks.
        dead_outputs: outputs whose blocks are all zero, in a whole weight those that are so in every gate.
    """

    layer: str
    weight: str
    gate: str
    shape: tuple[int, ...]
    block_size: BlockSize | None
    sparsity: float
    kept_blocks: int | None
    blocks: int | None
    kept_parameters: int
    parameters: int
    dead_inputs: int | None
    dead_outputs: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSparsity:
    """One weight at the time of the report: which of its blocks are zero, and how large the others are.

    Attributes:
        layer: names from the model's top to the layer, joined by "/".
        weight: attribute of the layer that holds the weight.
        gates: names of its gates; one empty name if it has none.
        shape: shape of the Keras weight.
        kept_parameters: elements of each gate that are not zero.
        grid: how it is cut into blocks; `None` if it is not.
        kept: which blocks hold an element that is not zero, bool of `grid.grid_shape`.
        scores: block scores, float of `grid.grid_shape`.
        under_pruning: whether a pruning constraint holds its blocks at zero.
        note: why it is not pruned; "" if it is.
    """

    layer: str
    weight: str
    gates: tuple[str, ...]
    shape: tuple[int, ...]
    kept_parameters: tuple[int, ...]
    grid: BlockGrid | None = None
    kept: np.ndarray | None = None
    scores: np.ndarray | None = None
    under_pruning: bool = False
    note: str = ""

    @property
    def path(self) -> str:
        """Layer and weight, joined by "/"."""
        return f"{self.layer}/{self.weight}"

    @property
    def parameters(self) -> int:
        """All elements."""
        return int(np.prod(self.shape))

    @property
    def sparse(self) -> bool:
        """Whether a whole block is zero."""
        return self.kept is not None and not bool(self.kept.all())

    @property
    def rows(self) -> list[SparsityRow]:
        """One row for each gate."""
        return [self._row(gate, [index]) for index, gate in enumerate(self.gates)]

    @property
    def total(self) -> SparsityRow:
        """The row of the whole weight."""
        return self._row("all" if len(self.gates) > 1 else self.gates[0], list(range(len(self.gates))))

    def _row(self, gate: str, indices: list[int]) -> SparsityRow:
        parameters = self.parameters // len(self.gates) * len(indices)
        kept_parameters = sum(self.kept_parameters[index] for index in indices)
        whole = len(indices) == len(self.gates)
        shape = self.shape if whole else (self.shape[0], self.shape[-1] // len(self.gates))
        counts: dict[str, Any] = dict.fromkeys(("block_size", "kept_blocks", "blocks", "dead_inputs", "dead_outputs"))
        if self.grid is not None and self.kept is not None:
            kept = self.kept[indices]
            counts = {
                "block_size": self.grid.block_size,
                "kept_blocks": int(kept.sum()),
                "blocks": kept.size,
                "dead_inputs": int(self.grid.heights[~kept.any(axis=(0, 2))].sum()),
                "dead_outputs": int(self.grid.widths[~kept.any(axis=(0, 1))].sum()),
            }
            shape = shape if whole else (self.grid.rows, self.grid.cols)
        return SparsityRow(
            layer=self.layer,
            weight=self.weight,
            gate=gate,
            shape=shape,
            sparsity=1 - kept_parameters / parameters,
            kept_parameters=kept_parameters,
            parameters=parameters,
            **counts,
        )


@dataclasses.dataclass(frozen=True)
class Total:
    """Parameters of several weights together: how many there are, and how many are not zero."""

    parameters: int
    kept_parameters: int

    @property
    def sparsity(self) -> float:
        """Share of zero elements."""
        return 1 - self.kept_parameters / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SparsityReport:
    """Result of `sparsity_report`. Printed, it is a table; a notebook shows it as one.

    Attributes:
        weights: each prunable weight, in the model's order.
        pruned: total of the weights that are under pruning, or, if none is, of those that hold zero blocks.
        model: total of all weights of the model. Only prunable weights are searched for zeros.
        notes: which weights are not in blocks, or not in the report, and why.
    """

    weights: tuple[WeightSparsity, ...]
    pruned: Total
    model: Total
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[SparsityRow]:
        """One row for each gate of each weight; a weight without gates, or not in blocks, is one row."""
        return [row for weight in self.weights for row in (weight.rows if weight.grid else [weight.total])]

    def to_dict(self) -> dict[str, Any]:
        """Rows, totals and notes in types that JSON knows."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row.update({name: list(value) for name, value in row.items() if isinstance(value, tuple)})
        totals = {
            name: {**dataclasses.asdict(total), "sparsity": total.sparsity}
            for name, total in (("pruned", self.pruned), ("model", self.model))
        }
        return {"rows": rows, **totals, "notes": list(self.notes)}

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained HTML page: the table, and of each weight in blocks a picture and its dead units.

        Needs matplotlib: `pip install "keras_blocksparse[plot]"`.

        Args:
            path: file to write the page to, if any.

        Returns:
            The page.

        Raises:
            ValueError: `path` cannot be written.
            ImportError: matplotlib is not installed.
        """
        with writing(path) as temporary:
            page = report_page(
                "Sparsity report", self._table_html(), [weight for weight in self.weights if weight.grid]
            )
            if temporary is not None:
                temporary.write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        return f"<style>{REPORT_STYLE}</style>{self._table_html()}"

    def __str__(self) -> str:
        text = text_table([_HEADINGS] + [cells for _, cells in self._lines()], _LEFT)
        text.insert(-2, text[1])
        return "\n".join([*text, *self.notes])

    __repr__ = __str__

    def _lines(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The table's lines as a kind ("weight", "gate" or "total") and cells."""
        for weight in self.weights:
            yield "weight", (weight.path, *_cells(weight.total))
            if weight.grid and len(weight.gates) > 1:
                yield from (("gate", ("", *_cells(row))) for row in weight.rows)
        for name, total in (("pruned weights", self.pruned), ("whole model", self.model)):
            kept = _fraction(total.kept_parameters, total.parameters)
            yield "total", (name, "", "", "", percent(total.sparsity), "", kept, "", "")

    def _table_html(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f'<div class="kbs">{html_table(_HEADINGS, self._lines())}{notes}</div>'


def sparsity_report(model: Any, block_size: BlockSize | None = None) -> SparsityReport:
    """Counts what is left of each weight of a model, gate by gate.

    It works while a model is being pruned, after `strip_pruning`, and on any other Keras model. What counts is what the
    weights hold now: a block is kept if an element of it is not zero.

    Example:

    >>> report = kbs.sparsity_report(model)
    >>> print(report)                       # a table
    >>> report.pruned.sparsity
    0.9
    >>> report.to_html("masks.html")        # the table, and a picture of each weight

    Args:
        model: built Keras model or layer, or a list of either.
        block_size: rows (inputs) and columns (outputs) of the blocks to count in. By default those that a weight is
            pruned in, or else the largest usual ones that explain its zeros.

    Returns:
        A `SparsityReport`.

    Raises:
        ValueError: the model is not built yet, it has no prunable layer, it has block-sparse ones, or `block_size` is
            not a pair of sizes.
        TypeError: `model` is no Keras model or layer.
    """
    if block_size is not None:
        block_size = check_block_size(block_size)
    layers = find_prunable_layers(model, everything=True)
    if not layers:
        raise ValueError(f"There is no prunable layer in {model!r}")
    refuse_block_sparse(layers)
    weights: list[WeightSparsity] = []
    notes: list[str] = []
    for layer in layers:
        try:
            pairs = layer.built_weights()
        except ValueError as error:  # LoRA or quantization: there is no one weight
            notes.append(f"{layer.path} is left out: {error}")
            continue
        if not pairs:
            notes.append(f"{layer.path} is left out: it is not built yet")
        weights += [measure(layer, spec, variable, block_size) for spec, variable in pairs]
    if not weights:
        raise ValueError(
            "No weight is built yet, so there is nothing to report. Build the model first: call it on a batch, call "
            f"model.build(input_shape), or give it a keras.Input. Received: {model!r}"
        )
    notes = [f"{weight.path} is not in blocks: {weight.note}" for weight in weights if weight.note] + notes
    pruned = [w for w in weights if w.under_pruning] or [w for w in weights if w.sparse]
    zeros = sum(w.parameters - sum(w.kept_parameters) for w in weights)
    parameters = _count_parameters(model)
    return SparsityReport(
        weights=tuple(weights),
        pruned=Total(sum(w.parameters for w in pruned), sum(sum(w.kept_parameters) for w in pruned)),
        model=Total(parameters, parameters - zeros),
        notes=tuple(notes),
    )


def measure(
    layer: PrunableLayer, spec: PrunableWeight, variable: Any, block_size: BlockSize | None = None
) -> WeightSparsity:
    """Counts what is left of one built weight. Arguments as for `sparsity_report`."""
    array = to_numpy(variable)
    constraint = pruning_of(variable)
    under_pruning = constraint is not None and not constraint.skipped
    flat = BlockGrid(array.shape, (1, 1), len(spec.gates), spec.row_axes)
    found = WeightSparsity(
        layer=layer.path,
        weight=spec.name,
        gates=spec.gates,
        shape=array.shape,
        kept_parameters=tuple(int(np.count_nonzero(gate)) for gate in flat.gate_matrices(array)),
        under_pruning=under_pruning,
    )
    if block_size is None and constraint is not None:
        if constraint.skipped:
            return dataclasses.replace(found, note=constraint.skipped)
        block_size = constraint.settings.block_size
    if block_size is None:
        block_size = infer_block_size(array.reshape(flat.rows, -1), len(spec.gates))
        # Single zeros are a pattern only where there are many: any dense weight may hold a few.
        if block_size == (1, 1) and sum(found.kept_parameters) > 0.99 * found.parameters:
            return dataclasses.replace(found, note="it is dense")
    try:
        grid = BlockGrid(array.shape, block_size, len(spec.gates), spec.row_axes)
    except ValueError as error:
        return dataclasses.replace(found, note=str(error))
    score = constraint.settings.score if constraint is not None else "l2"
    return dataclasses.replace(found, grid=grid, kept=grid.nonzero_blocks(array), scores=grid.scores(array, score))


@contextlib.contextmanager
def writing(path: Any) -> Iterator[Path | None]:
    """A temporary file beside `path`, moved there at the end of the block; `None` if `path` is.

    Raises:
        ValueError: `path` cannot be written; raised on entering, before any work.
        TypeError: `path` is no path.
    """
    if path is None:
        yield None
        return
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be a str or os.PathLike. Received: path={path!r}")
    full = Path(path).absolute()
    if full.is_dir():
        raise ValueError(f"`path` must name a file, and this is a directory. Received: path={str(path)!r}")
    try:
        handle, name = tempfile.mkstemp(dir=full.parent, prefix=f".{full.stem}.", suffix=full.suffix)
    except OSError as error:
        raise ValueError(f"`path` cannot be written: {error.strerror}. Received: path={str(path)!r}") from error
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is private; this one is meant to be read
        os.replace(name, full)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def report_page(title: str, table: str, weights: Sequence[WeightSparsity]) -> str:
    """A self-contained page: a table in HTML, and a picture of each weight in blocks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from keras_blocksparse.plots import to_png_uri

    pictures = (f'<img alt="Blocks of {html.escape(w.path)}" src="{to_png_uri(w)}">' for w in weights)
    return _PAGE.format(title=html.escape(title), style=REPORT_STYLE, table=table, pictures="\n".join(pictures))


def _count_parameters(model: Any) -> int:
    tops = model if isinstance(model, (list, tuple)) else [model]
    weights = {id(w): w for top in tops for w in getattr(getattr(top, "layer", top), "weights", [])}
    return sum(int(np.prod(w.shape)) for w in weights.values())


_HEADINGS = (
    "weight", "gate", "shape", "block", "sparsity", "blocks kept", "parameters kept", "dead inputs", "dead outputs",
)  # fmt: skip
_LEFT = 2  # columns of words; the rest are numbers and stand to the right


def _cells(row: SparsityRow) -> tuple[str, ...]:
    return (
        row.gate,
        by(row.shape),
        by(row.block_size) if row.block_size else "-",
        percent(row.sparsity),
        _fraction(row.kept_blocks, row.blocks),
        _fraction(row.kept_parameters, row.parameters),
        "-" if row.dead_inputs is None else f"{row.dead_inputs:,}",
        "-" if row.dead_outputs is None else f"{row.dead_outputs:,}",
    )


def _fraction(part: int | None, whole: int | None) -> str:
    return "-" if part is None or whole is None else f"{part:,} / {whole:,}"


REPORT_STYLE = """
.kbs { font: 14px/1.45 system-ui, sans-serif; }
.kbs table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.kbs th, .kbs td { padding: 3px 12px; text-align: right; white-space: nowrap; border: 0; }
.kbs th:nth-child(-n+2), .kbs td:nth-child(-n+2) { text-align: left; }
.kbs thead tr { border-bottom: 2px solid #888; }
.kbs tr.weight { border-top: 1px solid #ccc; }
.kbs tr.gate { opacity: 0.75; }
.kbs tr.total { font-weight: 600; border-top: 2px solid #888; }
.kbs tr.total + tr.total { border-top: 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
html {{ background: #fff; color: #1a1a1a; }}
body {{ max-width: 1240px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font: 600 24px system-ui, sans-serif; }}
.scroll {{ overflow-x: auto; }}
img {{ display: block; max-width: 100%; margin: 2.5em 0; }}
{style}</style>
</head>
<body>
<h1>{title}</h1>
<div class="scroll">{table}</div>
{pictures}
</body>
</html>
"""
