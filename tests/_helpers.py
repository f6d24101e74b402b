"""What the training tests share: a literal way to count zero blocks, small models, and watchers for fit().

Nothing here uses the package's own block arithmetic: blocks are cut by plain loops, so that a test which passes says
something about the package and not about itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import keras_blocksparse as kbs

ROOT = Path(__file__).resolve().parent.parent

#: The block sizes that issue 2 names.
BLOCK_SIZES = [(1, 1), (4, 4), (8, 4), (16, 1), (4, 1), (8, 8), (12, 2), (16, 16), (32, 32)]

GATES = {"SimpleRNN": 1, "GRU": 3, "LSTM": 4}


def cut(matrix: np.ndarray, block_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The blocks of a matrix in row-major order, ragged ones at the far edges."""
    height, width = block_size
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            yield matrix[top : top + height, left : left + width]


def split_gates(weight: np.ndarray, gates: int, row_axes: int | None = None) -> list[np.ndarray]:
    """The gates of a weight as matrices of inputs x outputs."""
    weight = np.asarray(weight)
    rows = int(np.prod(weight.shape[: weight.ndim - 1 if row_axes is None else row_axes]))
    return np.split(weight.reshape(rows, -1), gates, axis=1)


def block_zeros(weight: np.ndarray, block_size: tuple[int, int], gates: int = 1, row_axes: int | None = None) -> list:
    """For each gate, how many elements lie in blocks that are all zero."""
    return [
        sum(block.size for block in cut(gate, block_size) if not block.any())
        for gate in split_gates(weight, gates, row_axes)
    ]


def value_of(weight: Any) -> np.ndarray:
    """A copy of a variable's value."""
    tensor = getattr(weight, "value", weight)
    return np.array(tensor.numpy() if hasattr(tensor, "numpy") else tensor)


def assert_sparsity(
    weight: Any, block_size: tuple[int, int], sparsity: float, gates: int = 1, row_axes: int | None = None,
    up_to: float | None = None, note: object = "",
) -> None:  # fmt: skip
    """Each gate is `sparsity` zero, or up to `up_to`, within half a block; only elements of zero blocks count."""
    weight = value_of(weight).astype(np.float64)
    matrices = split_gates(weight, gates, row_axes)
    for g, (matrix, zeros) in enumerate(zip(matrices, block_zeros(weight, block_size, gates, row_axes), strict=True)):
        half = max(block.size for block in cut(matrix, block_size)) / 2 + 1e-6
        low, high = sparsity * matrix.size - half, (up_to or sparsity) * matrix.size + half
        # Never a whole gate: what would be rounded up to "everything" keeps its last block.
        low = min(low, matrix.size - 2 * half)
        share = zeros / matrix.size
        assert low <= zeros <= high, f"{note} gate {g} of {weight.shape}: {share:.4f} zero, {sparsity:.4f} asked"


def scheduled(schedule: kbs.PruningSchedule, step: int) -> float:
    """The sparsity that must hold after `step` updates: that of the last update that was due."""
    due = [t for t in range(schedule.begin_step, step + 1) if schedule.should_prune(t)]
    return 0.0 if not due else float(schedule.target(due[-1]))


def updates(model: Any) -> int:
    """How often the optimizer of a model has updated its weights."""
    optimizer = model.optimizer
    return int(value_of(getattr(optimizer, "inner_optimizer", optimizer).iterations))


def pruned_weights(model: Any) -> list[tuple[Any, int]]:
    """Every weight of a model that has a pruning constraint in use, and its gates; found without the package's walk."""
    found = {
        id(variable): (variable, variable.constraint.gates)
        for variable in model.trainable_variables
        if isinstance(variable.constraint, kbs.BlockPruning) and not variable.constraint.skipped
    }
    return list(found.values())


class Watch(keras.callbacks.Callback):
    """After every batch: the pruned weights have the scheduled sparsity, and what a checkpoint would hold has it too.

    Args:
        schedule: what the weights were asked for.
        block_size: ditto.
        folder: where to write a checkpoint after every batch; none if `None`.
        count: how many pruned weights there must be.
        ahead: batches by which masks may be early (gradient accumulation moves them with the first of its batches).
    """

    def __init__(
        self, schedule: kbs.PruningSchedule, block_size: tuple[int, int], folder: Path | None = None,
        count: int | None = None, ahead: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.schedule, self.block_size, self.folder, self.count, self.ahead = schedule, block_size, folder, count, ahead
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        step = updates(self.model)
        weights = pruned_weights(self.model)
        if self.count is not None:
            assert len(weights) == self.count, [variable.path for variable, _ in weights]
        if step < self.schedule.begin_step:
            return
        self.check(weights, step)
        if self.folder is not None:
            self.check_checkpoint(weights, step)

    def check(self, weights: Sequence[tuple[Any, int]], step: int) -> None:
        wanted, limit = scheduled(self.schedule, step), scheduled(self.schedule, step + self.ahead)
        for variable, gates in weights:
            note = f"step {step} {variable.path}"
            row_axes = variable.constraint.row_axes
            assert_sparsity(variable, self.block_size, wanted, gates, row_axes, up_to=limit, note=note)
        self.seen.append((step, wanted))

    def check_checkpoint(self, weights: Sequence[tuple[Any, int]], step: int) -> None:
        assert self.folder is not None
        path = self.folder / "watch.weights.h5"
        self.model.save_weights(path, overwrite=True)
        arrays = read_arrays(path)
        for variable, _ in weights:
            value = value_of(variable)
            # By their bytes: HDF5 knows no bfloat16.
            found = any(value.tobytes() == array.tobytes() for array in arrays)
            assert found, f"step {step}: the checkpoint does not hold {variable.path} as it is"


def read_arrays(path: Path) -> list[np.ndarray]:
    """All arrays of an HDF5 file."""
    arrays: list[np.ndarray] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    return arrays


def sequence_data(samples: int = 32, steps: int = 4, features: int = 8, outputs: int = 3) -> tuple:
    """Random sequences and targets."""
    random = np.random.default_rng(0)
    x = random.normal(size=(samples, steps, features)).astype("float32")
    return x, random.normal(size=(samples, outputs)).astype("float32")


def fit(model: Any, data: Iterable | tuple, callbacks: Sequence[Any] = (), **kwargs: Any) -> Any:
    """A quiet fit() with the pruning callback among `callbacks`."""
    arguments = {"epochs": 2, "batch_size": 8, "verbose": 0, **kwargs}
    x, *rest = data
    return model.fit(x, *rest, callbacks=list(callbacks), **arguments)


def run_python(code: str, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """The output of a fresh Python with this repository's package on its path; fails with its error output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd or ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
