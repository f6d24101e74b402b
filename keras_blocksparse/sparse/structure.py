"""BlockStructure: which blocks of a matrix are kept, without their values."""

from __future__ import annotations

import base64
import ctypes
import functools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_blocksparse.blocks import BlockGrid, BlockSize
from keras_blocksparse.sparse import _native


@dataclass(frozen=True, eq=False)
class BlockStructure:
    """Which blocks of a matrix are kept: all that must be known before there are weights.

    The native ops carry it in the graph; layers carry it in their config. The values are a flat tensor beside it.

    Args:
        shape: rows (inputs) and columns (outputs, of all gates).
        block_size: rows and columns of a block. Blocks at the edges may be smaller.
        gates: equal parts beside each other in the columns; no block crosses from one into the next.
        dtype: what values are stored as: "float32", "bfloat16" or "int8".
        keep: bool of the grid's shape `(gates, block rows, block columns)`.

    Raises:
        ValueError: the shapes do not fit each other, or `dtype` is unknown.
    """

    shape: tuple[int, int]
    block_size: BlockSize
    gates: int
    dtype: str
    keep: np.ndarray

    def __post_init__(self) -> None:
        """Checks."""
        check_dtype(self.dtype)
        grid = BlockGrid(self.shape, self.block_size, self.gates)
        keep = np.ascontiguousarray(self.keep, bool)
        if keep.shape != grid.grid_shape:
            raise ValueError(f"`keep` must have the grid's shape {grid.grid_shape}. Received: shape={keep.shape}")
        object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        object.__setattr__(self, "block_size", grid.block_size)
        object.__setattr__(self, "keep", keep)

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        return pack(self, None)

    @functools.cached_property
    def _info(self) -> _native.Info:
        info = _native.Info()
        _native.call("kbs_inspect", self._whole.ctypes.data, self._whole.size, ctypes.byref(info))
        return info

    @functools.cached_property
    def packed(self) -> bytes:
        """What the native kernels read of it."""
        return self._whole[: self._info.values_offset].tobytes()

    @property
    def values_shape(self) -> tuple[int]:
        """Shape of the flat tensor of values."""
        nbytes = int(self._info.values_bytes)
        return (nbytes // 4 if self.dtype == "float32" else nbytes,)

    @property
    def values_dtype(self) -> str:
        """Type of the tensor of values: float32, or uint8 for weights that are stored in fewer bits."""
        return "float32" if self.dtype == "float32" else "uint8"

    @property
    def density(self) -> float:
        """Share of the elements that lie in kept blocks."""
        elements = BlockGrid(self.shape, self.block_size, self.gates).elements
        return float((elements * self.keep).sum() / np.prod(self.shape))

    def get_config(self) -> dict[str, Any]:
        """JSON-serializable: one bit for each block, compressed."""
        bits = zlib.compress(np.packbits(self.keep).tobytes(), 9)
        return {
            "shape": list(self.shape),
            "block_size": list(self.block_size),
            "gates": self.gates,
            "dtype": self.dtype,
            "keep": base64.b64encode(bits).decode(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockStructure:
        """The structure that `get_config` described.

        Raises:
            ValueError: the config is damaged.
        """
        try:
            rows, cols = (int(side) for side in config["shape"])
            height, width = (int(side) for side in config["block_size"])
            gates, dtype = int(config["gates"]), str(config["dtype"])
            grid = BlockGrid((rows, cols), (height, width), gates)
            count = int(np.prod(grid.grid_shape))
            inflate = zlib.decompressobj()  # never more than the grid asks for, whatever the config holds
            bits = inflate.decompress(base64.b64decode(config["keep"], validate=True), (count + 7) // 8)
            keep = np.unpackbits(np.frombuffer(bits, np.uint8), count=count)
            if len(bits) != (count + 7) // 8:
                raise ValueError(f"the grid has {count} blocks, the config holds {len(bits)} bytes of bits")
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"Not the config of a block structure: {error}") from error
        return cls((rows, cols), (height, width), gates, dtype, keep.reshape(grid.grid_shape))


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless values can be stored so."""
    if dtype not in _native.DTYPES:
        raise ValueError(f"`dtype` must be one of {tuple(_native.DTYPES)}. Received: dtype={dtype!r}")


def pack(structure: BlockStructure, w: np.ndarray | None) -> np.ndarray:
    """The structure and the blocks of `w`, or zeros, as the native library wants them: uint8, aligned."""
    arguments = (
        None if w is None else w.ctypes.data_as(_native.FloatPointer),
        *structure.shape,
        structure.gates,
        *structure.block_size,
        _native.DTYPES[structure.dtype],
        structure.keep.ctypes.data_as(_native.BytePointer),
    )
    size = ctypes.c_int64()
    _native.call("kbs_packed_bytes", *arguments, ctypes.byref(size))
    packed = aligned_bytes(size.value)
    _native.call("kbs_pack", *arguments, packed.ctypes.data, packed.size)
    return packed


def aligned_bytes(size: int) -> np.ndarray:
    """Zeroed bytes that begin at a cache line."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]
