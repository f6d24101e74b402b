"""What the kernels should compute, in float64 and plain numpy; and the library's calls without a wrapper."""

import ctypes
import mmap

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


def nans(*shape):
    return np.full(shape, np.nan, np.float32)


class RNN:
    """A layer's handle. With `per_call` it has structures only, and each call brings the values and the bias."""

    def __init__(self, cell, kernel, recurrent, bias=None, reset_after=True, activation="tanh",
                 recurrent_activation="sigmoid", limits=(0.0, 0.0), block_size=(4, 4), dtype="float32",
                 per_call=False):  # fmt: skip
        gates = {"simple_rnn": 1, "gru": 3, "lstm": 4}[cell]
        self.library = _native.library()
        self.handle, self.structures = ctypes.c_void_p(), []
        self.kernel = BlockSparseMatrix.from_dense(kernel, block_size, gates, dtype)
        self.recurrent = BlockSparseMatrix.from_dense(recurrent, block_size, gates, dtype)
        self.bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        self.cell, self.units, self.per_call = cell, len(recurrent), per_call
        matrices = [self._structure(m) if per_call else m._handle for m in (self.kernel, self.recurrent)]
        config = _native.RNNConfig(
            _native.CELLS[cell], _native.ACTIVATIONS[activation], _native.ACTIVATIONS[recurrent_activation],
            int(reset_after), *limits, *matrices, None if per_call else floats(self.bias),
        )  # fmt: skip
        _native.call("kbs_rnn_create", ctypes.byref(config), ctypes.byref(self.handle))

    def _structure(self, matrix):
        handle, packed = ctypes.c_void_p(), matrix.structure.packed
        flags = _native.STRUCTURE | _native.COPY
        _native.call("kbs_matrix_create", packed, len(packed), flags, ctypes.byref(handle))
        self.structures.append(handle)
        return handle

    def __del__(self):
        self.library.kbs_rnn_destroy(self.handle)
        for handle in self.structures:
            self.library.kbs_matrix_destroy(handle)

    def call(self, x, mask=None, initial_state=(), go_backwards=False, return_sequences=True,
             zero_output_for_mask=False, reserve=None):  # fmt: skip
        """What the library is told, without outputs."""
        batch, steps, _ = x.shape
        states = [np.ascontiguousarray(state, np.float32) for state in initial_state] + [None, None]
        mask = None if mask is None else np.ascontiguousarray(mask, np.uint8)
        weights = [m.values.ctypes.data if self.per_call else None for m in (self.kernel, self.recurrent)]
        return _native.RNNCall(
            batch, steps, floats(np.ascontiguousarray(x, np.float32)),
            None if mask is None else mask.ctypes.data_as(_native.BytePointer), floats(states[0]), floats(states[1]),
            go_backwards, return_sequences, zero_output_for_mask, 0, *weights,
            floats(self.bias) if self.per_call else None, None, None, None,
            None if reserve is None else reserve.ctypes.data,
        )  # fmt: skip

    def __call__(self, x, *arguments, **options):
        """Outputs and final states."""
        call = self.call(x, *arguments, **options)
        batch, steps, _ = x.shape
        y = nans(batch, steps, self.units) if call.return_sequences else nans(batch, self.units)
        states = [nans(batch, self.units) for _ in range(1 + (self.cell == "lstm"))]
        call.y = floats(y)
        call.final_h, call.final_c = (floats(state) for state in [*states, None][:2])
        _native.call("kbs_rnn_run", self.handle, ctypes.byref(call))
        return [y, *states]

    def reserve(self, batch, steps):
        """Memory for a call with gradients."""
        size = ctypes.c_int64()
        _native.call("kbs_rnn_reserve_bytes", self.handle, batch, steps, ctypes.byref(size))
        return nans(size.value // 4)

    def backward(self, x, *arguments, dy=None, dfinal=(), skip=(), **options):
        """Gradients by name, but those in `skip`."""
        call = self.call(x, *arguments, **options)
        batch = len(x)
        shapes = {"x": x.shape, "initial_h": (batch, self.units), "initial_c": (batch, self.units),
                  "kernel": self.kernel.values.shape, "recurrent": self.recurrent.values.shape,
                  "bias": None if self.bias is None else self.bias.shape}  # fmt: skip
        left_out = {*skip, *(["initial_c"] if self.cell != "lstm" else []), *(["bias"] if self.bias is None else [])}
        results = {name: None if name in left_out else nans(*shape) for name, shape in shapes.items()}
        given = [None if d is None else np.ascontiguousarray(d, np.float32) for d in [dy, *dfinal, None, None][:3]]
        gradients = _native.RNNGradients(*map(floats, given), *map(floats, results.values()))
        _native.call("kbs_rnn_backward", self.handle, ctypes.byref(call), ctypes.byref(gradients))
        return {name: result for name, result in results.items() if result is not None}


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


def guarded(array):
    """A copy that ends where memory does: to read behind it is a segmentation fault."""
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, pages - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy
