"""Recurrent layers as one operator each, with the stock graph of the layer behind it.

The converter sees a Keras layer as a handful of operators around a loop. To find them again in its file, `mark_layers`
puts a mark on every tensor that goes into a layer's loop and on every one that comes out: an operator the converter
does not know, and therefore neither folds nor moves anything across. `outline` takes what lies between the marks out
into a subgraph and puts one operator in its place:

* STABLEHLO_COMPOSITE, whose decomposition is that subgraph. A runtime without our delegate runs the decomposition.
* or CUSTOM, for runtimes that do not know composites; only the delegate can run it.

The operator names the constants that make up its matrices by subgraph and tensor (`name_weights`). They are no inputs
of it, for a runtime would copy them into the decomposition at every call.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_blocksparse.lite.convert import layers_of
from keras_blocksparse.lite.errors import ExportError
from keras_blocksparse.lite.flatbuffer import Flatbuffer
from keras_blocksparse.lite.sparsify import KerasWeight, columns_of
from keras_blocksparse.sparse._native import ACTIVATIONS, CELLS
from keras_blocksparse.sparse.layers import native_activation, why_unfused

COMPOSITE_NAME = "keras_blocksparse.rnn"
CUSTOM_CODE = "KerasBlocksparseRnn"
_VERSION = 1

# Any operator would do that TensorFlow passes a tensor through, with a string to know it by, and that TFLite does not
# have. Being stateful in TensorFlow, this one is not folded where its input is a constant.
_MARK = "DebugIdentityV2"
_MARK_ATTRIBUTE = "tfdbg_context_id"


@dataclass
class FusedCall:
    """One call of a recurrent layer that becomes one operator.

    Attributes:
        layer: path of the Keras layer.
        attributes: what the operator says of itself, but for its weights.
        inputs: how many tensors go in: the sequence, a mask, states.
        outputs: how many come out: the output, states.
        matrices: `kernel` and `recurrent`, float32, (inputs, gates * units) and (units, gates * units).
        bias: float32, or None.
        operator: the operator in the file, once it is there.
        graph: its subgraph.
        decomposition: index of the subgraph that was taken out.
    """

    layer: str
    attributes: dict[str, int | float]
    inputs: int
    outputs: int
    matrices: dict[str, np.ndarray]
    bias: np.ndarray | None
    operator: Any = None
    graph: Any = None
    decomposition: int = -1
    places: dict[str, list[int]] = field(default_factory=dict)


# ---- marks, while the model is traced


@contextlib.contextmanager
def mark_layers(model: Any, streaming: bool, calls: list[FusedCall], left_alone: dict[str, str]) -> Iterator[None]:
    """While the context lasts, a recurrent layer that is called marks what goes in and out, and adds itself to `calls`.

    Args:
        model: a built Keras model.
        streaming: the final states are wanted whatever the layer returns.
        calls: gets one entry for each call of a layer.
        left_alone: gets the recurrent layers that no fused loop can run: path and reason.
    """
    import keras

    kinds = {keras.layers.SimpleRNN: "simple_rnn", keras.layers.GRU: "gru", keras.layers.LSTM: "lstm"}
    hooked = []
    try:
        for layer in layers_of(model):
            if not isinstance(layer, keras.layers.RNN):
                continue
            kind = kinds.get(type(layer))
            reason = why_unfused(layer.cell) if kind else f"the native loop has no {type(layer).__name__}"
            if kind is None or reason:
                left_alone[layer.path] = reason
                continue
            layer.__dict__["inner_loop"] = _marked_loop(layer, kind, streaming, calls)
            hooked.append(layer)
        yield
    finally:
        for layer in hooked:
            layer.__dict__.pop("inner_loop", None)


def _marked_loop(layer: Any, kind: str, streaming: bool, calls: list[FusedCall]) -> Any:
    inner_loop, weights = layer.inner_loop, _weights(layer.cell)

    def marked(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        import tensorflow as tf

        number = len(calls)
        states, mask = tf.nest.flatten(initial_state), next(iter(tf.nest.flatten(mask)), None)
        given = [] if all(_is_zero(state) for state in states) else states
        states_out = len(states) if layer.return_state or streaming else 0
        flags = {"mask": mask is not None, "states_in": len(given), "states_out": states_out}
        calls.append(_describe(layer, kind, flags, *weights))

        sequences = _mark(sequences, number, "in", 0)
        if mask is not None:
            mask = _mark(tf.cast(mask, tf.bool), number, "in", 1)
        if given:
            states = [_mark(s, number, "in", 1 + (mask is not None) + i) for i, s in enumerate(given)]
        last_output, outputs, states = inner_loop(sequences, states, mask, training)
        if layer.return_sequences:
            outputs = _mark(outputs, number, "out", 0)
        else:
            last_output = _mark(last_output, number, "out", 0)
        if states_out:
            states = [_mark(s, number, "out", 1 + i) for i, s in enumerate(tf.nest.flatten(states))]
        return last_output, outputs, states

    return marked


def _mark(tensor: Any, number: int, side: str, position: int) -> Any:
    import tensorflow as tf

    marked = tf.raw_ops.DebugIdentityV2(input=tensor, tfdbg_context_id=f"kbs/{number}/{side}/{position}")
    marked.set_shape(tensor.shape)
    return marked


def _is_zero(state: Any) -> bool:
    import tensorflow as tf

    value = tf.get_static_value(state)
    return value is not None and not value.any()


def _weights(cell: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Matrices and bias of a cell; a bias of zeros is none."""
    matrices = {
        "kernel": np.asarray(cell.kernel, np.float32),
        "recurrent": np.asarray(cell.recurrent_kernel, np.float32),
    }
    bias = None if cell.bias is None else np.asarray(cell.bias, np.float32).reshape(-1)
    return matrices, bias if bias is not None and bias.any() else None


