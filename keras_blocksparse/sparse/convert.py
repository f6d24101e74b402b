"""`to_block_sparse` and `to_dense`: a model whose pruned layers run on the native kernels, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_blocksparse._text import text_table
from keras_blocksparse.blocks import BlockGrid, BlockSize, check_block_size, infer_block_size
from keras_blocksparse.prunable import PrunableLayer, PrunableWeight, register_prunable
from keras_blocksparse.pruning import constraints_of
from keras_blocksparse.sparse.layers import (
    BlockSparseDense,
    BlockSparseGRU,
    BlockSparseGRUCell,
    BlockSparseLSTM,
    BlockSparseLSTMCell,
    BlockSparseSimpleRNN,
    BlockSparseSimpleRNNCell,
    attribute_of,
    not_elementwise,
    why_unfused,
    why_unfused_in_training,
)
from keras_blocksparse.sparse.matrix import BlockSparseMatrix
from keras_blocksparse.sparse.structure import check_dtype
from keras_blocksparse.variables import to_numpy

#: Keras's layers, and what they become.
BLOCK_SPARSE = {
    keras.layers.SimpleRNN: BlockSparseSimpleRNN,
    keras.layers.GRU: BlockSparseGRU,
    keras.layers.LSTM: BlockSparseLSTM,
    keras.layers.Dense: BlockSparseDense,
}
DENSE = {block_sparse: dense for dense, block_sparse in BLOCK_SPARSE.items()}

#: Blocks of a matrix that has no zero blocks, beside another that has.
DENSE_BLOCK = (16, 16)

#: Columns that the kernels compute at once at least: narrower blocks take the time of such.
NARROW = 4


@dataclasses.dataclass(frozen=True)
class LayerConversion:
    """What becomes of one layer that has weights.

    Attributes:
        layer: names from the model's top to the layer, joined by "/".
        kind: class of the layer.
        becomes: class of what takes its place; "" if it is left alone.
        block_sizes: `(rows, cols)` of the blocks of each matrix.
        density: share of the elements of its matrices that is kept; `None` where nothing was counted.
        nbytes: bytes of its weights, indices included.
        nbytes_dense: bytes that they took before.
        fused: whether a whole sequence is one native call, outside training at least; `None` where there is no
            sequence, or nothing native.
        note: why it is left alone, or why it does not run fused, and when; "" otherwise.
    """

    layer: str
    kind: str
    nbytes_dense: int
    becomes: str = ""
    block_sizes: tuple[BlockSize, ...] = ()
    density: float | None = None
    nbytes: int = 0
    fused: bool | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Result of `conversion_report`. Printed, it is a table.

    Attributes:
        layers: each layer that has weights, in the model's order.
    """

    layers: tuple[LayerConversion, ...]

    def __str__(self) -> str:
        lines = [("layer", "becomes", "fused", "blocks", "kept", "bytes", "were")]
        for row in self.layers:
            blocks = ", ".join(f"{height}x{width}" for height, width in row.block_sizes)
            kept = "-" if row.density is None else f"{row.density:.1%}"
            fused = {True: "yes", False: "no", None: "-"}[row.fused]
            sizes = f"{row.nbytes:,}", f"{row.nbytes_dense:,}"
            lines.append((row.layer, row.becomes or row.kind, fused, blocks or "-", kept, *sizes))
        total, before = sum(row.nbytes for row in self.layers), sum(row.nbytes_dense for row in self.layers)
        lines.append(("all of these", "", "", "", "", f"{total:,}", f"{before:,}"))
        text = text_table(lines, 3)
        text.insert(-1, text[1])
        notes = [f"{row.layer} {'' if row.becomes else 'is left alone: '}{row.note}" for row in self.layers if row.note]
        return "\n".join([*text, *notes])

    __repr__ = __str__


def to_block_sparse(
    model: Any,
    block_size: BlockSize | None = None,
    dtype: str = "float32",
    *,
    max_density: float | None = 0.5,
    verbose: bool = True,
) -> Any:
    """A copy of a pruned model whose layers hold and compute the kept blocks only.

    SimpleRNN, GRU, LSTM and Dense layers that hold blocks of zeros become `BlockSparseSimpleRNN` and so on, wherever
    they are: in nested models, in `Bidirectional`, in `TimeDistributed`. Everything else is copied. The copy computes
    what the model computes; saved, it is smaller by what is zero; trained by `fit`, its zeros stay zeros. It is not
    compiled. `model` itself is left as it is.

    Example:

    ```python
    model = kbs.strip_pruning(model)
    fast = kbs.to_block_sparse(model)
    fast.predict(x)
    fast.save("fast.keras")       # to load it, import keras_blocksparse and call keras.models.load_model
    ```

    Args:
        model: built Sequential or functional model, with or without zero blocks in its weights.
        block_size: rows (inputs) and columns (outputs) of a block. By default, for each weight, the largest usual ones
            that explain its zeros. A block larger than a matrix is cut to its size.
        dtype: what the kept blocks are stored as: "float32", which trains on; "bfloat16" or "int8" (a scale for each
            output), for inference only.
        max_density: a layer that keeps more than this share of the elements of its matrices is left alone, since its
            dense form could be faster. Elements of blocks that are 1, 2 or 3 columns wide count 4, 2 and 4/3 times,
            since they take so much longer. `None` converts whatever the density, layers without a zero block included.
            The default is from float32 products on one thread of an AVX-512 machine, 256 to 1024 inputs, 1 to 256 rows
            at a time: with half of the elements in blocks of 4x4 to 32x32 they took 0.3 to 0.8 of the dense product's
            time; with three quarters, many rows at a time took longer than dense.
        verbose: whether to print what is done with each layer, and why. `conversion_report` returns the same.

    Returns:
        A model of the same class, with the same names of layers and the same inputs and outputs.

    Raises:
        ValueError: an argument is out of range; the model is not built, is still under pruning, is a subclassed model,
            or holds NaN; or no layer at all can be converted, with the reason for each.
        TypeError: `model` is no Keras model, or `block_size` holds no integers.
    """
    choices = _choose(model, block_size, dtype, max_density)
    report = ConversionReport(tuple(choice.row for choice in choices))
    chosen = {id(choice.layer): choice.matrices for choice in choices if choice.matrices}
    if not chosen:
        reasons = "\n".join(f"  {row.layer}: {row.note}" for row in report.layers)
        raise ValueError(f"No layer of the model can be made block-sparse:\n{reasons}")

    def exchange(layer: Any) -> Any:
        if (matrices := chosen.get(id(layer))) is None:
            return None
        structures = {name: matrix.structure.get_config() for name, matrix in matrices.items()}
        return BLOCK_SPARSE[type(layer)].from_config({**_config(layer), **structures})

    fast, pairs = _rebuild(model, exchange)
    for old, new in pairs:
        if (matrices := chosen.get(id(old))) is None:
            new.set_weights(old.get_weights())
            continue
        for name, matrix in matrices.items():
            getattr(_owner(new), f"{name}_values").assign(matrix.values)
        _copy_bias(old, new)
    if verbose:
        print(report)
    return fast


def conversion_report(
    model: Any, block_size: BlockSize | None = None, dtype: str = "float32", *, max_density: float | None = 0.5
) -> ConversionReport:
    """What `to_block_sparse` would do with each layer of a model, and why, without doing it.

    Example:

    >>> report = kbs.conversion_report(model)
    >>> for row in report.layers:
    ...     print(row.layer, row.becomes or row.note, row.density)
    gru BlockSparseGRU 0.1
    head no block of it is zero 1.0

    Args and errors are those of `to_block_sparse`, except that it is no error if no layer can be converted.

    Returns:
        A `ConversionReport`.
    """
    return ConversionReport(tuple(choice.row for choice in _choose(model, block_size, dtype, max_density)))


def to_dense(model: Any) -> Any:
    """The way back from `to_block_sparse`: a copy of ordinary Keras layers, whose weights hold the zeros.

    It can be exported, pruned on, and loaded where this package is not installed. bfloat16 and int8 weights come back
    as the float32 numbers that they stand for.

    Args:
        model: Sequential or functional model with block-sparse layers.

    Returns:
        A model of the same class, with the same names of layers, not compiled.

    Raises:
        ValueError: there is no block-sparse layer in the model, or it is a subclassed model.
        TypeError: `model` is no Keras model.
    """
    _check_model(model)

    def exchange(layer: Any) -> Any:
        if type(layer) not in DENSE:
            return None
        config = _config(layer)
        for name in layer.matrices:
            del config[name]
        return DENSE[type(layer)].from_config(config)

    dense, pairs = _rebuild(model, exchange)
    if not any(type(old) in DENSE for old, _ in pairs):
        raise ValueError(f"There is no block-sparse layer in {model!r}, so there is nothing to make dense")
    for old, new in pairs:
        if type(old) not in DENSE:
            new.set_weights(old.get_weights())
            continue
        for name in old.matrices:
            _variable(_owner(new), name).assign(getattr(_owner(old), name).to_dense())
        _copy_bias(old, new)
    return dense


@register_prunable(
    *DENSE, BlockSparseSimpleRNNCell, BlockSparseGRUCell, BlockSparseLSTMCell
)  # so that they are not taken for the Keras layers that they derive from
class BlockSparseIsNotPrunable(PrunableLayer):
    """Block-sparse layers: says how to prune, or look at, what they hold."""

    dense = False

    def get_weight_specs(self) -> tuple[PrunableWeight, ...]:
        """Raises ValueError."""
        raise ValueError(
            f"{self.path} is block-sparse already and has no dense weights. Use kbs.to_dense(model), which gives an "
            "ordinary Keras model"
        )


# ---- which layers ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A layer that has weights, and its matrices if it is to be converted."""

    layer: Any
    row: LayerConversion
    matrices: dict[str, BlockSparseMatrix]


def _choose(model: Any, block_size: Any, dtype: str, max_density: Any) -> list[_Choice]:
    if block_size is not None:
        block_size = check_block_size(block_size)
    check_dtype(dtype)
    number = isinstance(max_density, (int, float)) and not isinstance(max_density, bool)
    if max_density is not None and not (number and 0 < max_density <= 1):
        raise ValueError(f"`max_density` must be None or in (0, 1]. Received: max_density={max_density!r}")
    _check_model(model)
    if constraints_of(model):
        raise ValueError("The model is still under pruning. Call kbs.strip_pruning(model) first")
    return [_choose_layer(layer, path, block_size, dtype, max_density) for layer, path in _layers_with_weights(model)]


def _choose_layer(
    layer: Any, path: str, block_size: BlockSize | None, dtype: str, max_density: float | None
) -> _Choice:
    nbytes = sum(_nbytes(weight) for weight in layer.weights)
    row = LayerConversion(path, type(layer).__name__, nbytes, nbytes=nbytes)
    if reason := _why_not(layer, dtype):
        return _Choice(layer, dataclasses.replace(row, note=reason), {})
    block_sparse = BLOCK_SPARSE[type(layer)]
    gates = getattr(block_sparse, "cell_class", block_sparse).gates
    weights = {name: to_numpy(_variable(_owner(layer), name)) for name in block_sparse.matrices}
    for name, w in weights.items():
        if not np.isfinite(w).all():
            raise ValueError(f"{path}/{name} holds NaN or infinite values; the model is broken")
    grids = {name: _grid(w, gates, block_size) for name, w in weights.items()}
    kept = {name: grid.nonzero_blocks(weights[name]) for name, grid in grids.items()}
    elements = {name: int((kept[name] * grid.elements).sum()) for name, grid in grids.items()}
    size = sum(w.size for w in weights.values())
    density = sum(elements.values()) / size
    row = dataclasses.replace(row, density=density)
    if max_density is not None:
        cost = sum(elements[name] * NARROW / min(NARROW, grid.block_size[1]) for name, grid in grids.items()) / size
        zeros = sum(np.count_nonzero(w == 0) for w in weights.values()) / size
        reason = ""
        if all(k.all() for k in kept.values()):
            reason = "no block of it is zero"
            if block_size is None and zeros > 0.1:
                reason = f"{zeros:.1%} of it is zero, but in no usual blocks. `block_size` says in which it was pruned"
        elif cost > max_density:
            narrow = "" if cost == density else f", in blocks so narrow that it takes as long as {cost:.1%}"
            reason = f"{density:.1%} of it is kept{narrow}: more than max_density={max_density}, dense could be faster"
        if reason:
            return _Choice(layer, dataclasses.replace(row, note=reason), {})
    matrices = {
        name: BlockSparseMatrix.from_dense(w, grids[name].block_size, gates, dtype, kept[name])
        for name, w in weights.items()
    }
    return _Choice(
        layer,
        dataclasses.replace(
            row,
            becomes=block_sparse.__name__,
            block_sizes=tuple(grid.block_size for grid in grids.values()),
            nbytes=nbytes - sum(w.nbytes for w in weights.values()) + sum(m.nbytes for m in matrices.values()),
            fused=None if type(layer) is keras.layers.Dense else not why_unfused(layer.cell),
            note=_how_it_runs(layer, dtype),
        ),
        matrices,
    )


def _why_not(layer: Any, dtype: str) -> str:
    """Why a layer cannot be block-sparse, whatever its weights are; "" if it can."""
    kind = type(layer)
    if kind in DENSE:
        return "it is block-sparse already"
    if kind not in BLOCK_SPARSE:
        known = next((base for base in kind.__mro__ if base in BLOCK_SPARSE), None)
        if known is not None:
            return f"{kind.__name__} is a subclass of {known.__name__}, and may compute something else"
        return f"{kind.__name__} has no block-sparse form; {', '.join(base.__name__ for base in BLOCK_SPARSE)} have one"
    if getattr(layer, "lora_enabled", False) or layer.dtype_policy.quantization_mode is not None:
        return "LoRA or quantization by Keras is on, so there is no one weight to cut into blocks"
    if layer.variable_dtype != "float32":
        return f"its weights are {layer.variable_dtype}, and the native kernels compute in float32"
    if dtype == "float32":
        for name in BLOCK_SPARSE[kind].matrices:
            for what in ("regularizer", "constraint"):
                if reason := not_elementwise(getattr(layer, attribute_of(name, what))):
                    # Dropped, it would train to something else without a word.
                    attribute = attribute_of(name, what)
                    where = f"{'cell.' if _owner(layer) is not layer else ''}{attribute}"
                    return f"its {attribute} {reason}. Set its {where} to None to convert without it"
    return ""


def _how_it_runs(layer: Any, dtype: str) -> str:
    if type(layer) is keras.layers.Dense:
        return ""
    if reason := why_unfused(layer.cell):
        return f"runs step by step: {reason}"
    if dtype == "float32" and (reason := why_unfused_in_training(layer.cell)):
        return f"runs step by step in training: {reason}"
    return ""


def _grid(w: np.ndarray, gates: int, block_size: BlockSize | None) -> BlockGrid:
    size = infer_block_size(w, gates) if block_size is None else block_size
    if size == (1, 1) and block_size is None:
        size = DENSE_BLOCK
    rows, cols = w.shape[0], w.shape[1] // gates
    return BlockGrid(w.shape, (min(size[0], rows), min(size[1], cols)), gates)


def _layers_with_weights(model: Any) -> list[tuple[Any, str]]:
    """The layers that can be exchanged, or hold weights, each once, with names from the model's top."""
    found: dict[int, tuple[Any, str]] = {}

    def walk(layer: Any, path: str) -> None:
        for child in _children(layer):
            below = f"{path}/{child.name}" if path else child.name
            if _children(child):
                walk(child, below)
            elif getattr(child, "weights", None):
                found.setdefault(id(child), (child, below))

    walk(model, "")
    return list(found.values())


def _children(layer: Any) -> list[Any]:
    """The layers inside a layer that `_rebuild` looks into."""
    if _is_graph(layer):
        return list(layer.layers)
    if type(layer) is keras.layers.Bidirectional:
        return [layer.forward_layer, layer.backward_layer]
    if type(layer) is keras.layers.TimeDistributed:
        return [layer.layer]
    return []


