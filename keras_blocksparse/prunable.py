"""Which weights of which layers can be pruned, and how their gates lie.

A `PrunableLayer` is composed with a layer and stays outside the model's graph. Layers are found by walking a model;
support for a new layer is a few lines (`register_prunable`), and nothing else in the package knows layer classes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import keras

from keras_blocksparse.variables import is_variable

Filters = str | Sequence[str] | Callable[[Any], bool] | None


@dataclasses.dataclass(frozen=True)
class PrunableWeight:
    """One weight of a layer that can be pruned.

    Args:
        name: attribute of the layer that holds the variable, such as "recurrent_kernel".
        gates: names of the equal parts that lie beside each other in the last axis.
        kind: layer kind; thresholds and `distribution="per_layer_type"` treat each kind by itself.
        row_axes: how many leading axes are inputs; all but the last if `None`.
        diagonal: whether the weight maps a state to itself, so that `keep_diagonal` applies.
    """

    name: str
    gates: tuple[str, ...] = ("",)
    kind: str = "dense"
    row_axes: int | None = None
    diagonal: bool = False

    def attribute(self, suffix: str) -> str:
        """The layer's attribute for its "constraint" or "regularizer", such as Keras's `recurrent_constraint`."""
        return f"{self.name.removesuffix('_kernel')}_{suffix}"


class PrunableLayer:
    """What can be pruned in one Keras layer.

    Subclass it for layers of your own and register the subclass; `weights` is enough for most.

    Example:

    ```python
    @kbs.register_prunable(MyHighwayLayer)
    class PrunableHighway(kbs.PrunableLayer):
        weights = (kbs.PrunableWeight("transform"), kbs.PrunableWeight("carry"))
    ```

    If the layer takes a `<weight>_constraint` argument and returns it in `get_config()`, as Keras layers do, its
    pruning is copied and saved with it; otherwise pruning lasts as long as the layer object.

    Args:
        layer: the Keras layer.
        path: names from the model's top to the layer, joined by "/".
    """

    weights: ClassVar[tuple[PrunableWeight, ...]] = ()
    #: Whether a model's layers of this kind are pruned when no `filters` are given.
    by_default: ClassVar[bool] = True
    #: Whether the weights are there in whole. Of block-sparse layers only blocks are: nothing to prune, or to report.
    dense: ClassVar[bool] = True

    def __init__(self, layer: Any, path: str | None = None) -> None:
        self.layer = layer
        self.path: str = path if path is not None else str(getattr(layer, "name", type(layer).__name__))
        #: Whether the filters by which the layer was found pick one of its weights.
        self.picks: Callable[[PrunableWeight | None], bool] = lambda weight: True

    @property
    def owner(self) -> Any:
        """The object that holds the weights and their constraints: the layer, or its cell."""
        return self.layer

    def get_weight_specs(self) -> tuple[PrunableWeight, ...]:
        """The weights that can be pruned; known before the layer is built.

        Raises:
            ValueError: this particular layer cannot be pruned.
        """
        return self.weights

    def built_weights(self) -> list[tuple[PrunableWeight, Any]]:
        """The weights with their variables; empty before the layer is built."""
        pairs = [(spec, self._variable(spec.name)) for spec in self.get_weight_specs()]
        return [(spec, variable) for spec, variable in pairs if variable is not None]

    def get_prunable_weights(self) -> list[Any]:
        """The variables that can be pruned, as tfmot's `PrunableLayer.get_prunable_weights()`."""
        return [variable for _, variable in self.built_weights()]

    def _variable(self, name: str) -> Any:
        if not getattr(self.owner, "built", True):
            return None
        if not hasattr(self.owner, name):
            raise AttributeError(f"{self.path} has no weight {name!r}, which its PrunableLayer names")
        value = getattr(self.owner, name)
        if value is not None and not is_variable(value):
            # Keras computes the kernel of layers with LoRA or quantization; there is no one weight to prune.
            raise ValueError(
                f"{self.path}.{name} is not a plain weight (LoRA or quantization is on), so it cannot be pruned. Prune "
                f"first, or leave the layer out by `filters`. Received: {type(value).__name__}"
            )
        return value


_registry: dict[type, type[PrunableLayer]] = {}
AdapterType = TypeVar("AdapterType", bound=type[PrunableLayer])


def register_prunable(*layer_types: type, weights: Sequence[PrunableWeight] | None = None) -> Any:
    """Makes layers of a class, and of its subclasses, prunable.

    Example:

    >>> kbs.register_prunable(MyLayer, weights=[kbs.PrunableWeight("w")])        # or as a decorator of a PrunableLayer

    Args:
        *layer_types: layer classes.
        weights: what can be pruned in them. Without it the result decorates a `PrunableLayer` subclass.

    Raises:
        TypeError: what is registered is not a class, or what is decorated no subclass of `PrunableLayer`.
    """
    if not layer_types or not all(isinstance(layer_type, type) for layer_type in layer_types):
        raise TypeError(f"`register_prunable` takes layer classes. Received: {layer_types}")

    def register(adapter: AdapterType) -> AdapterType:
        if not (isinstance(adapter, type) and issubclass(adapter, PrunableLayer)):
            raise TypeError(f"`register_prunable` decorates a subclass of PrunableLayer. Received: {adapter!r}")
        _registry.update(dict.fromkeys(layer_types, adapter))
        return adapter

    if weights is None:
        return register
    return register(type(f"Prunable{layer_types[0].__name__}", (PrunableLayer,), {"weights": tuple(weights)}))


class _PrunableRNN(PrunableLayer):
    @property
    def owner(self) -> Any:
        return getattr(self.layer, "cell", self.layer)


def _recurrent(*gates: str) -> tuple[PrunableWeight, ...]:
    return (
        PrunableWeight("kernel", gates, "recurrent"),
        PrunableWeight("recurrent_kernel", gates, "recurrent", diagonal=True),
    )


@register_prunable(keras.layers.SimpleRNN, keras.layers.SimpleRNNCell)
class PrunableSimpleRNN(_PrunableRNN):
    """SimpleRNN and its cell: input and recurrent kernel."""

    weights = _recurrent("")


@register_prunable(keras.layers.GRU, keras.layers.GRUCell)
class PrunableGRU(_PrunableRNN):
    """GRU and its cell: input and recurrent kernel, gates z (update), r (reset), h (state)."""

    weights = _recurrent("z", "r", "h")


@register_prunable(keras.layers.LSTM, keras.layers.LSTMCell)
class PrunableLSTM(_PrunableRNN):
    """LSTM and its cell: input and recurrent kernel, gates i (input), f (forget), c (cell), o (output)."""

    weights = _recurrent("i", "f", "c", "o")


@register_prunable(keras.layers.Dense)
class PrunableDense(PrunableLayer):
    """Dense: the kernel."""

    weights = (PrunableWeight("kernel"),)


@register_prunable(keras.layers.EinsumDense)
class PrunableEinsumDense(PrunableLayer):
    """EinsumDense (and the projections of MultiHeadAttention): summed axes of the kernel are its rows."""

    def get_weight_specs(self) -> tuple[PrunableWeight, ...]:
        """See `PrunableLayer.get_weight_specs`."""
        operands, output = self.layer.equation.split("->")
        kernel = operands.split(",")[1]
        summed = [letter not in output for letter in kernel]
        rows = sum(summed)
        if not 0 < rows < len(kernel) or not all(summed[:rows]):
            raise ValueError(
                f"{self.path} cannot be pruned: its kernel's summed axes must come first to form a matrix of inputs x "
                f"outputs. Received: equation={self.layer.equation!r}"
            )
        return (PrunableWeight("kernel", row_axes=rows),)


@register_prunable(keras.layers.Embedding)
class PrunableEmbedding(PrunableLayer):
    """Embedding: the table, rows are tokens."""

    weights = (PrunableWeight("embeddings", kind="embedding"),)
    by_default = False


@register_prunable(keras.layers.Conv1D, keras.layers.Conv2D)
class PrunableConv(PrunableLayer):
    """Conv1D and Conv2D: the kernel, flattened to `(window * channels in, channels out)`."""

    weights = (PrunableWeight("kernel", kind="convolution"),)
    by_default = False