def _describe(
    layer: Any, kind: str, flags: dict[str, Any], matrices: dict[str, np.ndarray], bias: np.ndarray | None
) -> FusedCall:
    cell = layer.cell
    activation, limit = native_activation(cell.activation) or ("", 0.0)
    gate, gate_limit = native_activation(getattr(cell, "recurrent_activation", None)) or ("", 0.0)
    attributes: dict[str, int | float] = {
        "version": _VERSION,
        "cell": CELLS[kind],
        "activation": ACTIVATIONS[activation],
        "recurrent_activation": ACTIVATIONS[gate],
        "activation_limit": limit,
        "recurrent_limit": gate_limit,
        "units": int(cell.units),
        "reset_after": int(getattr(cell, "reset_after", False)),
        "go_backwards": int(layer.go_backwards),
        "return_sequences": int(layer.return_sequences),
        "zero_output_for_mask": int(getattr(layer, "zero_output_for_mask", False)),
        **{name: int(value) for name, value in flags.items()},
    }
    return FusedCall(
        layer=layer.path,
        attributes=attributes,
        inputs=1 + int(flags["mask"]) + int(flags["states_in"]),
        outputs=1 + int(flags["states_out"]),
        matrices=matrices,
        bias=bias,
    )


# ---- one operator, in the file


def outline(file: Flatbuffer, calls: list[FusedCall]) -> None:
    """Takes what lies between the marks of each call out into a subgraph, and puts one operator in its place.

    Raises:
        ExportError: the marks of a call do not enclose a part of one graph; that is a fault of this package.
    """
    from flatbuffers import flexbuffers

    marks: dict[int, dict[str, dict[int, tuple[Any, Any]]]] = {}
    for graph, op in file.operators(_MARK):
        _, number, side, position = flexbuffers.Loads(bytes(op.customOptions))[_MARK_ATTRIBUTE].split("/")
        marks.setdefault(int(number), {"in": {}, "out": {}})[side][int(position)] = graph, op
    for number, call in enumerate(calls):
        found = marks.get(number, {"in": {}, "out": {}})
        ends = [*found["in"].values(), *found["out"].values()]
        if len(found["in"]) != call.inputs or len(found["out"]) != call.outputs or len({id(g) for g, _ in ends}) != 1:
            raise ExportError(f"The loop of layer {call.layer!r} cannot be told from the rest of the converted file.")
        inside = [found["in"][i][1] for i in range(call.inputs)]
        outside = [found["out"][i][1] for i in range(call.outputs)]
        _outline(file, ends[0][0], call, inside, outside)


def _outline(file: Flatbuffer, graph: Any, call: FusedCall, begins: list[Any], ends: list[Any]) -> None:
    schema = file.schema
    producer = {int(t): op for op in graph.operators for t in op.outputs}
    starts = {int(op.outputs[0]) for op in begins}
    region: set[int] = set()
    pending = [int(op.inputs[0]) for op in ends]
    while pending:
        tensor = pending.pop()
        op = producer.get(tensor)
        if tensor in starts or tensor < 0 or (op is not None and id(op) in region):
            continue
        if op is not None:
            region.add(id(op))
            pending += [int(t) for t in op.inputs]
        elif tensor in [int(t) for t in graph.inputs]:
            raise ExportError(f"The loop of layer {call.layer!r} reads an input of the model past its own inputs.")

    body = schema.SubGraphT()
    body.name = f"{call.layer}/stock".encode()
    body.tensors, body.operators = [], []
    copied: dict[int, int] = {}

    def inner(tensor: int) -> int:
        if tensor < 0:
            return tensor
        if tensor not in copied:
            copied[tensor] = file.copy_tensor(graph.tensors[tensor], body)
        return copied[tensor]

    body.inputs = np.array([inner(int(op.outputs[0])) for op in begins], np.int32)
    for op in graph.operators:
        if id(op) in region:
            again = file.copy_operator(op)
            again.inputs = np.array([inner(int(t)) for t in op.inputs], np.int32)
            again.outputs = np.array([inner(int(t)) for t in op.outputs], np.int32)
            body.operators.append(again)
    body.outputs = np.array([inner(int(op.inputs[0])) for op in ends], np.int32)
    file.tree.subgraphs.append(body)
    call.decomposition = len(file.tree.subgraphs) - 1

    fused = schema.OperatorT()
    fused.opcodeIndex = file.opcode(schema.BuiltinOperator.STABLEHLO_COMPOSITE, 1)
    fused.builtinOptions2Type = schema.BuiltinOptions2.StableHLOCompositeOptions
    options = fused.builtinOptions2 = schema.StableHLOCompositeOptionsT()
    options.name, options.decompositionSubgraphIndex, options.version = COMPOSITE_NAME, call.decomposition, 1
    fused.inputs = np.array([op.inputs[0] for op in begins], np.int32)
    fused.outputs = np.array([op.outputs[0] for op in ends], np.int32)
    call.operator, call.graph = fused, graph
    graph.operators.insert(max(graph.operators.index(op) for op in ends) + 1, fused)
    for op in (*begins, *ends):
        graph.operators.remove(op)
    file.remove_unread(graph)
    _pass_on_outputs(file, graph, fused)


