"""The native products against what the machine can do: read bandwidth and FMA peak, measured in the same run.

python -m benchmarks.kernels [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, _native, get_isa, set_num_threads

ROWS, COLS, SPARSITY = 2560, 7680, 0.9

# What the machine can do, in C: a read of a buffer as large as the weights, and multiply-adds in registers.
LIMITS = r"""
#include <stddef.h>
extern "C" float read_all(const void*, size_t), multiply_add(size_t);
typedef float V __attribute__((vector_size(64)));
float read_all(const void* buffer, size_t n) {
  const V* p = (const V*)buffer;
  V sum[8] = {};
  for (size_t i = 0; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) sum[j] += p[i + j];
  for (int j = 1; j < 8; j++) sum[0] += sum[j];
  return sum[0][0];
}
float multiply_add(size_t n) {
  V x = V{} + 0.999f, y = V{} + 1e-3f, sum[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) sum[j] = x;
  for (size_t i = 0; i < n; i++)
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      sum[j] = sum[j] * x + y;
      __asm__ volatile("" : "+v"(sum[j]));
    }
#pragma GCC unroll 16
  for (int j = 1; j < 16; j++) sum[0] += sum[j];
  return sum[0][0];
}
"""


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of one call, after a few to warm up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Limits:
    """Read bandwidth and FMA peak of one core."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "limits.cc"), Path(folder, "limits.so")
            source.write_text(LIMITS)
            command = ["g++", "-fPIC", "-O3", "-march=native", "-w", "-shared", "-o", str(library), str(source)]
            subprocess.run(command, check=True)
            self._lib = ctypes.CDLL(str(library))
        self._lib.read_all.restype = self._lib.multiply_add.restype = ctypes.c_float
        count = 200_000
        seconds = median_seconds(lambda: self._lib.multiply_add(ctypes.c_size_t(count)), repeats)
        self.flops = count * 16 * 16 * 2 / seconds

    def read_seconds(self, nbytes: int) -> float:
        """Time to read a buffer of this size once, if it was read before."""
        buffer = np.ones(nbytes // 4 + 32, np.float32)
        address = buffer.ctypes.data + -buffer.ctypes.data % 64
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(nbytes // 64)
        return median_seconds(lambda: self._lib.read_all(*arguments), self.repeats)


def pruned(block_size: tuple[int, int], rows: int = ROWS, cols: int = COLS, sparsity: float = SPARSITY) -> np.ndarray:
    """A matrix whose blocks are zero at random, the same for every peer."""
    rng = np.random.default_rng(7)
    grid = BlockGrid((rows, cols), block_size)
    keep = rng.permutation(grid.grid_shape[1] * grid.grid_shape[2]).reshape(grid.grid_shape)
    return (rng.standard_normal((rows, cols)) * grid.expand(keep >= sparsity * keep.size)).astype(np.float32)


def ours(matrix: BlockSparseMatrix, x: np.ndarray) -> Callable[[], object]:
    """One product by libkbs, without numpy's part in it."""
    y = np.empty((len(x), matrix.shape[1]), np.float32)
    function = _native.library().kbs_matmul
    pointers = x.ctypes.data_as(_native.FloatPointer), y.ctypes.data_as(_native.FloatPointer)
    rows, cols = matrix.shape
    return lambda: (function(matrix._handle, None, pointers[0], rows, len(x), None, 0, pointers[1], cols), x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    repeats = 15 if arguments.quick else 101
    set_num_threads(arguments.threads)
    limits = Limits(repeats)
    print(
        f"{cpu()}, {os.cpu_count()} cores, {arguments.threads} thread(s), {get_isa()}, numpy {np.__version__}; medians"
    )
    print(f"{ROWS} x {COLS}, {SPARSITY:.0%} zero. FMA peak {limits.flops / 1e9:.0f} GFLOP/s a core")
    print("of read: time to read a buffer of the same size once; of peak: multiply-adds of the kept blocks\n")
    columns = ("dtype", "block", "batch", "us", "MB", "GB/s", "read us", "of read", "GFLOP/s", "of peak")
    print("".join(f"{name:>10}" for name in columns))
    for dtype in ("float32", "bfloat16", "int8"):
        for block_size in ((16, 16), (4, 4), (8, 4), (4, 8), (32, 32)):
            matrix = BlockSparseMatrix.from_dense(pruned(block_size), block_size, dtype=dtype)
            read = limits.read_seconds(matrix.nbytes)
            for batch in (1, 2, 4, 8, 32):
                x = np.random.default_rng(1).standard_normal((batch, ROWS)).astype(np.float32)
                seconds = median_seconds(ours(matrix, x), repeats)
                flops = 2 * matrix.density * ROWS * COLS * batch / seconds
                numbers = (
                    f"{seconds * 1e6:.1f}",
                    f"{matrix.nbytes / 1e6:.1f}",
                    f"{matrix.nbytes / seconds / 1e9:.1f}",
                    f"{read * 1e6:.1f}",
                    f"{read / seconds:.2f}",
                    f"{flops / 1e9:.1f}",
                    f"{flops / limits.flops:.2f}",
                )
                block = f"{block_size[0]}x{block_size[1]}"
                print("".join(f"{text:>10}" for text in (dtype, block, str(batch), *numbers)))


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
