"""Trainings on the package's native loop: quicker than Keras's on a CPU for small batches, of dense layers too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blocksparse import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, BlockStructure
from keras_blocksparse.sparse.layers import run_natively, why_unfused, why_unfused_in_training

#: What the native loop calls a cell, and how many gates it has.
CELLS = {
    keras.layers.SimpleRNNCell: ("simple_rnn", 1),
    keras.layers.GRUCell: ("gru", 3),
    keras.layers.LSTMCell: ("lstm", 4),
}


@contextmanager
def native_loop(layers: list[Any]) -> Iterator[None]:
    """Within it, recurrent Keras layers compute, and are trained, by one native call for a whole sequence.

    Nothing else about them changes: their weights are dense Keras variables, and constraints mask them as ever.

    Args:
        layers: built SimpleRNN, GRU and LSTM layers.

    Raises:
        ValueError: the native loop cannot train one of them.
    """
    loops = []
    for layer in layers:
        if reason := why_unfused(layer.cell) or why_unfused_in_training(layer.cell):
            raise ValueError(f"{layer.name} cannot be trained on the native loop: {reason}")
        name, gates = CELLS[type(layer.cell)]
        loops.append(functools.partial(_inner_loop, layer, name, *(_Packing(w, gates) for w in _matrices(layer))))
    try:
        for layer, loop in zip(layers, loops, strict=True):
            layer.inner_loop = loop
        yield
    finally:
        for layer in layers:
            vars(layer).pop("inner_loop", None)


def _matrices(layer: Any) -> tuple[Any, Any]:
    return layer.cell.kernel, layer.cell.recurrent_kernel


def _inner_loop(
    layer: Any, name: str, kernel: _Packing, recurrent_kernel: _Packing, sequences: Any, initial_state: Any,
    mask: Any, training: Any = False,
) -> tuple[Any, Any, list[Any]]:  # fmt: skip
    packed = [
        (packing.structure, packing.values(w))
        for packing, w in zip((kernel, recurrent_kernel), _matrices(layer), strict=True)
    ]
    return run_natively(layer, name, *packed, sequences, initial_state, mask, training)


class _Packing:
    """The order in which the native loop wants the elements of a dense matrix, none of them left out."""

    def __init__(self, weight: Any, gates: int) -> None:
        rows, columns = weight.shape
        block = min(rows, 16), min(columns // gates, 16)
        whole = np.ones(BlockGrid((rows, columns), block, gates).grid_shape, bool)
        self.structure = BlockStructure((rows, columns), block, gates, "float32", whole)
        positions = BlockSparseMatrix.from_values(
            self.structure, np.zeros(self.structure.values_shape, "float32")
        ).positions
        kept = np.flatnonzero(positions >= 0)
        self.places = np.zeros(rows * columns, np.int32)
        self.places[positions[kept]] = kept
        self.sources = np.where(positions < 0, rows * columns, positions).astype(np.int32)  # one past the end: padding

    def values(self, weight: Any) -> tf.Tensor:
        """The weight's elements, and zeros for padding, in that order."""

        @tf.custom_gradient
        def pack(w: tf.Tensor) -> Any:
            # A gather backwards too: TensorFlow's own gradient of a gather is a scatter, which takes longer.
            padded = tf.concat([tf.reshape(w, [-1]), [0.0]], 0)
            return tf.gather(padded, self.sources), lambda dv: tf.reshape(tf.gather(dv, self.places), w.shape)

        return pack(tf.convert_to_tensor(weight))