class _PrunableObject(PrunableLayer):
    """Any object with `get_prunable_weights()`, such as a layer that derives from tfmot's PrunableLayer."""

    def __init__(self, layer: Any, path: str | None = None) -> None:
        super().__init__(layer, path)
        known = _registered_adapter(layer)
        self._known = known(layer, self.path) if known else None

    @property
    def owner(self) -> Any:
        return self._known.owner if self._known else self.layer

    def built_weights(self) -> list[tuple[PrunableWeight, Any]]:
        if not getattr(self.layer, "built", True):
            return []
        # A GRU subclass that names its kernels still has the gates of a GRU.
        known = {id(variable): spec for spec, variable in self._known.built_weights()} if self._known else {}
        return [
            (known.get(id(variable), PrunableWeight(variable.name)), variable)
            for variable in self.layer.get_prunable_weights()
        ]


def _registered_adapter(layer: Any) -> type[PrunableLayer] | None:
    return next((_registry[cls] for cls in type(layer).__mro__ if cls in _registry), None)


def _adapt(layer: Any, path: str) -> PrunableLayer | None:
    if isinstance(layer, PrunableLayer):
        return layer
    if callable(getattr(layer, "get_prunable_weights", None)):
        return _PrunableObject(layer, path)
    adapter = _registered_adapter(layer)
    return adapter(layer, path) if adapter else None


def find_prunable_layers(root: Any, filters: Filters = None, everything: bool = False) -> list[PrunableLayer]:
    """The prunable layers of a model, a layer, or a list of either, each once, in the model's order.

    Args:
        root: Keras model or layer, an object with `get_prunable_weights()`, or a list of such.
        filters: regex, list of regexes (`re.search` on the layer's path, or on `path/weight`) or callable on the layer;
            what matches is returned, and `picks` tells which weights did. Without filters, layers inside a model come
            if their kind is pruned by default; layers that are named themselves always come.
        everything: also return kinds that are not pruned by default.

    Raises:
        TypeError: `root` or `filters` is none of these.
    """
    matches = _filter_function(filters)
    found: list[PrunableLayer] = []
    seen: set[int] = set()

    def walk(layer: Any, path: str) -> Iterator[PrunableLayer]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        adapted = _adapt(layer, path)
        if adapted is not None:
            yield adapted
        elif isinstance(layer, keras.layers.Layer):
            for child in layer._flatten_layers(include_self=False, recursive=False):
                yield from walk(child, f"{path}/{child.name}" if path else child.name)
        else:
            raise TypeError(
                "Expected a Keras model or layer, a list of layers, or an object with get_prunable_weights(). "
                f"Received: {layer!r} of type {type(layer).__name__}"
            )

    for top in root if isinstance(root, (list, tuple)) else [root]:
        is_model = isinstance(top, keras.Model) and _adapt(top, "") is None
        for adapted in walk(top, "" if is_model else getattr(top, "name", type(top).__name__)):
            named = adapted.layer is top or filters is not None
            adapted.picks = functools.partial(matches, adapted)
            if any(map(adapted.picks, [None, *_known_specs(adapted)])) and (adapted.by_default or named or everything):
                found.append(adapted)
    return found


def refuse_block_sparse(layers: Sequence[PrunableLayer]) -> None:
    """Raises ValueError if a layer's weights are not there in whole."""
    for layer in layers:
        if not layer.dense:
            layer.get_weight_specs()


def _known_specs(adapted: PrunableLayer) -> tuple[PrunableWeight, ...]:
    try:
        return adapted.get_weight_specs()
    except ValueError:  # it cannot be pruned; whoever tries will say why
        return ()


def _filter_function(filters: Filters) -> Callable[[PrunableLayer, PrunableWeight | None], bool]:
    """Whether filters pick a layer as a whole (`None`), or one weight of it."""
    if filters is None:
        return lambda adapted, weight: True
    if isinstance(filters, str):
        filters = [filters]
    if callable(filters):
        predicate = filters
        return lambda adapted, weight: bool(predicate(adapted.layer))
    if isinstance(filters, Sequence) and all(isinstance(pattern, str) for pattern in filters):
        patterns = [re.compile(pattern) for pattern in filters]

        def search(adapted: PrunableLayer, weight: PrunableWeight | None) -> bool:
            names = [adapted.path] if weight is None else [adapted.path, f"{adapted.path}/{weight.name}"]
            return any(pattern.search(name) for pattern in patterns for name in names)

        return search
    raise TypeError(f"`filters` must be a regex, a list of regexes or a callable. Received: filters={filters!r}")
