"""The sparse encoding, decoded again by an independent reading of the format, and as TFLite itself reads it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lite_helpers import interpreter

from keras_blocksparse.lite.encode import BlockCSR, encode_blocks, smallest_index


def decode(csr):
    """Literal: for each block row, each stored block, each element."""
    dense = np.zeros(csr.shape, csr.values.dtype)
    height, width = csr.block
    flat = csr.values.ravel().tolist()
    for row in range(csr.shape[0] // height):
        for k in range(csr.segments[row], csr.segments[row + 1]):
            for i in range(height):
                for j in range(width):
                    dense[row * height + i, csr.indices[k] * width + j] = flat.pop(0)
    assert not flat
    return dense


@st.composite
def block_matrices(draw):
    block = draw(st.sampled_from([(1, 4), (1, 16), (1, 1), (4, 4), (16, 16), (4, 1), (3, 5)]))
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dtype = draw(st.sampled_from([np.float32, np.float16, np.int8]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (grid[0] * block[0], grid[1] * block[1])
    matrix = rng.integers(-5, 6, shape) * (rng.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])))
    return matrix.astype(dtype), block


@given(block_matrices())
def test_encoding_decodes_to_the_matrix(case):
    matrix, block = case
    csr = encode_blocks(matrix, block)
    np.testing.assert_array_equal(decode(csr), matrix)
    assert csr.segments[0] == 0
    assert csr.segments[-1] == csr.kept == len(csr.values)
    assert csr.kept >= 1
    assert csr.max_per_row == max(np.diff(csr.segments))
    # No block of zeros is stored, but for the one that stands in an empty matrix.
    assert csr.kept == 1 or all(np.any(b) for b in csr.values)
    for a, b in zip(csr.segments, csr.segments[1:], strict=False):
        assert list(csr.indices[a:b]) == sorted(set(csr.indices[a:b]))


@given(block_matrices())
def test_densify_of_tflite_reads_it(case):
    """The file format proper: a DENSIFY of the stock interpreter gives the matrix back."""
    import tempfile
    from pathlib import Path

    matrix, block = case
    data = densify_file(encode_blocks(matrix, block), matrix.shape)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "densify.tflite"
        path.write_bytes(data)
        run = interpreter(path, delegates=False)  # XNNPACK cannot make a graph of nothing else
        run.allocate_tensors()
        run.invoke()
        np.testing.assert_array_equal(run.get_tensor(run.get_output_details()[0]["index"]), matrix)


def densify_file(csr: BlockCSR, shape) -> bytes:
    """A model of one operator: DENSIFY of a constant."""
    import flatbuffers
    from tensorflow.lite.python import schema_py_generated as schema

    from keras_blocksparse.lite.flatbuffer import Flatbuffer

    empty, builder = schema.ModelT(), flatbuffers.Builder()
    empty.version, empty.operatorCodes, empty.buffers = 3, [], [schema.BufferT()]
    builder.Finish(empty.Pack(builder), file_identifier=b"TFL3")
    file = Flatbuffer(bytes(builder.Output()))
    graph, op = schema.SubGraphT(), schema.OperatorT()
    graph.tensors = [schema.TensorT(), schema.TensorT()]
    kind = {"float32": 0, "float16": 1, "int8": 9}[csr.values.dtype.name]
    for tensor, name in zip(graph.tensors, (b"sparse", b"dense"), strict=True):
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, np.array(shape, np.int32), kind, 0
    graph.tensors[0].sparsity = file.sparsity(csr, shape)
    graph.tensors[0].buffer = file.add_buffer(csr.values)
    op.opcodeIndex = file.opcode(schema.BuiltinOperator.DENSIFY, 1)
    op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.DensifyOptions, schema.DensifyOptionsT()
    op.inputs, op.outputs = np.array([0], np.int32), np.array([1], np.int32)
    graph.inputs, graph.outputs, graph.operators = np.zeros(0, np.int32), np.array([1], np.int32), [op]
    file.tree.subgraphs = [graph]
    return file.tobytes()


def test_more_than_two_axes():
    """A convolution's filter (out, height, width, in), sparse along its last axis."""
    rng = np.random.default_rng(0)
    value = (rng.normal(size=(8, 1, 3, 16)) * (rng.random((8, 1, 3, 4)) < 0.3).repeat(4, axis=3)).astype(np.float32)
    data = densify_file(encode_blocks(value.reshape(-1, 16), (1, 4)), value.shape)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "densify.tflite"
        path.write_bytes(data)
        run = interpreter(path, delegates=False)  # XNNPACK cannot make a graph of nothing else
        run.allocate_tensors()
        run.invoke()
        np.testing.assert_array_equal(run.get_tensor(run.get_output_details()[0]["index"]), value)


@pytest.mark.parametrize(
    ("shape", "block"), [((4, 6), (1, 4)), ((6, 4), (4, 4)), ((4, 4), (0, 4)), ((4,), (1, 4)), ((2, 2, 4), (1, 4))]
)
def test_blocks_must_divide_a_matrix(shape, block):
    with pytest.raises(ValueError, match="Received: shape="):
        encode_blocks(np.ones(shape, np.float32), block)


@pytest.mark.parametrize(
    ("high", "dtype"), [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "int32")]
)
def test_smallest_index_is_the_narrowest_that_holds_the_values(high, dtype):
    index = smallest_index(np.array([0, high]))
    assert index.dtype == dtype
    assert index.tolist() == [0, high]


@pytest.mark.parametrize("value", [-1, 2**31])
def test_smallest_index_refuses_what_no_type_holds(value):
    with pytest.raises(ValueError, match=str(value)):
        smallest_index(np.array([value]))


def test_bytes_count_values_and_index():
    csr = encode_blocks(np.kron(np.eye(4), np.ones((1, 4))).astype(np.float32), (1, 4))
    assert csr.nbytes == 4 * 4 * 4 + 5 + 4
    assert csr.density == 0.25
