"""The block-sparse products of the Opus codec (dnn/vec_avx.h, vec_neon.h), from a checkout of its sources.

Its blocks are 4 inputs x 8 outputs, for batch 1 only; larger blocks are made of these. It is no package, so it takes
part only where `--opus DIR` says that it is there.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks._timing import compile_and_load
from keras_blocksparse.blocks import BlockGrid

_WRAPPER = """
#include "vec.h"
void kbs_opus_sgemv(float *y, const float *w, const int *index, int rows, const float *x) {
  sparse_sgemv8x4(y, w, index, rows, x);
}
void kbs_opus_cgemv(float *y, const opus_int8 *w, const int *index, const float *scale, int rows, int cols,
                    const float *x) {
  sparse_cgemv8x4(y, w, index, scale, rows, cols, x);
}
"""


class Opus:
    """Its two functions, compiled for this machine."""

    def __init__(self, folder: Path) -> None:
        headers = [folder / "dnn" / name for name in ("vec.h", "vec_avx.h", "vec_neon.h")]
        if missing := [str(path) for path in headers if not path.is_file()]:
            raise SystemExit(f"--opus must name a checkout of the Opus sources. Missing: {', '.join(missing)}")
        with tempfile.TemporaryDirectory() as copies:
            for path in headers:  # a buffer on its stack is too short for our rows
                text = re.sub(r"#define MAX_INPUTS \(?2048\)?", "#define MAX_INPUTS 8192", path.read_text())
                Path(copies, path.name).write_text(text)
            includes = [f"-I{copies}", *(f"-I{folder / name}" for name in ("dnn", "celt", "include", "."))]
            self._lib = compile_and_load(_WRAPPER, ".c", *includes)

    def float32(self, w: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
        """`sparse_sgemv8x4`."""
        index, blocks = _pack(w)
        return self._call(self._lib.kbs_opus_sgemv, w.shape[1], [np.ascontiguousarray(blocks), index], [], x)

    def int8(self, w: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
        """`sparse_cgemv8x4`, with a scale for each output. Inputs lie within -1 and 1.

        It quantizes x to 0...254, 127 being zero; taking that off again is left to the bias in Opus, and to nobody
        here: `offset` of what is returned has what to add.
        """
        scale = np.abs(w).max(0) / 127
        scale[scale == 0] = 1
        quantized = np.rint(w / scale)
        index, blocks = _pack(quantized)
        values = np.ascontiguousarray(blocks.swapaxes(1, 2)).astype(np.int8)
        factor = (scale / 127).astype(np.float32)
        call = self._call(self._lib.kbs_opus_cgemv, w.shape[1], [values, index, factor], [w.shape[0]], x)
        call.offset = (-127 * quantized.sum(0) * factor).astype(np.float32)  # type: ignore[attr-defined]
        return call

    @staticmethod
    def _call(
        function: Callable[..., object], cols: int, arrays: list[np.ndarray], sizes: list[int], x: np.ndarray
    ) -> Callable[[], np.ndarray]:
        y = np.empty((1, cols), np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (y, *arrays)]
        arguments = [*pointers, *map(ctypes.c_int, (cols, *sizes)), ctypes.c_void_p(x.ctypes.data)]

        def call() -> np.ndarray:
            function(*arguments)
            return y

        call.keep = arrays, x  # type: ignore[attr-defined]
        return call


def _pack(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its index (for each 8 outputs: how many blocks, then the first input of each) and the blocks, (n, 4, 8)."""
    kept = BlockGrid(w.shape, (4, 8)).nonzero_blocks(w)[0]  # (inputs / 4, outputs / 8)
    index = np.concatenate([[len(rows), *(4 * rows)] for rows in map(np.flatnonzero, kept.T)]).astype(np.int32)
    blocks = w.reshape(len(kept), 4, kept.shape[1], 8).transpose(2, 0, 1, 3)[kept.T]
    return index, blocks.astype(w.dtype)