def _pass_on_outputs(file: Flatbuffer, graph: Any, fused: Any) -> None:
    """Puts a RESHAPE to the same shape behind a result that the graph gives out: LiteRT 2 loses it otherwise."""
    for position, tensor in enumerate(fused.outputs):
        if tensor not in list(graph.outputs):
            continue
        result = file.copy_tensor(graph.tensors[tensor], graph)
        shape = np.array(graph.tensors[tensor].shape, np.int32)
        shape[0] = -1  # the batch may be resized
        dims = file.add_constant(graph, graph.tensors[tensor].name + b"/shape", shape)
        # The operators that read the result go on reading it under its old number; the new one is the operator's own.
        fused.outputs[position] = result
        op = file.operator("RESHAPE", [result, dims], [int(tensor)])
        op.builtinOptions.newShape = shape
        graph.operators.insert(graph.operators.index(fused) + 1, op)


# ---- its weights


def name_weights(file: Flatbuffer, calls: list[FusedCall]) -> None:
    """Finds the constants that make up each call's matrices, before they are encoded, and remembers where they are."""
    for call in calls:
        graphs = file.subgraphs_below(call.decomposition)
        for name, matrix in call.matrices.items():
            call.places[name] = _columns(file, graphs, matrix) or _add(file, call, name, matrix.T)
        call.places["bias"] = [] if call.bias is None else _add(file, call, "bias", call.bias)


def _columns(file: Flatbuffer, graphs: list[int], matrix: np.ndarray) -> list[int]:
    """Subgraph and tensor of the constants that are a matrix's columns, from left to right; [] if some are not there.

    The converter keeps a matrix transposed, whole or cut between gates.
    """
    constants = []
    for index in graphs:
        for number, tensor in enumerate(file.tree.subgraphs[index].tensors):
            value = file.constant(tensor)
            if value is not None and value.ndim == 2 and value.shape[1] == matrix.shape[0]:
                constants.append((value.shape[0], index, number, columns_of(tensor, value, KerasWeight("", matrix))))
    constants.sort(key=lambda c: -c[0])
    places: list[int] = []
    column = 0
    while column < matrix.shape[1]:
        for outputs, index, number, starts in constants:
            if column in starts:
                places += [index, number]
                column += outputs
                break
        else:
            return []
    return places


def _add(file: Flatbuffer, call: FusedCall, name: str, value: np.ndarray) -> list[int]:
    """A constant of its own for what the decomposition has in another form."""
    graph = file.tree.subgraphs[call.decomposition]
    return [call.decomposition, file.add_constant(graph, f"{call.layer}/{name}".encode(), np.ascontiguousarray(value))]


# ---- what the operator says


def set_attributes(file: Flatbuffer, calls: list[FusedCall], bfloat16: bool, compat: str | None) -> None:
    """Writes the attributes of each call's operator, when its weights are where they will stay.

    Args:
        file: the file.
        calls: what `outline` and `name_weights` were given.
        bfloat16: the delegate holds the weights as bfloat16.
        compat: None for composites, `"custom"` for custom operators.
    """
    from flatbuffers import flexbuffers

    if compat == "custom":
        for call in calls:
            _move_weights(file, call)
        file.remove_subgraphs({index for call in calls for index in file.subgraphs_below(call.decomposition)})
    for call in calls:
        attributes = {**call.attributes, "bfloat16": int(bfloat16), **call.places}
        data = np.frombuffer(bytes(flexbuffers.Dumps(attributes)), np.uint8)
        op = call.operator
        if compat is None:
            op.builtinOptions2.compositeAttributes = data
            continue
        op.opcodeIndex = file.custom_opcode(CUSTOM_CODE)
        op.builtinOptions2Type, op.builtinOptions2 = 0, None
        op.customOptions = data


def _move_weights(file: Flatbuffer, call: FusedCall) -> None:
    """Gives the operator's own subgraph the constants; -1 is its number in the attributes."""
    for name, places in call.places.items():
        moved = []
        for index, tensor in zip(places[::2], places[1::2], strict=True):
            source = file.tree.subgraphs[index].tensors[tensor]
            moved += [-1, file.copy_tensor(source, call.graph)]
        call.places[name] = moved
