"""What the tests of layers and of conversion share: stock Keras layers whose matrices hold zero blocks."""

from typing import Any

import keras
import numpy as np

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import (
    BlockSparseDense,
    BlockSparseGRU,
    BlockSparseLSTM,
    BlockSparseMatrix,
    BlockSparseSimpleRNN,
)

RECURRENT = {
    "SimpleRNN": (keras.layers.SimpleRNN, BlockSparseSimpleRNN, 1),
    "GRU": (keras.layers.GRU, BlockSparseGRU, 3),
    "LSTM": (keras.layers.LSTM, BlockSparseLSTM, 4),
}
GATES = {name: gates for name, (_, _, gates) in RECURRENT.items()}


def with_zero_blocks(w: np.ndarray, block_size=(4, 4), gates=1, sparsity=0.6, seed=0) -> np.ndarray:
    """`w` with a share of its blocks zeroed, at random; at least one is kept and one is zero."""
    grid = BlockGrid(w.shape, block_size, gates)
    order = np.random.default_rng(seed).permutation(int(np.prod(grid.grid_shape))).reshape(grid.grid_shape)
    zeros = np.clip(round(sparsity * order.size), 1, order.size - 1)
    return (w * grid.expand(order >= zeros)).astype(np.float32)


def zero_blocks(model: Any, block_size=(4, 4), sparsity=0.6, skip=()) -> Any:
    """Zeroes blocks of every recurrent and Dense kernel of a model, in place, gate by gate."""
    for seed, layer in enumerate(model._flatten_layers()):
        if isinstance(layer, keras.layers.Dense) and layer.name not in skip:
            layer._kernel.assign(with_zero_blocks(np.asarray(layer._kernel), block_size, 1, sparsity, seed))
        elif type(layer).__name__ in GATES and layer.name not in skip:
            for name in ("kernel", "recurrent_kernel"):
                variable, gates = getattr(layer.cell, name), GATES[type(layer).__name__]
                variable.assign(with_zero_blocks(np.asarray(variable), block_size, gates, sparsity, seed))
    return model


def twins(kind: str, inputs: int, units: int, dtype="float32", block_size=(4, 4), **options: Any) -> tuple[Any, Any]:
    """A built stock layer with zero blocks and random bias, and the block-sparse layer of the same weights."""
    stock_class, sparse_class, gates = RECURRENT[kind]
    stock = stock_class(units, **options)
    stock.build((None, 3, inputs))
    matrices = {}
    for seed, name in enumerate(("kernel", "recurrent_kernel")):
        variable = getattr(stock.cell, name)
        size = min(block_size[0], variable.shape[0]), min(block_size[1], units)
        variable.assign(with_zero_blocks(np.asarray(variable), size, gates, seed=seed))
        matrices[name] = BlockSparseMatrix.from_dense(np.asarray(variable), size, gates, dtype)
    sparse = sparse_class(units, **options, **matrices)
    sparse.build((None, 3, inputs))
    share_bias(stock.cell, sparse.cell)
    return stock, sparse


def dense_twins(inputs: int, units: int, dtype="float32", **options: Any) -> tuple[Any, Any]:
    """The same for a Dense layer."""
    stock = keras.layers.Dense(units, **options)
    stock.build((None, inputs))
    stock._kernel.assign(with_zero_blocks(np.asarray(stock._kernel)))
    kernel = BlockSparseMatrix.from_dense(np.asarray(stock._kernel), (4, 4), 1, dtype)
    sparse = BlockSparseDense(units, kernel=kernel, **options)
    sparse.build((None, inputs))
    share_bias(stock, sparse)
    return stock, sparse


def share_bias(stock: Any, sparse: Any) -> None:
    """Gives both the same random bias."""
    if stock.bias is not None:
        bias = np.random.default_rng(1).normal(size=stock.bias.shape)
        stock.bias.assign(bias)
        sparse.bias.assign(bias)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(got: Any, wanted: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Compares nested outputs."""
    got, wanted = keras.tree.flatten(got), keras.tree.flatten(wanted)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=rtol, atol=atol)
