"""Trainings on the package's native loop: quicker than Keras's on a CPU for small batches, of dense layers too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blocksparse import BlockGrid
from keras_blocksparse.constraints import BlockPruning, pruning_of
from keras_blocksparse.sparse import BlockSparseMatrix, BlockStructure
from keras_blocksparse.sparse.layers import run_natively, why_unfused, why_unfused_in_training

#: What the native loop calls a cell, and how many gates it has.
CELLS = {
    keras.layers.SimpleRNNCell: ("simple_rnn", 1),
    keras.layers.GRUCell: ("gru", 3),
    keras.layers.LSTMCell: ("lstm", 4),
}


class NativeLoop:
    """A recurrent Keras layer's stand-in for its own `inner_loop`.

    Args:
        layer: built SimpleRNN, GRU or LSTM layer.

    Raises:
        ValueError: the native loop cannot train it.
    """

    def __init__(self, layer: Any) -> None:
        if reason := why_unfused(layer.cell) or why_unfused_in_training(layer.cell):
            raise ValueError(f"{layer.name} cannot be trained on the native loop: {reason}")
        self.layer = layer
        self.cell, gates = CELLS[type(layer.cell)]
        self._packings = [_Packing(weight, _everything(weight, gates)) for weight in self._weights]

    @property
    def _weights(self) -> tuple[Any, Any]:
        return self.layer.cell.kernel, self.layer.cell.recurrent_kernel

    def prunings(self) -> dict[int, BlockPruning]:
        """Those of its weights, 0 being the kernel and 1 the recurrent one."""
        found = {n: pruning_of(weight) for n, weight in enumerate(self._weights)}
        return {n: pruning for n, pruning in found.items() if pruning is not None and not pruning.skipped}

    def leave_out_zeros(self) -> None:
        """Computes with the blocks that pruning keeps now, and no more with the others, whose gradients become 0.

        For when masks move no more. Steps that are compiled already go on with all blocks.
        """
        for n, pruning in self.prunings().items():
            weight, grid = self._weights[n], pruning.grid
            structure = BlockStructure(tuple(weight.shape), grid.block_size, grid.gates, "float32", pruning.kept)
            self._packings[n] = _Packing(weight, structure)

    def __call__(self, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        """What `keras.layers.RNN.inner_loop` does."""
        packed = [
            (packing.structure, packing.values(w)) for packing, w in zip(self._packings, self._weights, strict=True)
        ]
        return run_natively(self.layer, self.cell, *packed, sequences, initial_state, mask, training)


def stay_on_native_loop(layers: list[Any]) -> None:
    """As `native_loop`, for good."""
    for loop in [NativeLoop(layer) for layer in layers]:
        loop.layer.inner_loop = loop


@contextmanager
def native_loop(layers: list[Any]) -> Iterator[list[NativeLoop]]:
    """Within it, recurrent Keras layers compute, and are trained, by one native call for a whole sequence.

    Nothing else about them changes: their weights are dense Keras variables, and constraints mask them as ever.

    Args:
        layers: built SimpleRNN, GRU and LSTM layers.

    Raises:
        ValueError: the native loop cannot train one of them.
    """
    loops = [NativeLoop(layer) for layer in layers]
    try:
        for loop in loops:
            loop.layer.inner_loop = loop
        yield loops
    finally:
        for layer in layers:
            vars(layer).pop("inner_loop", None)


def _everything(weight: Any, gates: int) -> BlockStructure:
    rows, columns = weight.shape
    block = min(rows, 16), min(columns // gates, 16)
    whole = np.ones(BlockGrid((rows, columns), block, gates).grid_shape, bool)
    return BlockStructure((rows, columns), block, gates, "float32", whole)


class _Packing:
    """The order in which the native loop wants the elements of a dense matrix, those of left out blocks not at all."""

    def __init__(self, weight: Any, structure: BlockStructure) -> None:
        size = int(np.prod(weight.shape))
        self.structure = structure
        positions = BlockSparseMatrix.from_values(structure, np.zeros(structure.values_shape, "float32")).positions
        kept = np.flatnonzero(positions >= 0)
        places = np.full(size, len(positions))  # one past the end: left out
        places[positions[kept]] = kept
        sources = np.where(positions < 0, size, positions)  # one past the end: padding
        # Elements that lie side by side in both orders are moved together, which is quicker.
        self._run = next(
            run for run in (16, 8, 4, 2, 1) if _in_runs(sources, size, run) and _in_runs(places, len(positions), run)
        )
        self._sources, self._places = (
            (order[:: self._run] // self._run).astype("int32") for order in (sources, places)
        )

    def values(self, weight: Any) -> tf.Tensor:
        """The weight's elements, and zeros for padding, in that order."""

        def gather(values: tf.Tensor, indices: np.ndarray) -> tf.Tensor:
            runs = tf.reshape(tf.concat([tf.reshape(values, [-1]), [0.0] * self._run], 0), [-1, self._run])
            return tf.reshape(tf.gather(runs, indices), [-1])

        @tf.custom_gradient
        def pack(w: tf.Tensor) -> Any:
            # A gather backwards too: TensorFlow's own gradient of a gather is a scatter, which takes longer.
            return gather(w, self._sources), lambda dv: tf.reshape(gather(dv, self._places), w.shape)

        return pack(tf.convert_to_tensor(weight))


def _in_runs(order: np.ndarray, end: int, run: int) -> bool:
    """Whether an order of elements is one of whole runs of them, or of `end` alone."""
    if end % run or order.size % run:
        return False
    rows = order.reshape(-1, run)
    whole = rows == rows[:, :1] // run * run + np.arange(run)
    return bool(np.all(whole.all(1) | (rows == end).all(1)))
