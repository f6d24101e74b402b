"""kbs_matrix_from_columns: matrices given by the elements of their columns, as files for devices have them."""

import ctypes
from ctypes import POINTER, byref, c_int8, c_int32, c_int64, c_void_p

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import _native


class Columns:
    """A `kbs_columns` of a dense matrix, or of what a test puts into its fields, with the memory it points to."""

    def __init__(self, w, gates=1, scales=None):
        self.w, self.quantized = w, w.dtype == np.int8
        rows = [np.flatnonzero(column) for column in w.T]
        self.starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        self.row = np.concatenate([*rows, [0]])[: self.starts[-1] or 1].astype(np.int32)
        self.values = np.concatenate([w[r, c] for c, r in enumerate(rows)] + [np.zeros(1, w.dtype)])
        self.scales = scales
        self.shape, self.gates = w.shape, gates

    def struct(self, **changes):
        fields = {
            "rows": self.shape[0],
            "cols": self.shape[1],
            "gates": self.gates,
            "starts": self.starts.ctypes.data_as(POINTER(c_int64)),
            "row": self.row.ctypes.data_as(POINTER(c_int32)),
            "values": None if self.quantized else self.values.ctypes.data_as(_native.FloatPointer),
            "quantized": self.values.ctypes.data_as(POINTER(c_int8)) if self.quantized else None,
            "scales": None if self.scales is None else self.scales.ctypes.data_as(_native.FloatPointer),
        }
        return _native.Columns(**{**fields, **changes})


class Matrix:
    """A handle that goes when the test does."""

    def __init__(self, columns, dtype, block=(0, 0), **changes):
        self.handle, self.info = c_void_p(), _native.Info()
        call = columns.struct(**changes)
        _native.call("kbs_matrix_from_columns", byref(call), *block, _native.DTYPES[dtype], byref(self.handle))
        _native.call("kbs_matrix_info", self.handle, byref(self.info))

    def __del__(self):
        if self.handle:
            _native.library().kbs_matrix_destroy(self.handle)

    @property
    def block(self):
        return self.info.block_rows, self.info.block_cols

    def matmul(self, x):
        y = np.empty((len(x), self.info.cols), np.float32)
        x_pointer, y_pointer = (a.ctypes.data_as(_native.FloatPointer) for a in (x, y))
        _native.call("kbs_matmul", self.handle, None, x_pointer, x.shape[1], len(x), None, 0, y_pointer, y.shape[1])
        return y


def patterned(rng, rows, cols, gates, block, density=0.3, dtype=np.float32):
    grid = BlockGrid((rows, cols), block, gates)
    keep = grid.expand(rng.random(grid.grid_shape) < density)
    if dtype == np.int8:
        return (rng.integers(-127, 128, (rows, cols)) * keep).astype(np.int8)
    return (rng.standard_normal((rows, cols)) * keep).astype(dtype)


@st.composite
def matrices(draw):
    gates = draw(st.sampled_from([1, 3, 4]))
    rows, gate_cols = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    block = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([1, 2, 4, 8, 16]))
    block = min(block[0], rows), min(block[1], gate_cols)
    return rows, gates * gate_cols, gates, block, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0, 0.2, 1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=60)
@given(case=matrices(), chosen=st.booleans(), batch=st.sampled_from([1, 3, 9]))
def test_products_of_float_columns(dtype, case, chosen, batch):
    rows, cols, gates, block, seed, density = case
    rng = np.random.default_rng(seed)
    w = patterned(rng, rows, cols, gates, block, density)
    matrix = Matrix(Columns(w, gates), dtype, (0, 0) if chosen else block)
    x = rng.standard_normal((batch, rows)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    relative = 1e-5 if dtype == "float32" else 8e-3
    bound = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64)
    assert (np.abs(matrix.matmul(x) - exact) <= relative * bound + 1e-6).all()


