"""Every kernel on every instruction set against one float64 reference."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_blocksparse.sparse import BlockSparseMatrix, _native
from tests.native.reference import activate, guarded, matmul, matmul_transposed, pruned, quantized, sampled_product

BLOCK_SIZES = [
    (1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 3), (4, 4), (8, 4), (4, 8), (7, 7), (12, 2), (1, 16), (16, 1), (8, 8),
    (16, 16), (16, 32), (32, 16), (32, 32), (17, 33), (64, 64),
]  # fmt: skip
BATCHES = [1, 2, 3, 4, 5, 8, 13, 17, 31, 65]


def check(got, expected, terms=100):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6 * math.sqrt(terms))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_matmul(isa, dtype, block_size):
    rng = np.random.default_rng(0)
    matrix = BlockSparseMatrix.from_dense(pruned(rng, 139, 3 * 77, block_size, 3), block_size, 3, dtype)
    dense = matrix.to_dense().astype(np.float64)
    bias = rng.standard_normal(231).astype(np.float32)
    for batch in BATCHES:
        x = rng.standard_normal((batch, 139)).astype(np.float32)
        expected = (quantized(x) if dtype == "int8" else x.astype(np.float64)) @ dense
        check(matrix.matmul(x), expected)
        check(matrix.matmul(x, bias), expected + bias)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(isa, data):
    """Product, transposed product and gradient for shapes that nobody thought of."""
    block_size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)), "block size")
    gates = data.draw(st.integers(1, 4), "gates")
    rows = data.draw(st.integers(block_size[0], 90), "rows")
    cols = gates * data.draw(st.integers(block_size[1], 60), "cols of a gate")
    batch = data.draw(st.integers(1, 40), "batch")
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int8"]), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    w = pruned(rng, rows, cols, block_size, gates, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "density"))
    matrix = BlockSparseMatrix.from_dense(w, block_size, gates, dtype)
    dense = matrix.to_dense().astype(np.float64)
    x = rng.standard_normal((batch, rows)).astype(np.float32)
    dy = rng.standard_normal((batch, cols)).astype(np.float32)
    check(matrix.matmul(x), (quantized(x) if dtype == "int8" else x.astype(np.float64)) @ dense)
    if dtype != "int8":
        check(matmul_transposed(matrix, dy), dy.astype(np.float64) @ dense.T)
    if dtype == "float32":
        np.testing.assert_array_equal(matrix.to_dense(), w)
        positions = matrix.positions
        expected = np.where(positions < 0, 0, (x.astype(np.float64).T @ dy).reshape(-1)[positions])
        check(sampled_product(matrix, x, dy), expected)


@pytest.mark.parametrize("block_size", [(1, 1), (4, 4), (3, 5), (12, 2), (16, 16), (32, 32)])
@pytest.mark.parametrize("batch", [1, 4, 8, 33, 130])
def test_gradients(isa, block_size, batch):
    rng = np.random.default_rng(1)
    w = pruned(rng, 70, 90, block_size)
    matrix = BlockSparseMatrix.from_dense(w, block_size)
    x, dy = (rng.standard_normal((batch, n)).astype(np.float32) for n in (70, 90))
    check(matmul_transposed(matrix, dy), dy.astype(np.float64) @ w.T)
    positions = matrix.positions
    expected = np.where(positions < 0, 0, (x.astype(np.float64).T @ dy).reshape(-1)[positions])
    got = sampled_product(matrix, x, dy)
    check(got, expected, batch)
    assert not got[positions < 0].any(), "padding must have no gradient"
    check(sampled_product(matrix, x, dy, out=got), 2 * expected, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_accumulating_into_rows_that_lie_apart(isa, dtype, batch):
    rng = np.random.default_rng(2)
    matrix = BlockSparseMatrix.from_dense(pruned(rng, 50, 44, (4, 4)), (4, 4), dtype=dtype)
    x = rng.standard_normal((batch, 61)).astype(np.float32)
    y = rng.standard_normal((batch, 53)).astype(np.float32)
    before = y.copy()
    bias = rng.standard_normal(44).astype(np.float32)
    matmul(matrix, x[:, :50], y[:, :44], bias, accumulate=True)
    inputs = quantized(x[:, :50]) if dtype == "int8" else x[:, :50].astype(np.float64)
    check(y[:, :44], before[:, :44] + inputs @ matrix.to_dense() + bias)
    np.testing.assert_array_equal(y[:, 44:], before[:, 44:])


def test_other_values_stand_in_for_the_packed_ones(isa):
    rng = np.random.default_rng(3)
    matrix = BlockSparseMatrix.from_dense(pruned(rng, 40, 44, (4, 4)), (4, 4))
    x, dy = (rng.standard_normal((6, n)).astype(np.float32) for n in (40, 44))
    values = matrix.values * 3
    y = matmul(matrix, x, np.empty((6, 44), np.float32), values=values)
    np.testing.assert_allclose(y, 3 * matrix.matmul(x), rtol=1e-4, atol=1e-4)
    got = matmul_transposed(matrix, dy, values)
    np.testing.assert_allclose(got, 3 * matmul_transposed(matrix, dy), rtol=1e-4, atol=1e-4)


def test_int8_sums_do_not_saturate(isa):
    """Full-scale weights and inputs: 16-bit sums of pairs, which some instructions make, would clip."""
    rows = 4096
    w = np.full((rows, 32), -1, np.float32)
    w[:, ::2] = 1
    matrix = BlockSparseMatrix.from_dense(w, (16, 16), dtype="int8")
    y = matrix.matmul(np.stack([np.full(rows, 5.0), np.full(rows, -5.0)]))
    expected = 5.0 * rows * np.stack([w[0], -w[0]])
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_int8_gives_the_same_on_every_instruction_set(libraries, monkeypatch):
    rng = np.random.default_rng(4)
    w, x = pruned(rng, 100, 90, (4, 8)), rng.standard_normal((5, 100)).astype(np.float32)
    results = []
    for library in libraries.values():
        monkeypatch.setattr(_native, "library", lambda library=library: library)
        results.append(BlockSparseMatrix.from_dense(w, (4, 8), dtype="int8").matmul(x))
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 8])
def test_nan_reaches_its_outputs_and_no_other_row(isa, dtype, batch):
    w = np.ones((32, 32), np.float32)
    matrix = BlockSparseMatrix.from_dense(w, (4, 4), dtype=dtype)
    x = np.ones((batch, 32), np.float32)
    x[0, 5] = np.nan
    y = matrix.matmul(x)
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1:], 32, rtol=1e-5)


# ---- activations ----------------------------------------------------------------------------------------------------


def every_kind_of_float():
    """All exponents with a few thousand mantissas each, both signs, the special values, and the interesting range."""
    rng = np.random.default_rng(5)
    bits = (np.arange(256, dtype=np.uint32)[:, None] << 23) + rng.integers(0, 1 << 23, (256, 300), dtype=np.uint32)
    x = np.concatenate([bits.reshape(-1).view(np.float32), np.linspace(-110, 110, 40_001, dtype=np.float32)])
    edges = np.array([0, 1e-45, 1e-38, 0.625, np.nextafter(np.float32(0.625), 0, dtype=np.float32), np.inf], np.float32)
    x = np.concatenate([x[~np.isnan(x)], edges])
    return np.concatenate([x, -x])


def ulps(got, exact):
    """Distance from the exact value in units of the last place of a float32 there."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
    return np.abs(got.astype(np.longdouble) - exact) / np.maximum(spacing, np.longdouble(1.4e-45))


