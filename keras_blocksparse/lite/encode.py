"""Sparse encodings of one constant tensor, in numpy.

TFLite stores a sparse tensor as a tree over its dimensions, of which we use one form: the tensor is cut into blocks,
the outer block dimension is dense (a row of blocks after the other), the next one is compressed (CSR: `segments` and
`indices`), and the inside of a block is dense. For a fully connected weight, which TFLite keeps as (outputs, inputs),
that is

    segments[i] .. segments[i + 1]    the kept blocks of block row i
    indices[k]                        the block column of kept block k
    values[k]                         its elements, row by row

Nothing here knows flatbuffers or kernels; `flatbuffer.py` writes what comes out of here.
"""

from dataclasses import dataclass

import numpy as np

_MOST_BYTES = 1 << 32  # of a dense tensor: more is a lie, or no model for a device


@dataclass(frozen=True)
class BlockCSR:
    """A matrix as the blocks of it that hold a non-zero element.

    Attributes:
        shape: `(rows, cols)` of the dense matrix.
        block: `(rows, cols)` of one block; both divide `shape`.
        values: array `(kept, block_rows, block_cols)`, dtype of the matrix.
        segments: int64 array `(rows / block_rows + 1,)`.
        indices: int64 array `(kept,)`, increasing inside a block row.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    values: np.ndarray
    segments: np.ndarray
    indices: np.ndarray

    @property
    def kept(self) -> int:
        """Number of blocks that are stored."""
        return len(self.indices)

    @property
    def density(self) -> float:
        """Stored elements over all elements."""
        return self.kept * self.block[0] * self.block[1] / (self.shape[0] * self.shape[1])

    @property
    def max_per_row(self) -> int:
        """Stored blocks of the fullest block row."""
        return int(np.diff(self.segments).max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the values and both index vectors as they will be written."""
        return self.values.nbytes + smallest_index(self.segments).nbytes + smallest_index(self.indices).nbytes


def encode_blocks(matrix: np.ndarray, block: tuple[int, int]) -> BlockCSR:
    """Keeps the blocks of `matrix` that hold at least one element other than zero.

    A matrix of zeros keeps its first block: TFLite takes a tensor without a byte of data for one that is yet to be
    computed.

    Args:
        matrix: 2-D array.
        block: `(rows, cols)` of a block. Both must divide the shape of the matrix: the kernels read whole blocks.

    Returns:
        A `BlockCSR`.

    Raises:
        ValueError: if the matrix is not 2-D or the block does not divide it.
    """
    if matrix.ndim != 2:
        raise ValueError(f"encode_blocks takes a 2-D array. Received: shape={matrix.shape}")
    rows, cols = matrix.shape
    height, width = block
    if height < 1 or width < 1 or rows % height or cols % width:
        raise ValueError(f"Blocks must divide the matrix. Received: shape={matrix.shape}, block={block}")
    tiles = matrix.reshape(rows // height, height, cols // width, width).swapaxes(1, 2)
    keep = (tiles != 0).any(axis=(2, 3))
    if keep.size and not keep.any():
        keep[0, 0] = True
    segments = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int64)
    return BlockCSR(
        shape=(rows, cols),
        block=(height, width),
        values=np.ascontiguousarray(tiles[keep]),
        segments=segments,
        indices=np.nonzero(keep)[1].astype(np.int64),
    )


@dataclass(frozen=True)
class Level:
    """One level of the tree of a sparse tensor: `size` children of every node or, compressed, those that are listed."""

    size: int = 0
    segments: np.ndarray | None = None
    indices: np.ndarray | None = None


def decode(
    values: np.ndarray, shape: tuple[int, ...], order: list[int], block_map: list[int], levels: list[Level]
) -> np.ndarray:
    """The dense tensor, of any form of sparsity that the file format has. Nothing is taken for granted.

    Args:
        values: stored elements, 1-D.
        shape: of the dense tensor.
        order: which dimension each level walks; those from `len(shape)` on are the inner dimensions of blocks.
        block_map: which dimension each of the inner dimensions divides.
        levels: from the outermost to the innermost.

    Raises:
        ValueError: the description contradicts itself, the shape, or the number of elements.
    """
    rank = len(shape)
    if sorted(order) != list(range(rank + len(block_map))) or len(levels) != len(order):
        raise ValueError(f"levels do not belong to the shape. Received: shape={shape}, traversal_order={order}")
    if len(set(block_map)) != len(block_map) or not all(0 <= d < rank for d in block_map):
        raise ValueError(f"blocks do not belong to the shape. Received: shape={shape}, block_map={block_map}")
    if any(d < 0 for d in shape) or np.prod(shape, dtype=float) * values.itemsize > _MOST_BYTES:
        raise ValueError(f"the shape takes more than {_MOST_BYTES >> 30} GiB. Received: shape={shape}")
    limits = list(shape)
    for position, dim in enumerate(block_map):
        size = levels[order.index(rank + position)].size
        if size < 1 or shape[dim] % size:
            raise ValueError(f"blocks do not divide the shape. Received: shape={shape}, a block of {size}")
        limits[dim] //= size
        limits.append(size)
    elements, nodes = int(np.prod(shape)), 1
    paths: dict[int, np.ndarray] = {}
    for dim, level in zip(order, levels, strict=True):
        if level.segments is None or level.indices is None:
            if level.size != limits[dim] or nodes * level.size > elements:
                raise ValueError(f"a level of {level.size} does not belong to the shape. Received: shape={shape}")
            counts, indices = np.full(nodes, level.size), np.tile(np.arange(level.size), nodes)
        else:
            counts, indices = np.diff(level.segments), level.indices
            starts_well = len(level.segments) == nodes + 1 and level.segments[0] == 0
            if not starts_well or (counts < 0).any() or level.segments[-1] != len(indices):
                raise ValueError("segments do not enclose the indices")
            if len(indices) and not 0 <= indices.min() <= indices.max() < limits[dim]:
                raise ValueError(
                    f"an index lies outside of {limits[dim]}. Received: {indices.min()} to {indices.max()}"
                )
            if len(indices) > elements:
                raise ValueError("there are more indices than elements")
        paths = {d: np.repeat(path, counts) for d, path in paths.items()}
        paths[dim] = indices
        nodes = len(indices)
    if len(values) != nodes:
        raise ValueError(f"{nodes} elements are described, and {len(values)} are there")
    for position, dim in enumerate(block_map):
        paths[dim] = paths[dim] * limits[rank + position] + paths[rank + position]
    dense = np.zeros(shape, values.dtype)
    dense[tuple(paths[d] for d in range(rank))] = values
    return dense


def smallest_index(index: np.ndarray) -> np.ndarray:
    """Casts an index vector to the narrowest of uint8, uint16 and int32 that holds it.

    The three are the types the file format has; the interpreter widens each to int32 when it loads the file, so the
    kernels never see the difference.

    Raises:
        ValueError: if a value is negative or beyond int32.
    """
    low, high = int(index.min(initial=0)), int(index.max(initial=0))
    if low < 0 or high > np.iinfo(np.int32).max:
        raise ValueError(f"An index must lie in [0, 2**31). Received: values from {low} to {high}")
    for dtype in (np.uint8, np.uint16):
        if high <= np.iinfo(dtype).max:
            return index.astype(dtype)
    return index.astype(np.int32)
