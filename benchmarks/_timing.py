"""Times of several pieces of work taken in turns, and what the machine itself can do.

On a shared machine everything gets slower or faster together, for seconds at a time. So each piece of work has a short
turn in every round, and medians over all rounds are compared. A turn begins with calls that are not counted: they bring
the work's own weights back into the caches, which the work before it filled with others. That takes about five calls
where a cache only gets what another one drops.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Work = Callable[[], object]

TURN_SECONDS, TURN_CALLS = 0.006, 20
WARM_UP_SECONDS, WARM_UP_CALLS = 0.006, 5
# So slow that its weights are out of the caches by the end of a call: another call for warming up would change nothing.
SLOW_SECONDS = 0.1


def in_turns(works: Mapping[Key, Work], rounds: int, label: str = "") -> dict[Key, float]:
    """Median seconds of one call of each.

    Args:
        works: what to call.
        rounds: how many turns each has.
        label: shown with the progress, if there is a terminal.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    for work in works.values():  # compilation, and buffers that libraries allocate at the first call
        work()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            _progress(f"{label}: round {number + 1} of {rounds}")
            for key, work in works.items():
                seconds[key] += _turn(work, seconds[key][-1] if seconds[key] else 0.0)
    finally:
        gc.enable()
        _progress("")
    return {key: statistics.median(values) for key, values in seconds.items()}


def _turn(work: Work, last: float) -> list[float]:
    if last < SLOW_SECONDS:
        _calls(work, WARM_UP_CALLS, WARM_UP_SECONDS)
    return _calls(work, TURN_CALLS, TURN_SECONDS)


def _calls(work: Work, most: int, seconds: float) -> list[float]:
    """Calls until the time is over, once at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        stop = time.perf_counter()
        times.append(stop - start)
        if stop >= end or len(times) == most:
            return times


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# A read of a buffer, and multiply-adds in registers.
_LIMITS = r"""
#include <stddef.h>
extern "C" float read_all(const void*, size_t, size_t), multiply_add(size_t);
typedef float V __attribute__((vector_size(64)));
float read_all(const void* buffer, size_t n, size_t times) {
  const V* p = (const V*)buffer;
  V sum[8] = {};
  for (; times; times--) {
    for (size_t i = 0; i + 8 <= n; i += 8)
      for (int j = 0; j < 8; j++) sum[j] += p[i + j];
    __asm__ volatile("" ::: "memory");
  }
  for (int j = 1; j < 8; j++) sum[0] += sum[j];
  return sum[0][0];
}
// As wide as the machine's registers, and no more sums than it has registers for. Always 256 lanes in a round of n.
#if defined __AVX512F__
enum { kBytes = 64, kSums = 16 };
#elif defined __AVX__
enum { kBytes = 32, kSums = 8 };
#else
enum { kBytes = 16, kSums = 8 };
#endif
#if defined __aarch64__
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+v"
#endif
typedef float R __attribute__((vector_size(kBytes)));
float multiply_add(size_t n) {
  R x = R{} + 0.999f, y = R{} + 1e-3f, sum[kSums];
#pragma GCC unroll 16
  for (int j = 0; j < kSums; j++) sum[j] = x;
  for (size_t i = 0; i < n * (256 * 4 / kBytes / kSums); i++)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; j++) {
      sum[j] = sum[j] * x + y;
      __asm__ volatile("" : IN_REGISTER(sum[j]));
    }
#pragma GCC unroll 16
  for (int j = 1; j < kSums; j++) sum[0] += sum[j];
  return sum[0][0];
}
"""


def compile_and_load(source: str, suffix: str, *arguments: str) -> ctypes.CDLL:
    """A small C or C++ file, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder, f"source{suffix}"), Path(folder, "library.so")
        path.write_text(source)
        compiler = "g++" if suffix == ".cc" else "gcc"
        subprocess.run(
            [compiler, "-fPIC", "-O3", "-march=native", "-w", "-shared", "-o", str(library), str(path), *arguments],
            check=True,
        )
        return ctypes.CDLL(str(library))


class Limits:
    """Reads and multiply-adds that do nothing else, as work to take turns with what is measured."""

    FLOPS = 20_000 * 16 * 16 * 2  #: in one call of `multiply_add`

    def __init__(self) -> None:
        self._lib = compile_and_load(_LIMITS, ".cc")
        self._lib.read_all.restype = self._lib.multiply_add.restype = ctypes.c_float
        self._pool = ThreadPoolExecutor(2)

    def multiply_add(self, count: int = 20_000) -> Work:
        """`FLOPS` floating-point operations that wait for no memory (times `count` / 20000)."""
        argument = ctypes.c_size_t(count)
        return lambda: self._lib.multiply_add(argument)

    def read(self, nbytes: int, times: int = 1) -> Work:
        """Reads a buffer of `nbytes`."""
        buffer = np.ones(nbytes // 4 + 32, np.float32)
        address = buffer.ctypes.data + -buffer.ctypes.data % 64
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(nbytes // 64), ctypes.c_size_t(times)
        return lambda: (self._lib.read_all(*arguments), buffer)

    def by_two(self, first: Work, second: Work) -> Work:
        """Both at once, on two threads, for work much longer than handing it over and spreading over the cores."""
        return lambda: [task.result() for task in (self._pool.submit(first), self._pool.submit(second))]
