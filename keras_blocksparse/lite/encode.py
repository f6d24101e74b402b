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
