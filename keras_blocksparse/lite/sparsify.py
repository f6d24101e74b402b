"""Which encoding each weight of a TFLite file gets, and the change of the graph that goes with it.

What decides is what the stock kernels read rightly, which is less than what the format can express:

* float32: FULLY_CONNECTED has one SIMD kernel for sparse weights, for blocks of 1x4 (out x in). XNNPACK leaves such an
  operator alone.
* int8: one for blocks of 1x16, with float activations. It keeps block numbers and counts in a byte, without saying when
  they overflow. The operator must have version 8: given the newer version the converter writes, XNNPACK reads the
  blocks as a dense matrix.
* One scale per tensor: a scale per row is read rightly by TF 2.16, and silently ignored by tflite-runtime 2.14.
* float16: no kernel reads a sparse one. DENSIFY unpacks it once, when the interpreter is made; small file, dense speed.
  The same serves float32 weights that have no 1x4 blocks, or too many.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_blocksparse.lite.encode import BlockCSR, encode_blocks
from keras_blocksparse.lite.flatbuffer import Flatbuffer, text_of
from keras_blocksparse.lite.report import WeightRecord

_FC_VERSION = 8
_MAX_BYTE = 255

# Share of stored elements up to which the sparse kernel is used. On an AVX-512 machine, where XNNPACK's dense kernel is
# at its best, a 1024x3072 product at batch 1 breaks even at 0.3 (512x1536: 0.15, a difference of 30 us at 0.3). Above,
# float32 has DENSIFY for a small file at dense speed.
_MAX_DENSITY_FLOAT32 = 0.35
# int8 breaks even at 0.2, and has no other way to a small file: the limit gives 60 us a product for half its bytes.
_MAX_DENSITY_INT8 = 0.4
# DENSIFY has no cost at run time except that the dense weight is in memory besides; it must be worth the longer graph.
_MAX_BYTES_DENSIFY = 0.8
_DENSIFY_BLOCKS = ((1, 4), (1, 8), (1, 16), (4, 4), (8, 8), (16, 16), (32, 32), (4, 1), (16, 1), (1, 1))

# Weights below this many bytes stay dense: the description of a sparse tensor takes some hundred bytes itself.
_MIN_BYTES = 1024


@dataclass(frozen=True)
class KerasWeight:
    """A Keras weight to recognise in the file: its path and its value, a 2-D float32 array (inputs, outputs)."""

    path: str
    value: np.ndarray


def keras_weights(model: Any) -> list[KerasWeight]:
    """The matrices among the weights of a model, with their paths."""
    return [
        KerasWeight(w.path, np.asarray(w, np.float32))
        for w in model.weights
        if len(w.shape) == 2 and "float" in str(w.dtype)
    ]


def sparsify(file: Flatbuffer, quantize: str | None, weights: list[KerasWeight]) -> list[WeightRecord]:
    """Re-encodes the weights of a dense file in place.

    Args:
        file: a dense file, converted with the same `quantize`.
        quantize: None, `"int8"`, `"float16"`, or `"bfloat16"` for a file that was converted to float16.
        weights: the model's matrices. They name the records, and they hold the float values where an int8 file keeps a
            float weight.

    Returns:
        One record for each weight matrix and each larger constant of another operator.
    """
    records: list[WeightRecord] = []
    for graph in file.tree.subgraphs:
        for index in _weight_tensors(file, graph):
            records.append(_Weight(file, graph, index, quantize, weights).encode())
    return records


def _weight_tensors(file: Flatbuffer, graph: Any) -> list[int]:
    """Indices of the constants of a subgraph that count as weights: of rank 2 or more, and not small or all zeros."""
    fully_connected = {int(op.inputs[1]) for g, op in file.operators("FULLY_CONNECTED") if g is graph}
    found = []
    for index, tensor in enumerate(graph.tensors):
        value = file.constant(tensor)
        if value is None or value.ndim < 2 or not any(index in list(op.inputs) for op in graph.operators or ()):
            continue
        # Zeros of rank 3 are a sequence a loop will write to.
        if index in fully_connected or (value.nbytes >= _MIN_BYTES and (value.ndim == 2 or value.any())):
            found.append(index)
    return found


class _Weight:
    """One constant of the file and what reads it."""

    def __init__(
        self,
        file: Flatbuffer,
        graph: Any,
        index: int,
        quantize: str | None,
        weights: list[KerasWeight],
    ) -> None:
        self.file, self.graph, self.index, self.quantize = file, graph, index, quantize
        self.tensor = graph.tensors[index]
        value = file.constant(self.tensor)
        assert value is not None, "only constants become weights"
        self.value = value
        self.readers = [op for op in graph.operators if index in list(op.inputs)]
        self.keras, self.float_value = self._recognise(weights)

    def encode(self) -> WeightRecord:
        """Picks the encoding, changes the file, and says what was done."""
        if self.value.nbytes < _MIN_BYTES:
            return self._dense("smaller than the description of a sparse tensor")
        if self.quantize == "bfloat16" and self.value.dtype == np.float16:
            self._round()
        if self.quantize in ("float16", "bfloat16"):
            return self._densify(f"{self.quantize} has no sparse kernel")
        if self.index in list(self.graph.outputs):
            return self._dense("the graph gives it out")
        if not all(self.file.op_name(op) == "FULLY_CONNECTED" and op.inputs[1] == self.index for op in self.readers):
            names = ", ".join(sorted({self.file.op_name(op) for op in self.readers}))
            why = f"TFLite has no sparse kernel for {names}"
            return self._dense(why) if self.value.dtype == np.int8 else self._densify(why)
        if self.value.dtype == np.int8:
            return self._int8()
        return self._float32()

    def _round(self) -> None:
        """Rounds the weight to bfloat16, and keeps it as the float16 numbers that are the same.

        TFLite unpacks float16 and not bfloat16. Numbers of bfloat16's 8 bits fit into float16's 11 wherever weights
        are; below 6e-5 they lose digits that are less than 6e-8.
        """
        import ml_dtypes

        source = self.value.astype(np.float32) if self.float_value is None else self.float_value
        value = source.astype(ml_dtypes.bfloat16).astype(np.float16)
        if not np.isfinite(value).all():
            name = self.keras or text_of(self.tensor.name)
            raise ValueError(
                f"quantize='bfloat16' takes weights up to {np.finfo(np.float16).max:.0f}, the largest float16. "
                f"Received: {name} with {np.abs(source).max():.3g}"
            )
        self.value = value.reshape(self.value.shape)
        self.tensor.buffer = self.file.add_buffer(self.value)

    # ---- the choices

    def _float32(self) -> WeightRecord:
        inputs = self.value.shape[1]
        if inputs % 4:
            return self._densify(f"{inputs} inputs are not a multiple of 4")
        csr = encode_blocks(self.value, (1, 4))
        if csr.density > _MAX_DENSITY_FLOAT32:
            return self._densify(f"1x4 blocks hold {csr.density:.0%} of it, where the dense kernel is the faster")
        return self._sparse(csr, "")

    def _int8(self) -> WeightRecord:
        inputs = self.value.shape[1]
        if len(self.tensor.quantization.scale) > 1:
            return self._dense("it has a scale per row, which older runtimes ignore")
        if inputs % 16:
            return self._float32_instead(f"{inputs} inputs are not a multiple of 16")
        csr = encode_blocks(self.value, (1, 16))
        if csr.density > _MAX_DENSITY_INT8:
            return self._float32_instead(
                f"1x16 blocks hold {csr.density:.0%} of it, where the dense kernel is the faster"
            )
        if csr.max_per_row > _MAX_BYTE or csr.indices.max(initial=0) > _MAX_BYTE:
            return self._float32_instead(
                f"the int8 kernel counts blocks of 16 in a byte and the weight has {inputs} inputs"
            )
        return self._sparse(csr, "")

    def _float32_instead(self, why: str) -> WeightRecord:
        """A sparse float32 weight in an int8 file, where that is smaller than the dense int8 one."""
        if self.float_value is not None and self.value.shape[1] % 4 == 0:
            csr = encode_blocks(self.float_value, (1, 4))
            if csr.nbytes < self.value.nbytes and csr.density <= _MAX_DENSITY_FLOAT32:
                self.tensor.type = self.file.schema.TensorType.FLOAT32
                self.tensor.quantization = None
                return self._sparse(csr, f"float32: {why}; sparse float32 is smaller than dense int8")
        return self._dense(why)

    # ---- the changes

    def _sparse(self, csr: BlockCSR, why: str) -> WeightRecord:
        self._store(csr)
        version = self.file.opcode(self.file.schema.BuiltinOperator.FULLY_CONNECTED, _FC_VERSION)
        for op in self.readers:
            op.opcodeIndex = version
        return self._record(f"sparse {csr.block[0]}x{csr.block[1]}", csr.nbytes, csr.values.dtype, why)

    def _densify(self, why: str) -> WeightRecord:
        matrix = self.value.reshape(-1, self.value.shape[-1])
        rows, cols = matrix.shape
        fitting = [
            b for b in _DENSIFY_BLOCKS if rows % b[0] == 0 and cols % b[1] == 0 and (b[0] == 1 or self.value.ndim == 2)
        ]
        csr = min((encode_blocks(matrix, b) for b in fitting), key=lambda c: c.nbytes)
        if csr.nbytes > _MAX_BYTES_DENSIFY * self.value.nbytes:
            return self._dense(f"{why}; too few zero blocks to unpack it from ({csr.density:.0%} would be stored)")
        self._store(csr)
        schema = self.file.schema
        unpacked = schema.TensorT()
        unpacked.name = self.tensor.name + b"/dense"
        unpacked.shape, unpacked.type = self.tensor.shape, self.tensor.type
        unpacked.shapeSignature = None
        unpacked.hasRank = True
        unpacked.buffer = 0
        dense = self.file.add_tensor(self.graph, unpacked)
        op = self.file.operator("DENSIFY", [self.index], [dense])
        for reader in self.readers:
            reader.inputs = np.where(np.asarray(reader.inputs) == self.index, dense, reader.inputs).astype(np.int32)
        # Operators run in the order they are listed; nothing the constant depends on comes before.
        self.graph.operators.insert(0, op)
        if self.value.dtype == np.float16:
            self._guard(dense)
        return self._record(f"densify {csr.block[0]}x{csr.block[1]}", csr.nbytes, csr.values.dtype, why)

    def _guard(self, dense: int) -> None:
        """Adds a SHAPE that reads the unpacked weight, and whose result nobody reads.

        XNNPACK unpacks a constant itself where the reader is one of its own operators, and leaves DENSIFY out of the
        graph. For DENSIFY followed by DEQUANTIZE it looks at the reader of DENSIFY, its own DEQUANTIZE, and not at who
        reads that in turn: an operator it does not take then reads memory nobody wrote (seen as NaN, and as wrong
        numbers, in TF 2.16). A reader XNNPACK never takes keeps DENSIFY in the graph. SHAPE costs nothing, for it
        answers when the interpreter is prepared.
        """
        schema = self.file.schema
        shape = schema.TensorT()
        shape.name, shape.type, shape.hasRank, shape.buffer = (
            self.tensor.name + b"/shape",
            schema.TensorType.INT32,
            True,
            0,
        )
        shape.shape = np.array([self.value.ndim], np.int32)
        op = self.file.operator("SHAPE", [dense], [self.file.add_tensor(self.graph, shape)])
        op.builtinOptions.outType = schema.TensorType.INT32
        self.graph.operators.insert(1, op)

    def _store(self, csr: BlockCSR) -> None:
        self.tensor.sparsity = self.file.sparsity(csr, self.value.shape)
        self.tensor.buffer = self.file.add_buffer(csr.values)

    def _dense(self, why: str) -> WeightRecord:
        return self._record("dense", self.value.nbytes, self.value.dtype, why)

    def _record(self, encoding: str, nbytes: int, dtype: np.dtype, why: str) -> WeightRecord:
        return WeightRecord(
            name=self.keras or text_of(self.tensor.name),
            shape=tuple(int(d) for d in self.value.shape),
            dtype=str(dtype),
            encoding=encoding,
            sparsity=float(np.mean(self.value == 0)),
            bytes=int(nbytes),
            bytes_dense=int(self.value.size * 4),
            why=why,
        )

    # ---- where it comes from

    def _recognise(self, weights: list[KerasWeight]) -> tuple[str, np.ndarray | None]:
        """Path and float value of the Keras weight this constant is: as it is, transposed, or some of its columns."""
        if self.value.ndim != 2:
            return "", None
        outputs, inputs = self.value.shape
        for weight in weights:
            rows, cols = weight.value.shape
            for start in columns_of(self.tensor, self.value, weight)[:1]:
                columns = "" if outputs == cols else f"[:, {start}:{start + outputs}]"
                return weight.path + columns, np.ascontiguousarray(weight.value[:, start : start + outputs].T)
            if (rows, cols) == (outputs, inputs) and _is_close(self.tensor, self.value, weight.value):
                return weight.path, weight.value
        return "", None


def columns_of(tensor: Any, value: np.ndarray, weight: KerasWeight) -> list[int]:
    """Where in a Keras weight (inputs, outputs) the columns begin that a constant (outputs, inputs) of a file holds.

    Gates lie side by side, and a layer may multiply by some of them only: the first, the last, or one after the other.
    """
    outputs, inputs = value.shape
    rows, cols = weight.value.shape
    if rows != inputs or cols < outputs:
        return []
    starts = sorted({*range(0, cols - outputs + 1, outputs), cols - outputs})
    return [s for s in starts if _is_close(tensor, value, weight.value[:, s : s + outputs].T)]


def _is_close(tensor: Any, value: np.ndarray, weight: np.ndarray) -> bool:
    """Whether a constant is a float32 matrix, but for its quantization."""
    relative, absolute = 0.0, 1e-7
    if value.dtype == np.int8:
        scale = np.float32(tensor.quantization.scale[0])
        value, absolute = value * scale, 0.51 * float(scale)
    elif value.dtype == np.float16:
        value, relative = value.astype(np.float32), 1e-3
    return bool(np.allclose(value, weight, rtol=relative, atol=absolute))


def fill_zeros(file: Flatbuffer) -> None:
    """Replaces constants of zeros that a WHILE starts from by a FILL.

    The output sequence of a recurrent layer is such a constant: timesteps x units floats that say nothing.
    """
    for graph, loop in list(file.operators("WHILE")):
        for index in sorted({int(i) for i in loop.inputs}):
            unpack = unpacking(file, graph, index)
            tensor = graph.tensors[unpack.inputs[0] if unpack else index]
            value = file.constant(tensor)
            if value is None or value.dtype == np.int8 or value.nbytes < _MIN_BYTES or value.any():
                continue
            dims = file.add_constant(graph, tensor.name + b"/dims", np.array(value.shape, np.int32))
            zero = file.add_constant(graph, tensor.name + b"/zero", np.array(0, np.float32))
            op = file.operator("FILL", [dims, zero], [index])
            tensor.buffer = 0
            if unpack:
                graph.operators.remove(unpack)
            graph.operators.insert(0, op)


def unpacking(file: Flatbuffer, graph: Any, index: int) -> Any | None:
    """The DEQUANTIZE that gives a tensor, or None."""
    return next((op for op in graph.operators if index in list(op.outputs) and file.op_name(op) == "DEQUANTIZE"), None)
