"""The dense twin of a TFLite file: the same graph with every zero in its place, as somebody without us would run it."""

from typing import Any

import numpy as np

from keras_blocksparse.lite.flatbuffer import Flatbuffer, text_of
from keras_blocksparse.lite.fuse import COMPOSITE_NAME, CUSTOM_CODE

# What the converter writes for a float32 weight; XNNPACK looks at it.
_FC_VERSION = 5


def make_dense(file: Flatbuffer) -> None:
    """Changes a file into its dense float32 twin, in place.

    Recurrent operators become the loops of builtin operators that they stand for, sparse weights dense ones, and int8
    and float16 weights of fully connected operators float32 ones.

    Raises:
        ValueError: the file was written with `compat="custom"` and has no such loops, or its sparsity is a lie.
    """
    if CUSTOM_CODE in file.custom_ops():
        raise ValueError("there is no stock graph in a file that was written with compat='custom'")
    _inline(file)
    for graph in file.tree.subgraphs:
        for op in list(graph.operators or ()):
            if file.op_name(op) in ("DENSIFY", "DEQUANTIZE"):
                _unpack(file, graph, op)
        for op in graph.operators or ():
            if file.op_name(op) == "FULLY_CONNECTED":
                _widen(file, graph, op)
        for tensor in graph.tensors:
            if tensor.sparsity is not None and (value := file.dense(tensor)) is not None:
                tensor.sparsity = None
                tensor.buffer = file.add_buffer(value)
        file.remove_unread(graph)


def _inline(file: Flatbuffer) -> None:
    """Puts the operators of our composites' decompositions in the composites' places."""
    inlined: set[int] = set()
    for graph, composite in file.operators("STABLEHLO_COMPOSITE"):
        options = composite.builtinOptions2
        if text_of(options.name) != COMPOSITE_NAME:
            continue
        body = file.tree.subgraphs[options.decompositionSubgraphIndex]
        inlined.add(options.decompositionSubgraphIndex)
        outer = {int(t): int(o) for t, o in zip(body.inputs, composite.inputs, strict=True)}
        outer.update({int(t): int(o) for t, o in zip(body.outputs, composite.outputs, strict=True)})
        for number, tensor in enumerate(body.tensors):
            if number not in outer:
                outer[number] = file.copy_tensor(tensor, graph)
        operators = []
        for op in body.operators:
            again = file.copy_operator(op)
            again.inputs = np.array([outer[int(t)] if t >= 0 else t for t in op.inputs], np.int32)
            again.outputs = np.array([outer[int(t)] for t in op.outputs], np.int32)
            operators.append(again)
        place = graph.operators.index(composite)
        graph.operators[place : place + 1] = operators
    file.remove_subgraphs(inlined)


def _unpack(file: Flatbuffer, graph: Any, op: Any) -> None:
    """Has a DENSIFY or DEQUANTIZE of a constant done once and for all."""
    source, result = graph.tensors[op.inputs[0]], graph.tensors[op.outputs[0]]
    value = file.dense(source)
    if value is None:
        return
    if file.op_name(op) == "DEQUANTIZE":
        if value.dtype != np.float16:
            return
        file.set_constant(result, value.astype(np.float32))
    else:
        result.sparsity, result.type, result.buffer = None, source.type, file.add_buffer(value)
    graph.operators.remove(op)


def _widen(file: Flatbuffer, graph: Any, op: Any) -> None:
    """Gives a fully connected operator with float32 inputs a dense float32 weight."""
    if graph.tensors[op.inputs[0]].type != file.schema.TensorType.FLOAT32:
        return
    weight = graph.tensors[op.inputs[1]]
    value = file.dense(weight)
    if value is None:
        return
    if value.dtype == np.int8:
        scales = np.asarray(weight.quantization.scale, np.float32)
        weight.quantization = None
        value = value * scales.reshape(-1, *[1] * (value.ndim - 1))
    file.set_constant(weight, value.astype(np.float32))
    op.opcodeIndex = file.opcode(file.schema.BuiltinOperator.FULLY_CONNECTED, _FC_VERSION)
