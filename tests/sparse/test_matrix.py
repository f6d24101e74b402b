"""BlockSparseMatrix, and how the native library is found."""

import ctypes.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse
from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, BlockStructure, _native, available_isas, get_isa


def pruned(shape, block_size, gates=1, sparsity=0.9, seed=0):
    rng = np.random.default_rng(seed)
    grid = BlockGrid(shape, block_size, gates)
    order = rng.permutation(int(np.prod(grid.grid_shape))).reshape(grid.grid_shape)
    return (rng.standard_normal(shape) * grid.expand(order >= sparsity * order.size)).astype(np.float32)


@settings(max_examples=100)
@given(
    block_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    more=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    gates=st.integers(1, 4),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_packing_loses_nothing(block_size, more, gates, sparsity):
    shape = block_size[0] + more[0], gates * (block_size[1] + more[1])
    w = pruned(shape, block_size, gates, sparsity)
    matrix = BlockSparseMatrix.from_dense(w, block_size, gates)
    np.testing.assert_array_equal(matrix.to_dense(), w)
    assert matrix.shape == shape
    assert matrix.block_size == block_size
    assert matrix.gates == gates
    grid = BlockGrid(shape, block_size, gates)
    kept = grid.nonzero_blocks(w)
    assert matrix.blocks == kept.sum()
    assert matrix.density == pytest.approx((kept * grid.elements).sum() / w.size)
    positions = matrix.positions
    np.testing.assert_array_equal(matrix.values[positions >= 0], w.reshape(-1)[positions[positions >= 0]])
    assert not matrix.values[positions < 0].any()
    assert len(set(positions[positions >= 0])) == (kept * grid.elements).sum()
    again = BlockSparseMatrix(matrix.packed.tobytes())
    np.testing.assert_array_equal(again.to_dense(), w)


@pytest.mark.parametrize("block_size", [(16, 16), (4, 4), (32, 32), (8, 4)])
def test_ninety_percent_zero_is_about_ten_times_smaller(block_size):
    w = pruned((512, 1536), block_size, 3)
    for dtype, factor in (("float32", 10), ("bfloat16", 20), ("int8", 40)):
        matrix = BlockSparseMatrix.from_dense(w, block_size, 3, dtype)
        # The index weighs more, the smaller values and blocks are.
        assert matrix.nbytes <= 1.75 * w.nbytes / factor, dtype
        assert dtype != "float32" or matrix.nbytes <= 1.2 * w.nbytes / factor


def test_blocks_can_be_kept_that_are_zero():
    keep = np.zeros((1, 4, 4), bool)
    keep[0, 1, 2] = True
    matrix = BlockSparseMatrix.from_dense(np.zeros((16, 16)), (4, 4), keep=keep)
    assert matrix.blocks == 1
    assert set(matrix.positions) == {r * 16 + c for r in range(4, 8) for c in range(8, 12)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transposed_matrix_is_a_view(dtype):
    matrix = BlockSparseMatrix.from_dense(pruned((40, 72), (8, 5), 3), (8, 5), 3, dtype)
    turned = matrix.T
    assert turned.shape == (72, 40)
    assert turned.block_size == (5, 8)
    assert (turned.density, turned.nbytes) == (matrix.density, matrix.nbytes)
    np.testing.assert_array_equal(turned.to_dense(), matrix.to_dense().T)
    np.testing.assert_array_equal(turned.T.to_dense(), matrix.to_dense())
    x, bias = np.random.default_rng(0).standard_normal((3, 72), np.float32), np.arange(40, dtype=np.float32)
    np.testing.assert_allclose(turned.matmul(x, bias), x @ matrix.to_dense().T + bias, rtol=1e-5, atol=1e-5)
    for what in ("packed", "structure", "positions"):
        with pytest.raises(ValueError, match=f"transposed matrix has no `{what}`"):
            getattr(turned, what)


def test_int8_has_no_transpose():
    with pytest.raises(ValueError, match="no transposed product"):
        _ = BlockSparseMatrix.from_dense(np.ones((8, 8)), (4, 4), dtype="int8").T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_values_and_structure_make_the_matrix(dtype):
    matrix = BlockSparseMatrix.from_dense(pruned((40, 72), (8, 5), 3), (8, 5), 3, dtype)
    structure = BlockStructure.from_config(json.loads(json.dumps(matrix.structure.get_config())))
    assert structure.density == matrix.density
    assert bytes(structure.packed) == bytes(matrix.structure.packed)
    assert (structure.values_shape, structure.values_dtype) == (matrix.values.shape, matrix.values.dtype.name)
    again = BlockSparseMatrix.from_values(structure, matrix.values)
    assert again.packed.tobytes() == matrix.packed.tobytes()
    with pytest.raises(ValueError, match="`values` must have shape"):
        BlockSparseMatrix.from_values(structure, matrix.values[:-1])


@pytest.mark.parametrize(
    "change", [{"keep": ""}, {"keep": "????"}, {"keep": None}, {"gates": 0}, {"shape": [8]}, {"block_size": [9, 9]}]
)
def test_a_damaged_config_is_a_value_error(change):
    config = BlockSparseMatrix.from_dense(np.ones((8, 8)), (4, 4)).structure.get_config()
    with pytest.raises(ValueError, match="Not the config of a block structure"):
        BlockStructure.from_config({**config, **change})


def test_short_dtypes_round_as_they_should():
    w = pruned((64, 64), (8, 8), sparsity=0.5)
    half = BlockSparseMatrix.from_dense(w, (8, 8), dtype="bfloat16").to_dense()
    np.testing.assert_allclose(half, w, rtol=2**-8)
    assert (half.view(np.uint32) & 0xFFFF == 0).all()
    byte = BlockSparseMatrix.from_dense(w, (8, 8), dtype="int8").to_dense()
    step = np.abs(w).max(0) / 127
    assert (np.abs(byte - w) <= step / 2 * 1.001).all()


def test_matmul_takes_any_leading_axes_and_a_bias():
    w = pruned((32, 48), (4, 4), sparsity=0.5)
    matrix = BlockSparseMatrix.from_dense(w, (4, 4))
    x = np.random.default_rng(1).standard_normal((2, 3, 32))
    np.testing.assert_allclose(matrix.matmul(x, np.ones(48)), x @ w + 1, atol=1e-4)
    np.testing.assert_allclose(matrix.matmul(x[0, 0]), x[0, 0] @ w, atol=1e-4)
    assert matrix.matmul(np.zeros((0, 32))).shape == (0, 48)


def test_nan_and_infinity_are_kept():
    w = np.zeros((8, 8), np.float32)
    w[0, 0], w[5, 5] = np.nan, np.inf
    for dtype in ("float32", "bfloat16"):
        np.testing.assert_array_equal(BlockSparseMatrix.from_dense(w, (4, 4), dtype=dtype).to_dense(), w)
    with pytest.raises(ValueError, match="finite"):
        BlockSparseMatrix.from_dense(w, (4, 4), dtype="int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": np.ones((8, 8)), "block_size": (9, 4)}, "larger than"),
        ({"w": np.ones((8, 9)), "block_size": (4, 4), "gates": 2}, "do not divide"),
        ({"w": np.ones((0, 8)), "block_size": (4, 4)}, "empty"),
        ({"w": np.ones(8), "block_size": (4, 4)}, "must be a matrix"),
        ({"w": np.ones((8, 8)), "block_size": (4, 4), "dtype": "float16"}, "must be one of"),
        ({"w": np.ones((8, 8)), "block_size": (4, 4), "keep": np.ones((2, 2))}, "grid's shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseMatrix.from_dense(**arguments)


def test_what_cannot_be_multiplied_is_refused():
    matrix = BlockSparseMatrix.from_dense(np.ones((8, 8)), (4, 4))
    with pytest.raises(ValueError, match="must end with the matrix's 8 rows"):
        matrix.matmul(np.ones((2, 7)))
    with pytest.raises(ValueError, match="`bias` must have shape"):
        matrix.matmul(np.ones((2, 8)), np.ones(7))
    with pytest.raises(RuntimeError, match="float32"):
        _ = BlockSparseMatrix.from_dense(np.ones((8, 8)), (4, 4), dtype="int8").positions


def test_bytes_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match="packed"):
        BlockSparseMatrix(b"")
    with pytest.raises(ValueError, match="format's mark"):
        BlockSparseMatrix(bytes(1000))


def test_a_matrix_tells_what_it_is():
    matrix = BlockSparseMatrix.from_dense(pruned((64, 64), (16, 16), sparsity=0.5), (16, 16))
    assert repr(matrix) == "<BlockSparseMatrix 64 x 64, blocks 16x16, 50.0% dense, float32>"


# ---- the library --------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_in_use():
    assert get_isa() == (os.environ.get("KBS_ISA") or available_isas()[-1])


def test_a_missing_library_is_an_import_error(monkeypatch, tmp_path):
    monkeypatch.delenv("KBS_LIBRARY", raising=False)
    monkeypatch.setattr(keras_blocksparse, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match="not built for this machine"):
        _native.library_path()


def test_a_foreign_library_is_an_import_error(tmp_path):
    with pytest.raises(ImportError, match="cannot be loaded"):
        _native.open_library(tmp_path / "nothing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be loaded"):
        _native.open_library(broken)
    other = ctypes.util.find_library("m")
    with pytest.raises(ImportError, match="is not keras_blocksparse's"):
        _native.open_library(other)


def test_another_version_is_a_runtime_error(monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", 999)
    with pytest.raises(RuntimeError, match="speaks version \\d+ .* speaks 999"):
        _native.open_library(_native.library_path())


@pytest.mark.parametrize(
    ("isa", "message"), [("neon", "unknown|does not have it"), ("quantum", "is unknown; this CPU has baseline")]
)
def test_an_instruction_set_that_the_cpu_lacks_is_an_error(isa, message):
    if isa in available_isas():
        pytest.skip("this CPU has it")
    code = (
        "import numpy as np; from keras_blocksparse.sparse import BlockSparseMatrix\n"
        "m = BlockSparseMatrix.from_dense(np.ones((4, 4)), (2, 2))\n"
        "try: m.matmul(np.ones((1, 4)))\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KBS_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert re.search(message, done.stdout), done.stdout + done.stderr
