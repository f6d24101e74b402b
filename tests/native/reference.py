"""What the kernels should compute, in float64 and plain numpy; and the library's calls without a wrapper."""

import ctypes

import numpy as np

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, _native


def pruned(rng, rows, cols, block_size, gates=1, density=0.3):
    """A matrix of which whole blocks are zero."""
    grid = BlockGrid((rows, cols), block_size, gates)
    return (rng.standard_normal((rows, cols)) * grid.expand(rng.random(grid.grid_shape) < density)).astype(np.float32)


def floats(array):
    return None if array is None else array.ctypes.data_as(_native.FloatPointer)


def quantized(x):
    """Rows of x as an int8 matrix sees them."""
    step = np.abs(x).max(1, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(step == 0, 1, step)).astype(np.float64) * step


def matmul(matrix, x, y, bias=None, accumulate=False, values=None):
    """kbs_matmul on rows of x and y, which may lie apart."""
    _native.call(
        "kbs_matmul", matrix._handle, None if values is None else values.ctypes.data, floats(x), x.strides[0] // 4,
        len(x), floats(bias), int(accumulate), floats(y), y.strides[0] // 4,
    )  # fmt: skip
    return y


def matmul_transposed(matrix, dy, values=None):
    dx = np.full((len(dy), matrix.shape[0]), np.nan, np.float32)
    _native.call(
        "kbs_matmul_transposed", matrix._handle, None if values is None else values.ctypes.data, floats(dy),
        dy.shape[1], len(dy), floats(dx), dx.shape[1],
    )  # fmt: skip
    return dx


def sampled_product(matrix, x, dy, out=None):
    accumulate = out is not None
    out = np.full(matrix.values.shape, np.nan, np.float32) if out is None else out
    _native.call(
        "kbs_sampled_product", matrix._handle, floats(x), x.shape[1], floats(dy), dy.shape[1], len(x),
        int(accumulate), floats(out),
    )  # fmt: skip
    return out


def activate(name, x, limit=0.0):
    y = np.empty_like(x)
    _native.call("kbs_activate", _native.ACTIVATIONS[name], limit, floats(x), x.size, floats(y))
    return y


class RNN:
    """A layer's handle."""

    def __init__(self, cell, kernel, recurrent, bias=None, reset_after=True, activation="tanh",
                 recurrent_activation="sigmoid", limits=(0.0, 0.0), block_size=(4, 4), dtype="float32"):  # fmt: skip
        gates = {"simple_rnn": 1, "gru": 3, "lstm": 4}[cell]
        self.kernel = BlockSparseMatrix.from_dense(kernel, block_size, gates, dtype)
        self.recurrent = BlockSparseMatrix.from_dense(recurrent, block_size, gates, dtype)
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        config = _native.RNNConfig(
            _native.CELLS[cell], _native.ACTIVATIONS[activation], _native.ACTIVATIONS[recurrent_activation],
            int(reset_after), *limits, self.kernel._handle, self.recurrent._handle, floats(bias),
        )  # fmt: skip
        self.cell, self.units, self.handle = cell, len(recurrent), ctypes.c_void_p()
        self.library = _native.library()
        _native.call("kbs_rnn_create", ctypes.byref(config), ctypes.byref(self.handle))

    def __del__(self):
        if self.handle:
            self.library.kbs_rnn_destroy(self.handle)

    def __call__(self, x, mask=None, initial_state=(), go_backwards=False, return_sequences=True,
                 zero_output_for_mask=False):  # fmt: skip
        """Outputs and final states."""
        batch, steps, _ = x.shape
        x = np.ascontiguousarray(x, np.float32)
        states = [np.ascontiguousarray(state, np.float32) for state in initial_state] + [None, None]
        mask = None if mask is None else np.ascontiguousarray(mask, np.uint8)
        y = np.full((batch, steps, self.units) if return_sequences else (batch, self.units), np.nan, np.float32)
        final_h = np.full((batch, self.units), np.nan, np.float32)
        final_c = np.full((batch, self.units), np.nan, np.float32) if self.cell == "lstm" else None
        call = _native.RNNCall(
            batch, steps, floats(x), None if mask is None else mask.ctypes.data_as(_native.BytePointer),
            floats(states[0]), floats(states[1]), go_backwards, return_sequences, zero_output_for_mask, 0, None, None,
            None, floats(y), floats(final_h), floats(final_c),
        )  # fmt: skip
        _native.call("kbs_rnn_run", self.handle, ctypes.byref(call))
        return [y, final_h] + ([final_c] if final_c is not None else [])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rnn_loop(cell, x, kernel, recurrent, bias, reset_after=True, state=None, carry=None):
    """A whole sequence with Keras's default activations, float64."""
    x, kernel, recurrent, bias = (np.asarray(a, np.float64) for a in (x, kernel, recurrent, bias))
    units = len(recurrent)
    h = np.zeros((len(x), units)) if state is None else np.asarray(state, np.float64)
    c = np.zeros((len(x), units)) if carry is None else np.asarray(carry, np.float64)
    outputs = []
    for t in range(x.shape[1]):
        if cell == "simple_rnn":
            h = np.tanh(x[:, t] @ kernel + bias + h @ recurrent)
        elif cell == "lstm":
            i, f, g, o = np.split(x[:, t] @ kernel + bias + h @ recurrent, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            xz, xr, xh = np.split(x[:, t] @ kernel + (bias[0] if reset_after else bias), 3, axis=1)
            uz, ur, uh = np.split(recurrent, 3, axis=1)
            bz, br, bh = np.split(bias[1], 3) if reset_after else (0, 0, 0)
            z, r = sigmoid(xz + h @ uz + bz), sigmoid(xr + h @ ur + br)
            candidate = np.tanh(xh + (r * (h @ uh + bh) if reset_after else (r * h) @ uh))
            h = z * h + (1 - z) * candidate
        outputs.append(h)
    return np.stack(outputs, 1), h, c