@settings(max_examples=60)
@given(case=matrices(), chosen=st.booleans())
def test_quantized_columns_are_not_rounded_again(case, chosen):
    """A row of one 127 is its own quantization: the product is that row of the matrix to the last bit of float32."""
    rows, cols, gates, block, seed, density = case
    rng = np.random.default_rng(seed)
    q = patterned(rng, rows, cols, gates, block, density, np.int8)
    scales = rng.uniform(1e-3, 1, cols).astype(np.float32)
    matrix = Matrix(Columns(q, gates, scales), "int8", (0, 0) if chosen else block)
    x = np.zeros((rows, rows), np.float32)
    np.fill_diagonal(x, 127)
    want = 127.0 * q.astype(np.float64) * scales.astype(np.float64)
    np.testing.assert_allclose(matrix.matmul(x), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ((16, 16), (16, 16)),
        ((32, 32), (32, 16)),
        ((8, 8), (8, 8)),
        ((4, 4), (4, 4)),
        ((4, 8), (4, 8)),
        ((16, 4), (16, 4)),
    ],
)
def test_blocks_are_recognised(block, expected, dtype):
    """32x32 is packed as 32x16: no strip is wider than 16 columns."""
    rng = np.random.default_rng(0)
    kind = np.int8 if dtype == "int8" else np.float32
    w = patterned(rng, 256, 3 * 128, 3, block, 0.1, kind)
    w[rng.random(w.shape) < 0.02] = 0  # zeros that do not hide the blocks
    scales = np.ones(w.shape[1], np.float32) if kind is np.int8 else None
    assert Matrix(Columns(w, 3, scales), dtype).block == expected


def test_memory_goes_with_the_elements():
    """A matrix that would be 2**50 bytes if it were dense."""
    rows = 2**28
    w = np.zeros((4, 3), np.float32)
    w[1, 2] = 5
    columns = Columns(w)
    columns.row[0] = rows - 1
    matrix = Matrix(columns, "float32", rows=rows)
    assert matrix.info.bytes < 10_000
    assert matrix.info.blocks == 1


def test_no_elements_at_all():
    matrix = Matrix(Columns(np.zeros((20, 24), np.float32), 3), "float32")
    assert not matrix.matmul(np.ones((2, 20), np.float32)).any()


BAD = [
    ({"rows": 0}, "the matrix is empty"),
    ({"rows": 2**29}, "too large"),
    ({"cols": -1}, "the matrix is empty"),
    ({"gates": 5}, "5 gates do not divide 12 columns"),
    ({"gates": 0}, "gates do not divide"),
    ({"values": None}, "null pointer"),
    ({"starts": None}, "null pointer"),
    ({"row": None}, "null pointer"),
    ({"scales": (ctypes.c_float * 12)(*[1] * 12)}, "only quantized values have scales"),
    ({"quantized": (c_int8 * 200)(), "scales": (ctypes.c_float * 12)()}, "not both"),
    ({"rows": 3}, "of 3 rows"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_columns_of_no_sense(changes, message):
    w = patterned(np.random.default_rng(0), 8, 12, 3, (4, 4), 0.9)
    pointers = {"scales": _native.FloatPointer, "quantized": POINTER(c_int8)}
    changes = {k: ctypes.cast(v, pointers[k]) if k in pointers else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        Matrix(Columns(w, 3), "float32", **changes)


@pytest.mark.parametrize(
    ("at", "value", "message"), [(0, 1, "begin at element 1"), (3, -5, "column 2 has elements"), (3, 10**9, "column 2")]
)
def test_starts_of_no_sense(at, value, message):
    columns = Columns(patterned(np.random.default_rng(0), 8, 12, 3, (4, 4), 0.9), 3)
    columns.starts[at] = value
    with pytest.raises(ValueError, match=message):
        Matrix(columns, "float32")


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf])
def test_scales_of_no_sense(scale):
    scales = np.ones(4, np.float32)
    scales[2] = scale
    with pytest.raises(ValueError, match="column 2 has a scale of"):
        Matrix(Columns(np.ones((4, 4), np.int8), 1, scales), "int8")
    with pytest.raises(ValueError, match="packed as int8"):
        Matrix(Columns(np.ones((4, 4), np.int8), 1, np.ones(4, np.float32)), "float32")


def test_rows_that_do_not_rise():
    columns = Columns(np.ones((4, 4), np.float32))
    columns.row[1] = 0
    with pytest.raises(ValueError, match="column 0 has row 0 after row 0"):
        Matrix(columns, "float32")


def test_limit_of_threads_is_the_calling_threads_own():
    import threading

    library, seen = _native.library(), []
    before = library.kbs_limit_threads(1)
    try:
        assert before == 0
        assert _native.get_num_threads() == 1
        thread = threading.Thread(target=lambda: seen.append((library.kbs_limit_threads(0), _native.get_num_threads())))
        thread.start()
        thread.join()
        assert library.kbs_limit_threads(0) == 1
        assert seen == [(0, _native.get_num_threads())]
    finally:
        library.kbs_limit_threads(before)
