"""Packed buffers that were cut, changed or made up: an error each time, and never a wild read."""

import contextlib
import ctypes
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, _native
from tests.native.reference import matmul_transposed, pruned, sampled_product

HEADER = 144
# Byte offsets of 32-bit and 64-bit fields in the header.
FIELDS = {
    "version": 4, "dtype": 8, "unit_rows": 12, "rows": 16, "cols": 20, "gates": 24, "block_rows": 28, "block_cols": 32,
    "padding_row": 36, "padded_rows": 40,
}  # fmt: skip
LONG_FIELDS = {
    "strips": 64, "runs": 72, "tiles": 80, "strips_offset": 88, "index_offset": 96, "scales_offset": 104,
    "sums_offset": 112, "values_offset": 120, "bytes": 128,
}  # fmt: skip
CHECKSUM = 136
MASK = (1 << 64) - 1


def packed(dtype="float32", block_size=(4, 4)):
    w = pruned(np.random.default_rng(0), 40, 48, block_size, 3)
    return bytearray(BlockSparseMatrix.from_dense(w, block_size, 3, dtype).packed.tobytes())


def mix(value, data):
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start : start + 8], "little")
        value = ((value ^ word) * 0x9E3779B97F4A7C15) & MASK
        value ^= value >> 29
    return value


def signed(data):
    """The buffer with a checksum that fits: what someone who means harm would send."""
    data = bytearray(data)
    data[CHECKSUM : CHECKSUM + 8] = bytes(8)
    strips, runs, _, strips_at, index_at = struct.unpack_from("<5Q", data, LONG_FIELDS["strips"])
    value = mix(0x6B6273, data[:HEADER])
    value = mix(value, data[strips_at : strips_at + min(strips, 1 << 20) * 32])
    value = mix(value, data[index_at : index_at + min(runs, 1 << 20) * 4])
    struct.pack_into("<Q", data, CHECKSUM, value)
    return bytes(data)


def use(data):
    """Every function that reads a packed buffer."""
    matrix = BlockSparseMatrix(bytes(data))
    rows, cols = matrix.shape
    for batch in (1, 8):
        matrix.matmul(np.ones((batch, rows), np.float32))
        if matrix.dtype != "int8":
            matmul_transposed(matrix, np.ones((batch, cols), np.float32))
    matrix.to_dense()
    if matrix.dtype == "float32":
        sampled_product(matrix, np.ones((2, rows), np.float32), np.ones((2, cols), np.float32))
        assert matrix.positions.max(initial=-1) < rows * cols


def test_the_signature_of_the_tests_is_the_librarys():
    for dtype in ("float32", "bfloat16", "int8"):
        assert signed(packed(dtype)) == bytes(packed(dtype))
        use(packed(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_truncation_is_noticed(dtype):
    data = packed(dtype)
    for length in [*range(0, len(data), 61), len(data) - 1]:
        with pytest.raises(ValueError, match="packed"):
            BlockSparseMatrix(bytes(data[:length]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_structure_computes_with_the_values_it_is_given(dtype):
    whole = BlockSparseMatrix(packed(dtype))
    rows, cols = whole.shape
    start = whole._info.values_offset
    handle = ctypes.c_void_p()
    structure, flags = whole.packed[:start], _native.STRUCTURE | _native.COPY
    _native.call("kbs_matrix_create", structure.ctypes.data, start, flags, ctypes.byref(handle))
    x, y = np.ones((2, rows), np.float32), np.empty((2, cols), np.float32)
    floats = [a.ctypes.data_as(_native.FloatPointer) for a in (x, y)]

    def multiply(values):
        _native.call("kbs_matmul", handle, values, floats[0], rows, 2, None, 0, floats[1], cols)

    try:
        with pytest.raises(ValueError, match="structure without values"):
            multiply(None)
        multiply(whole.packed[start:].ctypes.data)
    finally:
        _native.library().kbs_matrix_destroy(handle)
    np.testing.assert_array_equal(y, whole.matmul(x))
    with pytest.raises(ValueError, match="truncated"):
        _native.call(
            "kbs_matrix_create",
            structure.ctypes.data,
            start - 1,
            _native.STRUCTURE | _native.COPY,
            ctypes.byref(handle),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_structure_depends_on_the_kept_blocks_only(dtype):
    whole = BlockSparseMatrix(packed(dtype))
    keep = BlockGrid(whole.shape, whole.block_size, whole.gates).nonzero_blocks(whole.to_dense())
    np.testing.assert_array_equal(whole.structure.keep, keep)
    other = BlockSparseMatrix.from_dense(
        np.full(whole.shape, 3), whole.block_size, gates=whole.gates, dtype=dtype, keep=keep
    )
    start = whole._info.values_offset
    assert bytes(other.packed[:start]) == bytes(whole.packed[:start])


def test_more_than_the_buffer_is_fine():
    use(packed() + bytes(100))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_changed_structure_is_noticed(dtype):
    data = packed(dtype)
    values_at = struct.unpack_from("<Q", data, LONG_FIELDS["values_offset"])[0]
    rng = np.random.default_rng(1)
    strips, runs, _, strips_at, index_at = struct.unpack_from("<5Q", data, LONG_FIELDS["strips"])
    parts = [(0, HEADER), (strips_at, strips_at + 32 * strips), (index_at, index_at + 4 * runs)]
    for position in rng.permutation(values_at)[:400]:
        covered = any(start <= position < end for start, end in parts)
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        if covered:
            with pytest.raises(ValueError, match="packed"):
                BlockSparseMatrix(bytes(changed))
        else:
            use(changed)


@pytest.mark.parametrize("name", [*FIELDS, *LONG_FIELDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_header_leads_astray(name, dtype):
    """Even with a checksum that fits, each number is checked against the others."""
    for value in [0, 1, 3, 1000, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) + 7, MASK]:
        data = packed(dtype)
        if name in FIELDS:
            struct.pack_into("<I", data, FIELDS[name], value & 0xFFFFFFFF)
        else:
            struct.pack_into("<Q", data, LONG_FIELDS[name], value)
        # Gates of whole blocks are as good as one gate.
        if data != packed(dtype) and name != "gates":
            with pytest.raises(ValueError, match="packed"):
                use(signed(data))


@settings(max_examples=300)
@given(data=st.data())
def test_signed_nonsense_never_reads_outside(data):
    """Random changes with a fitting checksum: refused, or harmless (sanitized builds would say)."""
    dtypes, sizes = st.sampled_from(["float32", "bfloat16", "int8"]), st.sampled_from([(4, 4), (5, 3), (16, 16)])
    buffer = packed(data.draw(dtypes), data.draw(sizes))
    values_at = struct.unpack_from("<Q", buffer, LONG_FIELDS["values_offset"])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, values_at // 4 - 1)) * 4
        word = data.draw(st.sampled_from([0, 1, 2, 40, 41, 60, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
        struct.pack_into("<I", buffer, position, word)
    with contextlib.suppress(ValueError):
        use(signed(buffer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_nothing_kept_is_a_matrix_too(dtype):
    matrix = BlockSparseMatrix.from_dense(np.zeros((40, 48)), (4, 4), 3, dtype)
    assert matrix.blocks == 0
    assert matrix.density == 0
    bias = np.arange(48, dtype=np.float32)
    for batch in (1, 8):
        np.testing.assert_array_equal(matrix.matmul(np.ones((batch, 40)), bias), np.tile(bias, (batch, 1)))
    use(matrix.packed.tobytes())