def _is_graph(layer: Any) -> bool:
    """Whether Keras knows how a model's layers are connected."""
    return isinstance(layer, keras.Model) and isinstance(layer, (keras.Sequential, keras.Function))


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model. Received: {model!r} of type {type(model).__name__}")
    if not _is_graph(model):
        raise ValueError(
            f"{type(model).__name__} is a subclassed model, whose layers cannot be exchanged from outside. Write it as "
            "a Sequential or functional model, or make the layers themselves, kbs.BlockSparseGRU and so on, in its "
            f"constructor. Received: {model!r}"
        )
    if not model.built:
        raise ValueError(
            "The model is not built yet, so it has no weights. Call it on a batch, call model.build(input_shape), or "
            f"give it a keras.Input. Received: {model!r}"
        )


# ---- the copy --------------------------------------------------------------------------------------------------------


def _rebuild(model: Any, exchange: Callable[[Any], Any]) -> tuple[Any, list[tuple[Any, Any]]]:
    """A copy of a model with other layers where `exchange` gives one, without weights; and old and new layers."""
    made: dict[int, Any] = {}
    pairs: list[tuple[Any, Any]] = []

    def clone(layer: Any) -> Any:
        if id(layer) not in made:  # a layer that is shared stays shared, between nested models too
            made[id(layer)] = make(layer)
        return made[id(layer)]

    def make(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # an operation such as `x + y`: nothing of its own to copy
        if _is_graph(layer):
            with _uncompiled(layer):
                new = keras.models.clone_model(layer, clone_function=clone)
            if type(new) is not type(layer):
                raise ValueError(
                    f"Keras copies a {type(layer).__name__} as a {type(new).__name__}, which may train or compute "
                    f"otherwise. Write it as a plain Sequential or functional model. Received: {layer!r}"
                )
            return new
        config = layer.get_config()
        if type(layer) is keras.layers.Bidirectional:
            forward, backward = exchange_or_copy(layer.forward_layer), exchange_or_copy(layer.backward_layer)
            rest = {name: value for name, value in config.items() if name not in ("layer", "backward_layer")}
            new = keras.layers.Bidirectional(forward, backward_layer=backward, **rest)
            pairs.extend([(layer.forward_layer, new.forward_layer), (layer.backward_layer, new.backward_layer)])
        elif type(layer) is keras.layers.TimeDistributed:
            del config["layer"]
            new = keras.layers.TimeDistributed(clone(layer.layer), **config)
        else:
            new = exchange_or_copy(layer)
            pairs.append((layer, new))
        return new

    def exchange_or_copy(layer: Any) -> Any:
        new = exchange(layer)
        if new is not None:
            return new
        if isinstance(layer, keras.layers.Lambda):  # of this process: nothing unsafe is read from a file
            return type(layer).from_config(layer.get_config(), safe_mode=False)
        return type(layer).from_config(_config(layer))

    return clone(model), pairs


def _config(layer: Any) -> dict[str, Any]:
    """A layer's config, with activations as they are: a function that is not registered is not found by its name."""
    config = layer.get_config()
    if type(layer) in DENSE or type(layer).__module__.startswith("keras."):
        names = [name for name in ("activation", "recurrent_activation") if name in config]
        config.update({name: getattr(layer, name) for name in names})
    return config


@contextlib.contextmanager
def _uncompiled(model: Any) -> Iterator[None]:
    """Keeps `clone_model` from copying what a model was compiled with: it fails for losses that are not registered."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def _owner(layer: Any) -> Any:
    """What holds a layer's weights: its cell, or itself."""
    return getattr(layer, "cell", layer)


def _variable(owner: Any, name: str) -> Any:
    """The variable of a dense matrix; `Dense.kernel` is computed."""
    return getattr(owner, f"_{name}", None) if isinstance(owner, keras.layers.Dense) else getattr(owner, name)


def _copy_bias(old: Any, new: Any) -> None:
    if _owner(old).bias is not None:
        _owner(new).bias.assign(_owner(old).bias)


def _nbytes(weight: Any) -> int:
    return int(np.asarray(keras.ops.convert_to_tensor(weight)).nbytes)
