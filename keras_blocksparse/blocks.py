"""How a weight is cut into blocks, how blocks are scored, and which of them are kept.

Everything here is numpy on the host: a mask moves once in a hundred steps or so, and numpy's partial sort beats eager
tensor operations by more than an order of magnitude on matrices of this size.

Block pruning is section 3.1 of "Block-Sparse Recurrent Neural Networks" (Narang, Undersander, Diamos, 2017).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BlockSize = tuple[int, int]
ScoreFunction = Callable[[np.ndarray], np.ndarray]
Score = str | ScoreFunction

SCORES = ("max", "mean", "l2")

#: Tried from large to small when a block shape has to be read off a matrix that holds zeros.
COMMON_BLOCK_SIZES: tuple[BlockSize, ...] = (
    (32, 32), (16, 32), (32, 16), (16, 16), (8, 16), (16, 8), (8, 8), (4, 16), (16, 4), (8, 4), (4, 8), (12, 2),
    (4, 4), (16, 1), (1, 16), (8, 1), (1, 8), (4, 1), (1, 4), (2, 2),
)  # fmt: skip


def check_block_size(block_size: Any) -> BlockSize:
    """Returns `block_size` as a pair of Python ints, or says what is wrong with it.

    Raises:
        ValueError: it is not a pair, or a side is below 1.
        TypeError: a side is not an integer.
    """
    try:
        sides = tuple(block_size)
    except TypeError:
        sides = ()
    if isinstance(block_size, str) or len(sides) != 2:
        raise ValueError(
            f"`block_size` must be a pair (rows, cols), for example (16, 16). Received: block_size={block_size!r}"
        )
    if not all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"`block_size` must hold two integers. Received: block_size={block_size!r}")
    if min(sides) < 1:
        raise ValueError(f"Both sides of `block_size` must be at least 1. Received: block_size={block_size!r}")
    return int(sides[0]), int(sides[1])


def check_neighborhood(neighborhood: Any, block_size: BlockSize) -> BlockSize | None:
    """Returns `neighborhood` as a pair of Python ints or `None`, or says what is wrong with it.

    Raises:
        ValueError: it is not a pair of multiples of the block's sides.
        TypeError: a side is not an integer.
    """
    if neighborhood is None:
        return None
    try:
        sides = check_block_size(neighborhood)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("block_size", "neighborhood")) from None
    if sides[0] % block_size[0] or sides[1] % block_size[1]:
        raise ValueError(
            "Both sides of `neighborhood` must be multiples of the block's. "
            f"Received: neighborhood={sides}, block_size={block_size}"
        )
    return sides


def check_score(score: Any) -> Score:
    """Returns `score` if it names a block score or is callable, else raises ValueError."""
    if callable(score) or score in SCORES:
        return score
    raise ValueError(f"`score` must be one of {SCORES} or a callable on an array of blocks. Received: score={score!r}")


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """The cutting of one weight into blocks.

    A weight is read as a matrix `(rows, gates * cols)`: its leading `row_axes` axes are the inputs, the rest the
    outputs, and the outputs of a recurrent layer hold `gates` equal parts beside each other (Keras: z, r, h for a GRU).
    Each gate has a grid of its own, so that no block straddles two gates. Where a side is not a multiple of the block,
    the last blocks are smaller ("ragged"); they are counted by the elements they really have.

    Example:

    >>> grid = BlockGrid(shape=(20, 96), block_size=(16, 16), gates=3)
    >>> grid.grid_shape          # gates, block rows, block columns
    (3, 2, 2)
    >>> grid.elements[1]         # the lower blocks have 4 of 16 rows
    array([64, 64])

    Args:
        shape: shape of the weight.
        block_size: rows (inputs) and columns (outputs) of a block of the Keras weight.
        gates: number of equal parts beside each other in the last axis.
        row_axes: how many leading axes are inputs; all but the last if `None`.

    Raises:
        ValueError: the block is larger than one gate of the matrix, or the gates do not divide the columns.
    """

    shape: tuple[int, ...]
    block_size: BlockSize
    gates: int = 1
    row_axes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        if len(self.shape) < 2:
            raise ValueError(f"A weight needs at least two axes to be cut into blocks. Received: shape={self.shape}")
        width = math.prod(self.shape[self._row_axes :])
        if self.gates < 1 or width % self.gates:
            raise ValueError(f"{self.gates} gates do not divide the {width} columns of a weight of shape {self.shape}")
        if 0 in self.shape:
            raise ValueError(f"The weight is empty. Received: shape={self.shape}")
        if self.block_size[0] > self.rows or self.block_size[1] > self.cols:
            part = "one gate of the weight" if self.gates > 1 else "the weight"
            raise ValueError(
                f"The block is larger than {part}, {self.rows} x {self.cols} (inputs x outputs). "
                f"Received: block_size={self.block_size}, shape={self.shape}. Choose a smaller block_size"
            )

    @property
    def _row_axes(self) -> int:
        return len(self.shape) - 1 if self.row_axes is None else self.row_axes

    @property
    def rows(self) -> int:
        """Inputs of the matrix."""
        return math.prod(self.shape[: self._row_axes])

    @property
    def cols(self) -> int:
        """Outputs of one gate."""
        return math.prod(self.shape[self._row_axes :]) // self.gates

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Gates, block rows, block columns."""
        return self.gates, -(-self.rows // self.block_size[0]), -(-self.cols // self.block_size[1])

    @property
    def heights(self) -> np.ndarray:
        """Rows of each block row, int64 `(block rows,)`."""
        return _sides(self.rows, self.block_size[0])

    @property
    def widths(self) -> np.ndarray:
        """Columns of each block column, int64 `(block columns,)`."""
        return _sides(self.cols, self.block_size[1])

    @property
    def elements(self) -> np.ndarray:
        """How many elements each block of a gate really has, int64 `(block rows, block columns)`."""
        return np.outer(self.heights, self.widths)

    def gate_matrices(self, weight: np.ndarray) -> np.ndarray:
        """The weight as `(gates, rows, cols)`, a view where numpy can."""
        weight = np.asarray(weight)
        if weight.shape != self.shape:
            raise ValueError(f"This grid cuts a weight of shape {self.shape}. Received: shape={weight.shape}")
        return weight.reshape(self.rows, self.gates, self.cols).swapaxes(0, 1)

    def scores(self, weight: np.ndarray, score: Score = "l2", neighborhood: BlockSize | None = None) -> np.ndarray:
        """One number a block: the larger, the more the block matters.

        Args:
            weight: array of the grid's shape.
            score: "max" (largest magnitude, the paper's choice), "mean" (mean magnitude), "l2" (root of the mean
                square), or a callable that maps blocks `(n, block rows, block cols)` to `(n,)` scores. A callable sees
                ragged blocks filled up with zeros.
            neighborhood: rows and columns of larger blocks, multiples of `block_size`. A block then has the geometric
                mean of its own score and that of the larger one it lies in.

        Returns:
            float array of `grid_shape`.

        Raises:
            ValueError: a callable returns the wrong shape, or, with `neighborhood`, scores below 0.
        """
        if neighborhood is not None:
            return self._scores_with_neighbors(weight, score, neighborhood)
        matrices = self.gate_matrices(weight)
        if callable(score):
            return self._custom_scores(matrices, score)
        if score == "max":
            return self._reduce(np.abs(matrices), np.maximum)
        if score == "mean":
            return self._reduce(np.abs(matrices), np.add) / self.elements
        if score == "l2":
            return np.sqrt(self._reduce(np.square(matrices), np.add) / self.elements)
        raise ValueError(f"`score` must be one of {SCORES} or a callable. Received: score={score!r}")

    def nonzero_blocks(self, weight: np.ndarray) -> np.ndarray:
        """Which blocks hold an element that is not zero, bool of `grid_shape`."""
        return self._reduce(self.gate_matrices(weight) != 0, np.logical_or)

    def expand(self, blocks: np.ndarray) -> np.ndarray:
        """A value for each block, spread over the block's elements: an array of the weight's shape."""
        full = np.repeat(np.repeat(blocks, self.heights, axis=1), self.widths, axis=2)
        return np.ascontiguousarray(full.swapaxes(0, 1)).reshape(self.shape)

    def diagonal_blocks(self) -> np.ndarray:
        """Blocks that the main diagonal of a gate passes through, bool `(block rows, block columns)`."""
        index = np.arange(min(self.rows, self.cols))
        blocks = np.zeros(self.grid_shape[1:], bool)
        blocks[index // self.block_size[0], index // self.block_size[1]] = True
        return blocks

    def _reduce(self, matrices: np.ndarray, ufunc: np.ufunc) -> np.ndarray:
        (height, width), (_, rows, cols) = self.block_size, matrices.shape
        # Columns first: they are contiguous, and what is left for the strided pass is smaller.
        matrices = ufunc.reduceat(matrices, np.arange(0, cols, width), axis=2) if width > 1 else matrices
        return ufunc.reduceat(matrices, np.arange(0, rows, height), axis=1) if height > 1 else matrices

    def _scores_with_neighbors(self, weight: np.ndarray, score: Score, neighborhood: BlockSize) -> np.ndarray:
        # A weight may be smaller than the neighborhood; it is one neighborhood then.
        sides = min(neighborhood[0], self.rows), min(neighborhood[1], self.cols)
        around = BlockGrid(self.shape, sides, self.gates, self.row_axes)
        _, down, across = self.grid_shape
        own, larger = self.scores(weight, score), around.scores(weight, score)
        if (own < 0).any() or (larger < 0).any():
            raise ValueError(f"With `neighborhood` a score must not be below 0. Received: {own.min()} from {score!r}")
        rows = np.arange(down) * self.block_size[0] // sides[0]
        cols = np.arange(across) * self.block_size[1] // sides[1]
        # The root of each, not of their product, which may be too small for float32.
        return np.sqrt(own) * np.sqrt(larger[:, rows[:, None], cols])

    def _custom_scores(self, matrices: np.ndarray, score: ScoreFunction) -> np.ndarray:
        (gates, down, across), (height, width) = self.grid_shape, self.block_size
        padded = np.pad(matrices, ((0, 0), (0, down * height - self.rows), (0, across * width - self.cols)))
        blocks = padded.reshape(gates, down, height, across, width).swapaxes(2, 3).reshape(-1, height, width)
        scores = np.asarray(score(blocks), float)
        if scores.shape != (len(blocks),):
            raise ValueError(
                f"A score callable gets blocks of shape {blocks.shape} and must return shape ({len(blocks)},). "
                f"Received: shape={scores.shape} from {score!r}"
            )
        return scores.reshape(self.grid_shape)


def _sides(length: int, block: int) -> np.ndarray:
    return np.diff(np.append(np.arange(0, length, block), length))


def keep_blocks(
    scores: np.ndarray, elements: np.ndarray, sparsity: float, always: np.ndarray | None = None
) -> np.ndarray:
    """Which blocks of one matrix to keep, so that a share `sparsity` of its elements becomes zero.

    The lowest scores go first. The zeroed elements come within half a block of the target, real elements counted; the
    one exception is that at least one block stays as long as `sparsity` is below 1, since a matrix of zeros is a dead
    layer and not a sparse one.

    Args:
        scores: block scores, any shape.
        elements: elements of each block, same shape.
        sparsity: share of elements to zero, in [0, 1].
        always: blocks that stay whatever their score, bool of the same shape.

    Returns:
        bool array of the shape of `scores`, true where a block is kept.

    Raises:
        ValueError: a score is NaN.
    """
    flat, sizes = np.array(scores, float).ravel(), np.asarray(elements).ravel()
    if np.isnan(flat).any():
        raise ValueError("Block scores hold NaN; the weights (or the score callable) are broken")
    if always is not None:
        flat[always.ravel()] = np.inf
    target = sparsity * sizes.sum()
    if sizes.min() == sizes.max():
        count = round(target / int(sizes[0]))
        order = np.argpartition(flat, count) if 0 < count < flat.size else np.arange(flat.size)
    else:
        order = np.argsort(flat, kind="stable")
        count = int(np.argmin(np.abs(np.append(0, np.cumsum(sizes[order])) - target)))
    if count == flat.size and sparsity < 1:
        order, count = np.argsort(flat, kind="stable"), count - 1
    keep = np.ones(flat.size, bool)
    keep[order[:count]] = False
    if always is not None:
        keep |= always.ravel()
    return keep.reshape(np.shape(scores))


def infer_block_size(
    weight: np.ndarray, gates: int = 1, candidates: Sequence[BlockSize] = COMMON_BLOCK_SIZES
) -> BlockSize:
    """The largest common block shape whose zero blocks explain every zero of `weight`; (1, 1) if none does.

    Args:
        weight: matrix `(rows, gates * cols)`, inputs x outputs.
        gates: equal parts beside each other in the last axis.
        candidates: shapes to try, the preferred first.
    """
    weight = np.asarray(weight)
    zeros = int(np.count_nonzero(weight == 0))
    if zeros:
        for block_size in candidates:
            try:
                grid = BlockGrid(weight.shape, block_size, gates)
            except ValueError:
                continue
            # A stray exact zero inside a kept block (an untouched embedding row, say) must not hide the pattern.
            explained = int((~grid.nonzero_blocks(weight) * grid.elements).sum())
            if explained >= 0.99 * zeros:
                return block_size
    return 1, 1
