"""What is in a `.tflite` file: each weight, who reads it, how it is stored, and pictures of its blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_blocksparse._text import by, bytes_text, html_table, percent, text_table
from keras_blocksparse.blocks import BlockGrid, infer_block_size
from keras_blocksparse.lite.flatbuffer import Flatbuffer, text_of
from keras_blocksparse.lite.fuse import COMPOSITE_NAME, CUSTOM_CODE
from keras_blocksparse.report import REPORT_STYLE, WeightSparsity, report_page, writing
from keras_blocksparse.sparse._native import CELLS

_MIN_BYTES = 1024  # smaller constants are biases, shapes, states
_GATES = {"simple_rnn": ("",), "gru": ("z", "r", "h"), "lstm": ("i", "f", "c", "o")}
_HEADINGS = ("weight", "read by", "stored as", "shape", "zeros", "zero blocks of", "bytes", "of dense float32")
_WORDS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight:
    """One constant of a file.

    Attributes:
        name: of the tensor.
        used_by: the operators that read it, such as "GRU recurrent (h)" or "FULLY_CONNECTED".
        encoding: `"dense"`, or `"sparse"` or `"densify"` with the size of its blocks, outputs x inputs.
        dtype: of the stored elements.
        shape: `(inputs, outputs)` of a matrix, as in Keras; of other tensors as in the file.
        sparsity: share of zero elements.
        block_size: inputs x outputs of the largest usual blocks that explain its zeros; None where none do.
        bytes: elements and block index.
        bytes_dense: as dense float32.
    """

    name: str
    used_by: str
    encoding: str
    dtype: str
    shape: tuple[int, ...]
    sparsity: float
    block_size: tuple[int, int] | None
    bytes: int
    bytes_dense: int
    blocks: WeightSparsity | None = dataclasses.field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, in types JSON knows."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "blocks"}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class FileReport:
    """Result of `tflite_report`. Printed, it is a table.

    Attributes:
        path: the file.
        bytes: its size.
        fused: recurrent operators that the delegate runs in one go, such as "GRU 512".
        operators: how many there are of each kind, in all subgraphs.
        inputs: name to `(shape, dtype)`.
        outputs: name to `(shape, dtype)`.
        weights: constants of a kilobyte and more, and all sparse ones.
        other_bytes: all that is no such weight.
    """

    path: str
    bytes: int
    fused: tuple[str, ...]
    operators: dict[str, int]
    inputs: dict[str, tuple[tuple[int, ...], str]]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    weights: tuple[StoredWeight, ...]

    @property
    def other_bytes(self) -> int:
        """Bytes of the file that are no weight: the graph, names, small constants."""
        return self.bytes - sum(w.bytes for w in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, in types JSON knows."""
        ends = {
            side: {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in getattr(self, side).items()}
            for side in ("inputs", "outputs")
        }
        return {
            "path": self.path,
            "bytes": self.bytes,
            "fused": list(self.fused),
            "operators": self.operators,
            **ends,
            "weights": [w.to_dict() for w in self.weights],
            "other_bytes": self.other_bytes,
        }

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained HTML page: the table, and a picture of each weight that has zero blocks.

        Needs matplotlib: `pip install "keras_blocksparse[plot]"`.

        Args:
            path: file to write the page to, if any.

        Returns:
            The page.

        Raises:
            ValueError: `path` cannot be written.
            ImportError: matplotlib is not installed.
        """
        lines = self._lines()
        kinds = ["weight"] * (len(lines) - 2) + ["total"] * 2
        table = f'<div class="kbs">{html_table(_HEADINGS, zip(kinds, lines, strict=True), self._lead())}</div>'
        with writing(path) as temporary:
            page = report_page(
                f"Weights of {os.path.basename(self.path)}", table, [w.blocks for w in self.weights if w.blocks]
            )
            if temporary is not None:
                temporary.write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        return f"<style>{REPORT_STYLE}</style><pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        table = text_table([_HEADINGS, *self._lines()], _WORDS)
        table.insert(-2, table[1])
        return "\n".join([*self._lead(), "", *table])

    __repr__ = __str__

    def _lead(self) -> list[str]:
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        lines = [f"{self.path}, {bytes_text(self.bytes)}", f"operators: {operators}"]
        if self.fused:
            lines.append(f"one operator each, with the delegate: {', '.join(self.fused)}")
        for side in ("inputs", "outputs"):
            ends = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in getattr(self, side).items())
            lines.append(f"{side}: {ends}")
        return lines

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            (
                w.name, w.used_by, f"{w.encoding} {w.dtype}", by(w.shape), percent(w.sparsity),
                by(w.block_size) if w.block_size else "-", f"{w.bytes:,}", percent(w.bytes / w.bytes_dense),
            )
            for w in self.weights
        ]  # fmt: skip
        dense = sum(w.bytes_dense for w in self.weights)
        stored = sum(w.bytes for w in self.weights)
        lines.append(("all weights", "", "", "", "", "", f"{stored:,}", percent(stored / dense) if dense else "-"))
        lines.append(("everything else", "", "", "", "", "", f"{self.other_bytes:,}", ""))
        return lines


def tflite_report(path: str | os.PathLike[str]) -> FileReport:
    """Reads a `.tflite` file, ours or anybody's, and tells what its weights are and how they are stored.

    Example:

    >>> report = kbs.tflite_report("model.tflite")
    >>> print(report)                       # a table
    >>> report.to_html("model.html")        # the table, and a picture of each sparse weight

    Args:
        path: the file. Nothing in it is trusted.

    Returns:
        A `FileReport`.

    Raises:
        ValueError: the file is not there, is no TFLite model, or contradicts itself.
    """
    file = Flatbuffer.read(path)
    try:
        roles, fused = _recurrent_weights(file)
        return FileReport(
            path=os.fspath(path),
            bytes=os.path.getsize(path),
            fused=tuple(fused),
            operators=_count_operators(file),
            inputs=_ends(file, "inputs"),
            outputs=_ends(file, "outputs"),
            weights=tuple(_weights(file, roles)),
        )
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is a broken TFLite model: {error}") from error


def _count_operators(file: Flatbuffer) -> dict[str, int]:
    names = [file.op_name(op) for graph in file.tree.subgraphs for op in graph.operators or ()]
    return {name: names.count(name) for name in sorted(set(names))}


def _ends(file: Flatbuffer, side: str) -> dict[str, tuple[tuple[int, ...], str]]:
    main = file.tree.subgraphs[0]
    numbers = [int(t) for t in getattr(main, side)]
    names = {number: text_of(main.tensors[number].name) for number in numbers}
    if file.tree.signatureDefs:
        for entry in getattr(file.tree.signatureDefs[0], side) or ():
            names[entry.tensorIndex] = text_of(entry.name)
    dtypes = {v: k.lower() for k, v in vars(file.schema.TensorType).items() if isinstance(v, int)}
    tensors = {names[number]: main.tensors[number] for number in numbers}
    return {
        name: (tuple(int(d) for d in (() if t.shape is None else t.shape)), dtypes.get(t.type, str(t.type)))
        for name, t in tensors.items()
    }


def _recurrent_weights(file: Flatbuffer) -> tuple[dict[tuple[int, int], tuple[str, tuple[str, ...]]], list[str]]:
    """What fused operators say of themselves: role and gates of each of their constants, by subgraph and tensor."""
    from flatbuffers import flexbuffers

    cells = {number: name for name, number in CELLS.items()}
    labels = {"simple_rnn": "SimpleRNN", "gru": "GRU", "lstm": "LSTM"}
    roles: dict[tuple[int, int], tuple[str, tuple[str, ...]]] = {}
    fused = []
    for index, graph in enumerate(file.tree.subgraphs):
        for op in graph.operators or ():
            kind = file.op_name(op)
            if kind == "STABLEHLO_COMPOSITE" and text_of(op.builtinOptions2.name) == COMPOSITE_NAME:
                data = op.builtinOptions2.compositeAttributes
            elif kind == CUSTOM_CODE:
                data = op.customOptions
            else:
                continue
            attributes: Any = None
            with contextlib.suppress(Exception):  # the reader's own errors are of all kinds
                attributes = flexbuffers.Loads(bytes(data))
            if not isinstance(attributes, dict) or attributes.get("cell") not in cells:
                raise ValueError("A recurrent operator has no readable attributes.")
            cell, units = cells[attributes["cell"]], int(attributes["units"])
            fused.append(f"{labels[cell]} {units}")
            for role in ("kernel", "recurrent"):
                places, column = attributes.get(role, []), 0
                for place, tensor in zip(places[::2], places[1::2], strict=True):
                    place = index if place < 0 else place
                    outputs = int(file.tree.subgraphs[place].tensors[tensor].shape[0])
                    gates = _GATES[cell][column // max(units, 1) : (column + outputs) // max(units, 1)]
                    roles[place, tensor] = f"{labels[cell]} {role}", gates
                    column += outputs
    return roles, fused


def _weights(file: Flatbuffer, roles: dict[tuple[int, int], tuple[str, tuple[str, ...]]]) -> Iterator[StoredWeight]:
    seen = set()
    for index, graph in enumerate(file.tree.subgraphs):
        readers: dict[int, set[str]] = {}
        for op in graph.operators or ():
            for tensor in op.inputs:
                readers.setdefault(int(tensor), set()).add(file.op_name(op))
        for number, tensor in enumerate(graph.tensors):
            value = file.dense(tensor) if tensor.buffer else None
            if value is None or value.ndim < 2 or tensor.buffer in seen:
                continue
            stored = len(file.tree.buffers[tensor.buffer].data)
            if stored < _MIN_BYTES and tensor.sparsity is None:
                continue
            seen.add(tensor.buffer)
            role, gates = roles.get((index, number), (", ".join(sorted(readers.get(number, ()))), ("",)))
            yield _stored(file, tensor, value, stored, role, gates or ("",), readers.get(number, set()))


def _stored(
    file: Flatbuffer, tensor: Any, value: np.ndarray, stored: int, role: str, gates: tuple[str, ...], readers: set[str]
) -> StoredWeight:
    encoding, name = "dense", text_of(tensor.name)
    if tensor.sparsity is not None:
        sizes = _block(tensor, value.ndim)
        encoding = f"{'densify' if 'DENSIFY' in readers else 'sparse'} {by(sizes)}"
        stored += sum(
            vector.values.nbytes
            for dim in tensor.sparsity.dimMetadata
            for vector in (dim.arraySegments, dim.arrayIndices)
            if vector is not None and vector.values is not None
        )
    blocks = None
    if value.ndim == 2:
        blocks = _blocks(name, role, np.ascontiguousarray(value.T).astype(np.float32), gates)
    label = f"{role} ({', '.join(g for g in gates if g)})" if any(gates) else role
    return StoredWeight(
        name=name,
        used_by=label,
        encoding=encoding,
        dtype=str(value.dtype),
        shape=tuple(reversed(value.shape)) if value.ndim == 2 else value.shape,
        sparsity=float(np.mean(value == 0)) if value.size else 0.0,
        block_size=blocks.grid.block_size if blocks and blocks.grid else None,
        bytes=stored,
        bytes_dense=4 * value.size,
        blocks=blocks,
    )


def _block(tensor: Any, rank: int) -> list[int]:
    """Outputs x inputs of a block in the file."""
    sparse, sizes = tensor.sparsity, [1] * rank
    order = [int(d) for d in sparse.traversalOrder]
    for position, dim in enumerate(() if sparse.blockMap is None else sparse.blockMap):
        sizes[int(dim)] = int(sparse.dimMetadata[order.index(rank + position)].denseSize)
    return sizes[-2:]


def _blocks(name: str, role: str, matrix: np.ndarray, gates: tuple[str, ...]) -> WeightSparsity | None:
    """Its zero blocks, if it has any."""
    count = len(gates)
    if matrix.shape[1] % count or not matrix.size:
        return None
    size = infer_block_size(matrix, count)
    grid = BlockGrid(matrix.shape, size, count)
    kept = grid.nonzero_blocks(matrix)
    if size == (1, 1) or kept.all():
        return None
    kept_parameters = tuple(int(np.count_nonzero(part)) for part in np.split(matrix, count, axis=1))
    return WeightSparsity(
        layer=name, weight=role, gates=gates, shape=matrix.shape, kept_parameters=kept_parameters, grid=grid, kept=kept,
        scores=grid.scores(matrix),
    )  # fmt: skip
