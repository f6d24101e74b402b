"""BlockSparseMatrix: a weight matrix of which only the non-zero blocks are kept."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from keras_blocksparse.blocks import BlockGrid, BlockSize
from keras_blocksparse.sparse import _native


class BlockSparseMatrix:
    """A matrix of inputs x outputs that holds its non-zero blocks, packed for the native kernels.

    Example:

    >>> w = np.zeros((64, 96), "float32")
    >>> w[:16, 16:32] = 1
    >>> matrix = kbs.BlockSparseMatrix.from_dense(w, block_size=(16, 16))
    >>> matrix.density
    0.041666666666666664
    >>> matrix.matmul(np.ones((1, 64), "float32"))[0, 16]
    np.float32(16.0)

    Args:
        packed: bytes that `from_dense(...).packed` gave, from any machine. They are checked before anything uses them.
            An array is copied if it is not aligned to 64 bytes, and must not change afterwards if it is.

    Raises:
        ValueError: they are truncated, or not a packed matrix.
    """

    def __init__(self, packed: bytes | np.ndarray) -> None:
        data = (
            np.frombuffer(packed, np.uint8) if not isinstance(packed, np.ndarray) else packed.reshape(-1).view(np.uint8)
        )
        if data.ctypes.data % 64:
            aligned = _aligned_bytes(data.size)
            aligned[:] = data
            data = aligned
        self._packed = data
        self._info = _native.Info()
        _native.call("kbs_inspect", data.ctypes.data, data.size, ctypes.byref(self._info))
        handle = ctypes.c_void_p()
        _native.call("kbs_matrix_create", data.ctypes.data, data.size, 0, ctypes.byref(handle))
        self._handle = handle
        self._destroy = _native.library().kbs_matrix_destroy

    @classmethod
    def from_dense(
        cls,
        w: Any,
        block_size: BlockSize,
        gates: int = 1,
        dtype: str = "float32",
        keep: np.ndarray | None = None,
    ) -> BlockSparseMatrix:
        """Packs the blocks of `w` that hold a non-zero.

        Args:
            w: matrix `(rows, gates * cols)`, inputs x outputs.
            block_size: rows and columns of a block. Blocks at the edges may be smaller.
            gates: equal parts beside each other in the columns; no block crosses from one into the next.
            dtype: "float32"; "bfloat16", which halves the size; or "int8" with a scale for each output, a quarter.
            keep: which blocks to keep instead of the non-zero ones, bool of the grid's shape
                `(gates, block rows, block columns)`.

        Raises:
            ValueError: the shapes do not fit each other, or `dtype` is unknown.
        """
        if dtype not in _native.DTYPES:
            raise ValueError(f"`dtype` must be one of {tuple(_native.DTYPES)}. Received: dtype={dtype!r}")
        w = np.ascontiguousarray(w, np.float32)
        if w.ndim != 2:
            raise ValueError(f"`w` must be a matrix. Received: shape={w.shape}")
        grid = BlockGrid(w.shape, block_size, gates)
        if keep is not None:
            keep = np.ascontiguousarray(keep, np.uint8)
            if keep.shape != grid.grid_shape:
                raise ValueError(f"`keep` must have the grid's shape {grid.grid_shape}. Received: shape={keep.shape}")
        arguments = (
            _floats(w),
            *w.shape,
            gates,
            *grid.block_size,
            _native.DTYPES[dtype],
            None if keep is None else keep.ctypes.data_as(_native.BytePointer),
        )
        size = ctypes.c_int64()
        _native.call("kbs_packed_bytes", *arguments, ctypes.byref(size))
        packed = _aligned_bytes(size.value)
        _native.call("kbs_pack", *arguments, packed.ctypes.data, packed.size)
        return cls(packed)

    @property
    def packed(self) -> np.ndarray:
        """The whole matrix as bytes, uint8: what to save. Read-only."""
        view = self._packed.view()
        view.flags.writeable = False
        return view

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (inputs) and columns (outputs, of all gates)."""
        return int(self._info.rows), int(self._info.cols)

    @property
    def gates(self) -> int:
        """Equal parts beside each other in the columns."""
        return int(self._info.gates)

    @property
    def block_size(self) -> BlockSize:
        """Rows and columns of a block."""
        return int(self._info.block_rows), int(self._info.block_cols)

    @property
    def dtype(self) -> str:
        """What the values are stored as: "float32", "bfloat16" or "int8"."""
        return list(_native.DTYPES)[self._info.dtype]

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return int(self._info.blocks)

    @property
    def density(self) -> float:
        """Share of the elements that lie in kept blocks."""
        rows, cols = self.shape
        return int(self._info.elements) / (rows * cols)

    @property
    def nbytes(self) -> int:
        """Size of everything that is kept: values, indices and padding."""
        return int(self._info.bytes)

    @property
    def values(self) -> np.ndarray:
        """The packed values of a float32 matrix, flat: a view. `positions` tells what belongs where."""
        if self.dtype != "float32":
            raise ValueError(f"Only float32 matrices show their values. Received: dtype={self.dtype!r}")
        start = int(self._info.values_offset)
        return self._packed[start : start + int(self._info.values_bytes)].view(np.float32)

    @property
    def positions(self) -> np.ndarray:
        """Where each of `values` belongs in the flat dense matrix, int64; -1 for padding."""
        out = np.empty(int(self._info.values_bytes) // 4, np.int64)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        _native.call("kbs_positions", self._packed.ctypes.data, self._packed.size, pointer)
        return out

    def to_dense(self) -> np.ndarray:
        """The matrix with its zeros, float32."""
        w = np.empty(self.shape, np.float32)
        _native.call("kbs_unpack", self._packed.ctypes.data, self._packed.size, _floats(w))
        return w

    def matmul(self, x: Any, bias: np.ndarray | None = None) -> np.ndarray:
        """`x W + bias` for `x` of shape `(..., rows)`, float32.

        int8 matrices quantize each row of `x` to 8 bits.
        """
        x = np.ascontiguousarray(x, np.float32)
        rows, cols = self.shape
        if x.ndim < 1 or x.shape[-1] != rows:
            raise ValueError(f"`x` must end with the matrix's {rows} rows. Received: shape={x.shape}")
        if bias is not None:
            bias = np.ascontiguousarray(bias, np.float32)
            if bias.shape != (cols,):
                raise ValueError(f"`bias` must have shape ({cols},). Received: shape={bias.shape}")
        y = np.empty((*x.shape[:-1], cols), np.float32)
        _native.call(
            "kbs_matmul", self._handle, None, _floats(x), rows, x.size // rows, _floats(bias), 0, _floats(y), cols
        )
        return y

    def __repr__(self) -> str:
        rows, cols = self.shape
        height, width = self.block_size
        return f"<BlockSparseMatrix {rows} x {cols}, blocks {height}x{width}, {self.density:.1%} dense, {self.dtype}>"

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._destroy(self._handle)


def _floats(array: np.ndarray | None) -> Any:
    return None if array is None else array.ctypes.data_as(_native.FloatPointer)


def _aligned_bytes(size: int) -> np.ndarray:
    """Zeroed bytes that begin at a cache line."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