@pytest.mark.parametrize(("name", "bound"), [("tanh", 2), ("sigmoid", 2.5)])
def test_tanh_and_sigmoid_are_as_exact_as_told(isa, name, bound):
    x = every_kind_of_float()
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    got = activate(name, x)
    worst = ulps(got, exact)
    assert worst.max() <= bound, (x[worst.argmax()], got[worst.argmax()], exact[worst.argmax()])


def test_special_values(isa):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    np.testing.assert_array_equal(activate("tanh", x), np.array([np.nan, 1, -1, 0, -0.0], np.float32))
    assert np.signbit(activate("tanh", x)[4])
    np.testing.assert_array_equal(activate("sigmoid", x), np.array([np.nan, 1, 0, 0.5, 0.5], np.float32))
    np.testing.assert_array_equal(activate("relu", x), np.array([np.nan, np.inf, 0, 0, 0], np.float32))
    np.testing.assert_array_equal(activate("clipped_relu", x, 6), np.array([np.nan, 6, 0, 0, 0], np.float32))
    np.testing.assert_array_equal(activate("hard_sigmoid", x), np.array([np.nan, 1, 0, 0.5, 0.5], np.float32))


@pytest.mark.parametrize("n", range(35))
def test_activations_of_any_length(isa, n):
    x = np.random.default_rng(6).standard_normal(n).astype(np.float32) * 4
    np.testing.assert_allclose(activate("tanh", x), np.tanh(x), rtol=1e-6)
    np.testing.assert_array_equal(activate("linear", x), x)
    np.testing.assert_array_equal(activate("clipped_relu", x, 1.5), x.clip(0, 1.5))
    np.testing.assert_allclose(activate("hard_sigmoid", x), np.clip(x / 6 + 0.5, 0, 1), atol=1e-6)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 17"):
        _native.call("kbs_activate", 17, 0.0, None, 0, None)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 31])
def test_products_read_nothing_behind_the_end(isa, width):
    rng = np.random.default_rng(1)
    for height in (1, 3, 16):
        matrix = BlockSparseMatrix.from_dense(pruned(rng, 37, 62, (height, width), 1, 0.7), (height, width))
        for batch in (1, 3, 8, 33):
            x, dy = (
                guarded(rng.standard_normal((batch, 37), np.float32)),
                guarded(rng.standard_normal((batch, 62), np.float32)),
            )
            matmul(matrix, x, guarded(np.zeros_like(dy)), guarded(rng.standard_normal(62, np.float32)))
            dense = matrix.to_dense()
            np.testing.assert_allclose(matmul_transposed(matrix, dy), dy @ dense.T, atol=1e-4)
            got = sampled_product(matrix, x, dy, guarded(np.zeros_like(matrix.values)))
            expected = (x.T @ dy).reshape(-1)[matrix.positions]
            np.testing.assert_allclose(got, np.where(matrix.positions < 0, 0, expected), atol=1e-4)
