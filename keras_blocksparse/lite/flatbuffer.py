"""The post-pass over a TFLite file: reading, sparse weights, opcode versions, signature, writing.

The converter gives a dense file; `Flatbuffer` holds it as the object tree that TensorFlow's generated schema module
offers, and each method makes one change to it. What the stock kernels can read is decided in `sparsify.py`, not here.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_blocksparse.lite.encode import BlockCSR, Level, decode, smallest_index

_FILE_IDENTIFIER = b"TFL3"
_BUFFER_ALIGNMENT = 16  # `force_align` of Buffer.data in the schema
# Fields of options in which an operator names the subgraphs it runs.
_SUBGRAPH_FIELDS = ("condSubgraphIndex", "bodySubgraphIndex", "thenSubgraphIndex", "elseSubgraphIndex", "subgraph")


class Flatbuffer:
    """A TFLite model as a tree of objects that can be changed and written again.

    Example:
    ```python
    model = Flatbuffer(open("model.tflite", "rb").read())
    for graph, op in model.operators("FULLY_CONNECTED"):
        print(graph.tensors[op.inputs[1]].shape)
    data = model.tobytes()
    ```

    Args:
        data: the bytes of a `.tflite` file.

    Attributes:
        schema: TensorFlow's generated module of the file format.
        tree: the `ModelT` object.
    """

    def __init__(self, data: bytes) -> None:
        from tensorflow.lite.python import schema_py_generated as schema

        self.schema = schema
        self.tree = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
        self._dtypes = {
            schema.TensorType.FLOAT32: np.float32,
            schema.TensorType.FLOAT16: np.float16,
            schema.TensorType.INT8: np.int8,
        }
        self._buffers: dict[bytes, int] = {}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Flatbuffer":
        """The model in a file that may be anybody's.

        Raises:
            ValueError: there is no such file, or it is no TFLite model, or a broken one.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"Cannot read {os.fspath(path)!r}: {error.strerror}") from error
        if data[4:8] != _FILE_IDENTIFIER:
            raise ValueError(f"{os.fspath(path)!r} is no TFLite model: it has no {_FILE_IDENTIFIER.decode()!r} mark")
        try:
            file = cls(data)
            for graph in file.tree.subgraphs:
                sizes = [len(graph.tensors), len(file.tree.operatorCodes), len(file.tree.buffers)]
                numbers = [(int(t), 0) for op in graph.operators or () for t in (*op.inputs, *op.outputs) if t >= 0]
                numbers += [(int(t), 0) for t in (*graph.inputs, *graph.outputs)]
                numbers += [(op.opcodeIndex, 1) for op in graph.operators or ()]
                numbers += [(tensor.buffer, 2) for tensor in graph.tensors]
                if not all(0 <= number < sizes[kind] for number, kind in numbers):
                    raise IndexError("a number of a tensor, buffer or operator is out of range")
        except (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{os.fspath(path)!r} is a broken TFLite model: {error}") from error
        return file

    # ---- reading

    def op_name(self, op: Any) -> str:
        """Name of an operator as the schema writes it (`"WHILE"`), or the custom code of a custom operator."""
        code = self.tree.operatorCodes[op.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        if builtin == self.schema.BuiltinOperator.CUSTOM:
            return text_of(code.customCode)
        names = {v: k for k, v in vars(self.schema.BuiltinOperator).items() if not k.startswith("_")}
        return names.get(builtin, f"builtin {builtin}")

    def custom_ops(self) -> list[str]:
        """Custom codes of the operators that are not builtin, sorted; `Flex...` ones are TensorFlow's own kernels."""
        ops = [op for graph in self.tree.subgraphs for op in graph.operators or ()]
        return sorted({self.op_name(op) for op in ops if self.tree.operatorCodes[op.opcodeIndex].customCode})

    def operators(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Yields `(subgraph, operator)` for each operator of the name."""
        for graph in self.tree.subgraphs:
            for op in list(graph.operators or ()):
                if self.op_name(op) == name:
                    yield graph, op

    def constant(self, tensor: Any) -> np.ndarray | None:
        """Value of a dense constant tensor (a view, in the tensor's dtype and shape), or None for any other tensor."""
        data = self.tree.buffers[tensor.buffer].data
        if data is None or len(data) == 0 or tensor.sparsity is not None:
            return None
        dtype = self._dtypes.get(tensor.type)
        if dtype is None:
            return None
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype).reshape(np.asarray(tensor.shape, int))

    def dense(self, tensor: Any) -> np.ndarray | None:
        """Value of a constant tensor, unpacked if it is sparse; None for any other tensor.

        Raises:
            ValueError: the sparsity or the size of the tensor is a lie.
        """
        if tensor.sparsity is None:
            return self.constant(tensor)
        data, dtype = self.tree.buffers[tensor.buffer].data, self._dtypes.get(tensor.type)
        if data is None or dtype is None:
            return None
        values = np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype)
        sparse = tensor.sparsity
        levels = [
            Level(segments=_index(dim.arraySegments), indices=_index(dim.arrayIndices))
            if dim.format == self.schema.DimensionType.SPARSE_CSR
            else Level(size=int(dim.denseSize))
            for dim in sparse.dimMetadata or ()
        ]
        order, blocks = ([int(d) for d in _or_empty(v)] for v in (sparse.traversalOrder, sparse.blockMap))
        return decode(values, tuple(int(d) for d in tensor.shape), order, blocks, levels)

    # ---- changing

    def subgraphs_below(self, index: int) -> list[int]:
        """A subgraph and those that its operators run, by number."""
        found, pending = [], [index]
        while pending:
            index = pending.pop()
            if index not in found:
                found.append(index)
                for op in self.tree.subgraphs[index].operators or ():
                    options = op.builtinOptions
                    pending += [getattr(options, name) for name in _SUBGRAPH_FIELDS if hasattr(options, name)]
        return found

    def remove_subgraphs(self, dropped: set[int]) -> None:
        """Removes subgraphs that no operator runs any more, and numbers the others anew."""
        kept = [index for index in range(len(self.tree.subgraphs)) if index not in dropped]
        for index in kept:
            for op in self.tree.subgraphs[index].operators or ():
                for name in _SUBGRAPH_FIELDS:
                    if hasattr(op.builtinOptions, name):
                        setattr(op.builtinOptions, name, kept.index(getattr(op.builtinOptions, name)))
        self.tree.subgraphs = [self.tree.subgraphs[index] for index in kept]

    def remove_unread(self, graph: Any) -> None:
        """Removes operators whose results nobody reads, and the values of constants that nobody reads."""
        while True:
            read = {int(t) for op in graph.operators for t in op.inputs} | {int(t) for t in graph.outputs}
            kept = [op for op in graph.operators if any(int(t) in read for t in op.outputs)]
            if len(kept) == len(graph.operators):
                break
            graph.operators = kept
        for index, tensor in enumerate(graph.tensors):
            if index not in read:
                tensor.buffer = 0

    def set_constant(self, tensor: Any, value: np.ndarray) -> None:
        """Makes a tensor a dense constant, float32 or int8."""
        tensor.sparsity = None
        tensor.type = {np.float32: self.schema.TensorType.FLOAT32, np.int8: self.schema.TensorType.INT8}[
            value.dtype.type
        ]
        tensor.buffer = self.add_buffer(np.ascontiguousarray(value))

    def add_buffer(self, data: np.ndarray) -> int:
        """Index of a buffer with the bytes of the array: one that was added before, or a new one.

        A layer that is called twice has its weights in two loops, and they go on sharing one buffer.
        """
        content = data.tobytes()
        if content not in self._buffers:
            self.tree.buffers.append(self.schema.BufferT())
            self.tree.buffers[-1].data = np.frombuffer(content, np.uint8)
            self._buffers[content] = len(self.tree.buffers) - 1
        return self._buffers[content]

    def add_tensor(self, graph: Any, tensor: Any) -> int:
        """Appends a tensor to a subgraph and returns its number there."""
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def add_constant(self, graph: Any, name: bytes, value: np.ndarray) -> int:
        """Appends a constant tensor, float32 or int32, to a subgraph and returns its number there."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.hasRank = name, True
        tensor.type = {np.float32: self.schema.TensorType.FLOAT32, np.int32: self.schema.TensorType.INT32}[
            value.dtype.type
        ]
        tensor.shape = np.array(value.shape, np.int32)
        tensor.buffer = self.add_buffer(value)
        return self.add_tensor(graph, tensor)

    def copy_tensor(self, tensor: Any, graph: Any) -> int:
        """Appends a copy of a tensor, on the same buffer, to a subgraph and returns its number there."""
        copy = self.schema.TensorT()
        copy.__dict__.update(tensor.__dict__)
        return self.add_tensor(graph, copy)

    def copy_operator(self, op: Any) -> Any:
        """A copy of an operator, to be put somewhere."""
        copy = self.schema.OperatorT()
        copy.__dict__.update(op.__dict__)
        return copy

    def operator(self, name: str, inputs: list[int], outputs: list[int]) -> Any:
        """An operator of version 1 with its default options; `name` as the schema writes it."""
        op = self.schema.OperatorT()
        op.opcodeIndex = self.opcode(getattr(self.schema.BuiltinOperator, name), 1)
        options = "".join(part.capitalize() for part in name.split("_")) + "Options"
        op.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
        op.builtinOptions = getattr(self.schema, options + "T")()
        op.inputs, op.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return op

    def custom_opcode(self, name: str) -> int:
        """Index of the operator code of a custom operator; it is added if the model has none."""
        return self.opcode(self.schema.BuiltinOperator.CUSTOM, 1, name.encode())

    def opcode(self, builtin: int, version: int, custom: bytes | None = None) -> int:
        """Index of the operator code with this builtin and version; it is added if the model has none."""
        for i, code in enumerate(self.tree.operatorCodes):
            same = max(code.builtinCode, code.deprecatedBuiltinCode) == builtin and code.version == version
            if same and (custom is None or code.customCode == custom):
                return i
        code = self.schema.OperatorCodeT()
        code.builtinCode = builtin
        # Readers older than the 32-bit field look at this one; 127 sends them to the other.
        code.deprecatedBuiltinCode = min(builtin, 127)
        code.version = version
        code.customCode = custom
        self.tree.operatorCodes.append(code)
        return len(self.tree.operatorCodes) - 1

    def sparsity(self, csr: BlockCSR, shape: tuple[int, ...]) -> Any:
        """The `SparsityParametersT` that describes the block pattern of a tensor.

        Args:
            csr: the encoded matrix.
            shape: shape of the tensor. The matrix is the tensor with all but its last axis made one; with more than two
                axes, blocks must have one row.

        A block of one row adds one dimension inside (the fully connected kernels want it so), any other block two,
        which only DENSIFY reads.
        """
        height, width = csr.block
        *leading, last = range(len(shape))
        dims = [self._dense(shape[axis]) for axis in leading]
        dims[-1] = self._dense(shape[leading[-1]] // height)
        dims.append(self._compressed(csr))
        dims += [self._dense(width)] if height == 1 else [self._dense(height), self._dense(width)]
        sparsity = self.schema.SparsityParametersT()
        sparsity.traversalOrder = list(range(len(dims)))
        sparsity.blockMap = [last] if height == 1 else [leading[-1], last]
        sparsity.dimMetadata = dims
        return sparsity

    def _dense(self, size: int) -> Any:
        dim = self.schema.DimensionMetadataT()
        dim.format = self.schema.DimensionType.DENSE
        dim.denseSize = size
        return dim

    def _compressed(self, csr: BlockCSR) -> Any:
        dim = self.schema.DimensionMetadataT()
        dim.format = self.schema.DimensionType.SPARSE_CSR
        dim.arraySegmentsType, dim.arraySegments = self._index_vector(csr.segments)
        dim.arrayIndicesType, dim.arrayIndices = self._index_vector(csr.indices)
        return dim

    def _index_vector(self, index: np.ndarray) -> tuple[int, Any]:
        schema, values = self.schema, smallest_index(index)
        kind, vector = {
            np.dtype(np.uint8): (schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
            np.dtype(np.uint16): (schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
            np.dtype(np.int32): (schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
        }[values.dtype]
        result = vector()
        result.values = values
        return kind, result

    def set_signature(self, inputs: list[str], outputs: list[str], key: str = "serving_default") -> None:
        """Gives the main subgraph one signature, with these names in the order of its inputs and outputs."""
        main = self.tree.subgraphs[0]
        signature = self.schema.SignatureDefT()
        signature.signatureKey = key
        signature.subgraphIndex = 0
        signature.inputs = [self._tensor_map(n, t) for n, t in zip(inputs, main.inputs, strict=True)]
        signature.outputs = [self._tensor_map(n, t) for n, t in zip(outputs, main.outputs, strict=True)]
        self.tree.signatureDefs = [signature]

    def _tensor_map(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, int(tensor)
        return entry

    # ---- writing

    def drop_unused(self) -> None:
        """Empties buffers no tensor or metadata refers to any more and removes operator codes no operator has."""
        used = {t.buffer for g in self.tree.subgraphs for t in g.tensors}
        used |= {m.buffer for m in self.tree.metadata or ()}
        for i, buffer in enumerate(self.tree.buffers):
            if i not in used:
                buffer.data = None
        ops = [op for g in self.tree.subgraphs for op in g.operators or ()]
        kept = sorted({op.opcodeIndex for op in ops})
        for op in ops:
            op.opcodeIndex = kept.index(op.opcodeIndex)
        self.tree.operatorCodes = [self.tree.operatorCodes[i] for i in kept]

    def tobytes(self) -> bytes:
        """Bytes of the file."""
        import flatbuffers

        self.drop_unused()
        for buffer in self.tree.buffers:
            if buffer.data is not None:
                buffer.__class__ = _aligned(self.schema)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.tree.Pack(builder), file_identifier=_FILE_IDENTIFIER)
        return bytes(builder.Output())


def text_of(value: bytes | str | None) -> str:
    """A string of the schema: its generated module gives bytes or str, by its version and by where they come from."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _or_empty(vector: Any) -> Any:
    return () if vector is None else vector


def _index(vector: Any) -> np.ndarray:
    """An index vector of any width; none at all is empty."""
    return np.asarray(_or_empty(None if vector is None else vector.values), np.int64)


def _aligned(schema: Any) -> type:
    """`BufferT` whose data starts at a multiple of 16 in the file. The schema asks it, the generated Pack forgets."""

    class AlignedBuffer(schema.BufferT):
        def Pack(self, builder: Any) -> int:
            if self.data is None:
                return super().Pack(builder)
            data = np.asarray(self.data, np.uint8).tobytes()
            builder.StartVector(1, len(data), _BUFFER_ALIGNMENT)
            builder.head = builder.Head() - len(data)
            builder.Bytes[builder.Head() : builder.Head() + len(data)] = data
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return AlignedBuffer
