"""BlockSparseMatrix: a weight matrix of which only the non-zero blocks are kept."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import numpy as np

from keras_blocksparse.blocks import BlockGrid, BlockSize
from keras_blocksparse.sparse import _native
from keras_blocksparse.sparse.structure import BlockStructure, aligned_bytes, pack


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
            aligned = aligned_bytes(data.size)
            aligned[:] = data
            data = aligned
        self._packed = data
        self._info = _native.Info()
        _native.call("kbs_inspect", data.ctypes.data, data.size, ctypes.byref(self._info))
        self._owner = _Handle(data)
        self._handle = self._owner.pointer
        self._transposed = False

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
        w = np.ascontiguousarray(w, np.float32)
        if w.ndim != 2:
            raise ValueError(f"`w` must be a matrix. Received: shape={w.shape}")
        if keep is None:
            keep = BlockGrid(w.shape, block_size, gates).nonzero_blocks(w)
        return cls(pack(BlockStructure(w.shape, block_size, gates, dtype, keep), w))

    @classmethod
    def from_values(cls, structure: BlockStructure, values: Any) -> BlockSparseMatrix:
        """Puts values, flat as `values` gives them, into a structure.

        Raises:
            ValueError: there are more or fewer than the structure holds.
        """
        values = np.ascontiguousarray(values, structure.values_dtype)
        if values.shape != structure.values_shape:
            raise ValueError(f"`values` must have shape {structure.values_shape}. Received: shape={values.shape}")
        packed = pack(structure, None)
        packed[len(structure.packed) :] = values.view(np.uint8)
        return cls(packed)

    @property
    def structure(self) -> BlockStructure:
        """Which blocks are kept, without the values."""
        self._refuse_transposed("structure")
        if self._owner.structure is None:
            grid = BlockGrid(self.shape, self.block_size, self.gates)
            keep = np.empty(grid.grid_shape, np.uint8)
            pointer = keep.ctypes.data_as(_native.BytePointer)
            _native.call("kbs_kept_blocks", self._packed.ctypes.data, self._packed.size, pointer)
            self._owner.structure = BlockStructure(
                self.shape, self.block_size, self.gates, self.dtype, keep.astype(bool)
            )
        return self._owner.structure

    @property
    def transposed(self) -> bool:
        """Whether this is the `T` of a matrix that was packed."""
        return self._transposed

    @property
    def T(self) -> BlockSparseMatrix:
        """The transposed matrix: the same memory, read the other way. Not for int8."""
        if self.dtype == "int8":
            raise ValueError("int8 matrices have no transposed product. Use float32 or bfloat16")
        other = copy.copy(self)
        other._transposed = not self._transposed
        return other

    def _refuse_transposed(self, what: str) -> None:
        if self._transposed:
            raise ValueError(f"A transposed matrix has no `{what}` of its own. Use that of the matrix, `W.T.{what}`")

    @property
    def packed(self) -> np.ndarray:
        """The whole matrix as bytes, uint8: what to save. Read-only."""
        self._refuse_transposed("packed")
        view = self._packed.view()
        view.flags.writeable = False
        return view

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (inputs) and columns (outputs, of all gates)."""
        shape = int(self._info.rows), int(self._info.cols)
        return shape[::-1] if self._transposed else shape

    @property
    def gates(self) -> int:
        """Equal parts beside each other in the columns; of a transposed matrix, in the rows."""
        return int(self._info.gates)

    @property
    def block_size(self) -> BlockSize:
        """Rows and columns of a block."""
        size = int(self._info.block_rows), int(self._info.block_cols)
        return size[::-1] if self._transposed else size

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
        """What fills the structure, flat: a view.

        float32: the weights; `positions` tells which belongs where. Else uint8, which only the native library reads.
        """
        start = int(self._info.values_offset)
        values = self._packed[start : start + int(self._info.values_bytes)]
        return values.view(np.float32) if self.dtype == "float32" else values

    @property
    def positions(self) -> np.ndarray:
        """Where each of `values` belongs in the flat dense matrix, int64; -1 for padding. float32 only."""
        self._refuse_transposed("positions")
        out = np.empty(int(self._info.values_bytes) // 4, np.int64)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        _native.call("kbs_positions", self._packed.ctypes.data, self._packed.size, pointer)
        return out

    def to_dense(self) -> np.ndarray:
        """The matrix with its zeros, float32."""
        w = np.empty((int(self._info.rows), int(self._info.cols)), np.float32)
        _native.call("kbs_unpack", self._packed.ctypes.data, self._packed.size, _floats(w))
        return np.ascontiguousarray(w.T) if self._transposed else w

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
        floats, batch = (_floats(x), rows, x.size // rows), (_floats(y), cols)
        if self._transposed:
            _native.call("kbs_matmul_transposed", self._handle, None, *floats, *batch)
            return y if bias is None else y + bias
        _native.call("kbs_matmul", self._handle, None, *floats, _floats(bias), 0, *batch)
        return y

    def __repr__(self) -> str:
        rows, cols = self.shape
        height, width = self.block_size
        return f"<BlockSparseMatrix {rows} x {cols}, blocks {height}x{width}, {self.density:.1%} dense, {self.dtype}>"


class _Handle:
    """A prepared matrix of the native library, which reads `packed` as long as it lives."""

    def __init__(self, packed: np.ndarray) -> None:
        self.pointer = ctypes.c_void_p()
        _native.call("kbs_matrix_create", packed.ctypes.data, packed.size, 0, ctypes.byref(self.pointer))
        self.structure: BlockStructure | None = None  # for all views, once one has asked
        self._packed = packed
        self._destroy = _native.library().kbs_matrix_destroy

    def __del__(self) -> None:
        """Frees it."""
        if hasattr(self, "_destroy"):
            self._destroy(self.pointer)


def _floats(array: np.ndarray | None) -> Any:
    return None if array is None else array.ctypes.data_as(_native.FloatPointer)
