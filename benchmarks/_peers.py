"""Other libraries' ways to the same product and the same layer, each on one thread with float32 numbers.

A peer is prepared once with its weights in the form that suits it best, and gives back a call that computes. None is
timed before its result was seen to be ours. One whose package is not installed is left out, and said to be.

The dense ones get the same pruned matrix, zeros and all. Kinds: "dense", "sparse" (single weights), "block-sparse".
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

# Libraries read these as they load: this module is imported before any of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np

BlockSize = tuple[int, int]
Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library, and how it is made to do what we do."""

    name: str
    package: str
    kind: str
    prepare: Callable[..., Work]


#: `prepare(w, x, block_size)`: w (rows, cols), x (batch, rows); y as (batch, cols) or as its transpose.
MATMUL: list[Peer] = []
#: `prepare(layer, x)`: an `RNNWeights`, x (batch, steps, inputs); all outputs, batch or steps first.
RNN: list[Peer] = []


def peer(peers: list[Peer], name: str, package: str, kind: str = "dense") -> Callable[[Any], Any]:
    """Registers a `prepare`."""

    def register(prepare: Callable[..., Work]) -> Callable[..., Work]:
        peers.append(Peer(name, package, kind, prepare))
        return prepare

    return register


def installed(peers: Iterable[Peer]) -> list[Peer]:
    """Those whose packages are here; prints which are not."""
    here = []
    for one in peers:
        if importlib.util.find_spec(one.package):
            here.append(one)
        else:
            print(
                f"left out: {one.name}, since {one.package} is not installed (pip install 'keras_blocksparse[bench]')"
            )
    return here


def versions(peers: Iterable[Peer]) -> list[str]:
    """Packages to name beside the figures."""
    return sorted({"numpy", "tensorflow", "keras"} | {one.package for one in peers if one.package != "ours"})


def check(name: str, got: object, expected: np.ndarray, tolerance: float = 1e-3) -> None:
    """Refuses a peer that computes something else.

    Raises:
        ValueError: it does.
    """
    y = np.asarray(got)
    if y.shape != expected.shape and y.ndim == expected.ndim:
        y = y.swapaxes(0, 1)
    error = np.abs(y - expected).max() / np.abs(expected).max() if y.shape == expected.shape else np.inf
    if not error <= tolerance:
        raise ValueError(
            f"{name} computes something else: shape {y.shape}, largest error {error:.1e} of the largest value"
        )


def left_out(name: str, error: Exception) -> None:
    """Says that something is not measured, and why, in one line."""
    print(f"left out: {name}: {' '.join(str(error).split())[:300]}")


def tensorflow() -> Any:
    """TensorFlow on one thread."""
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != 1:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def compiled(function: Callable[[Any], Any], x: np.ndarray, jit_compile: bool = False) -> Work:
    """A tf.function by the call that costs least: the function for this shape, which Python need not look up."""
    tf = tensorflow()
    tensor = tf.constant(x)
    call = tf.function(function, jit_compile=jit_compile).get_concrete_function(tf.TensorSpec(x.shape))
    return lambda: call(tensor)


def torch() -> Any:
    """Torch on one thread, without gradients, for the whole process."""
    import warnings

    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", message="Sparse (BSR|CSR) tensor support is in beta")
    return torch


# ---- products -------------------------------------------------------------------------------------------------------


@peer(MATMUL, "scipy BSR", "scipy", "block-sparse")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    from scipy import sparse

    matrix, xt = sparse.bsr_array(w.T, blocksize=block_size[::-1]), np.ascontiguousarray(x.T)
    matrix.eliminate_zeros()
    return lambda: matrix @ xt


@peer(MATMUL, "torch BSR", "torch", "block-sparse")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    t = torch()
    matrix, xt = t.from_numpy(w).t().to_sparse_bsr(block_size[::-1]), t.from_numpy(x).t().contiguous()
    return lambda: matrix @ xt


@peer(MATMUL, "torch CSR", "torch", "sparse")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    t = torch()
    matrix, xt = t.from_numpy(w).t().to_sparse_csr(), t.from_numpy(x).t().contiguous()
    return lambda: matrix @ xt


@peer(MATMUL, "scipy CSR", "scipy", "sparse")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    from scipy import sparse

    matrix, xt = sparse.csr_array(w.T), np.ascontiguousarray(x.T)
    return lambda: matrix @ xt


@peer(MATMUL, "tf.sparse.sparse_dense_matmul", "tensorflow", "sparse")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    tf = tensorflow()
    indices = np.argwhere(w.T)
    matrix = tf.SparseTensor(indices, w.T[tuple(indices.T)], w.T.shape)
    return compiled(lambda xt: tf.sparse.sparse_dense_matmul(matrix, xt), np.ascontiguousarray(x.T))


@peer(MATMUL, "torch dense", "torch")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    t = torch()
    matrix, xt = t.from_numpy(w).t().contiguous(), t.from_numpy(x)
    return lambda: t.nn.functional.linear(xt, matrix)


@peer(MATMUL, "numpy dense", "numpy")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    return lambda: x @ w


@peer(MATMUL, "ONNX Runtime dense", "onnxruntime")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    session = _onnxruntime(_onnx_matmul(w, len(x)))
    return lambda: session.run(None, {"x": x})[0]


@peer(MATMUL, "OpenVINO dense", "openvino")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    return _openvino(_onnx_matmul(w, len(x)), x)


@peer(MATMUL, "Keras Dense", "keras")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    return _keras_dense(w, x, jit_compile=False)


@peer(MATMUL, "Keras Dense, XLA", "keras")
def _(w: np.ndarray, x: np.ndarray, block_size: BlockSize) -> Work:
    return _keras_dense(w, x, jit_compile=True)


def _keras_dense(w: np.ndarray, x: np.ndarray, jit_compile: bool) -> Work:
    tensorflow()
    import keras

    layer = keras.layers.Dense(w.shape[1], use_bias=False)
    layer.build((None, w.shape[0]))
    layer.set_weights([w])
    return compiled(layer, x, jit_compile)


# ---- layers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RNNWeights:
    """A GRU (Keras's default, `reset_after`) or a SimpleRNN in Keras's order of gates: z, r, h."""

    cell: str  #: "gru" or "simple_rnn"
    kernel: np.ndarray  #: (inputs, gates * units)
    recurrent: np.ndarray  #: (units, gates * units)
    bias: np.ndarray  #: (2, 3 * units) or (units,)

    @property
    def units(self) -> int:
        """Outputs of a step."""
        return len(self.recurrent)

    @property
    def gates(self) -> int:
        """3 or 1."""
        return self.recurrent.shape[1] // self.units

    def keras_model(self, steps: int) -> Any:
        """A Sequential of the one layer."""
        tensorflow()
        import keras

        make = {"gru": keras.layers.GRU, "simple_rnn": keras.layers.SimpleRNN}[self.cell]
        model = keras.Sequential([keras.Input((steps, len(self.kernel))), make(self.units, return_sequences=True)])
        model.set_weights([self.kernel, self.recurrent, self.bias])
        return model

    def transposed(self, order: tuple[int, ...]) -> list[np.ndarray]:
        """Kernel and recurrent as (gates * units, inputs), biases as (gates * units,), with gates in this order."""
        order = order if self.gates == 3 else (0,)
        biases = self.bias if self.bias.ndim == 2 else (self.bias, 0 * self.bias)

        def sort(a: np.ndarray) -> np.ndarray:
            parts = np.split(a, self.gates, axis=-1)
            return np.ascontiguousarray(np.concatenate([parts[gate].T for gate in order], axis=0))

        return [sort(a) for a in (self.kernel, self.recurrent, *biases)]


@peer(RNN, "Keras", "keras")
def _(layer: RNNWeights, x: np.ndarray) -> Work:
    return compiled(layer.keras_model(x.shape[1]), x)


@peer(RNN, "Keras, XLA", "keras")
def _(layer: RNNWeights, x: np.ndarray) -> Work:
    return compiled(layer.keras_model(x.shape[1]), x, jit_compile=True)


@peer(RNN, "torch", "torch")
def _(layer: RNNWeights, x: np.ndarray) -> Work:
    t = torch()
    make = {"gru": t.nn.GRU, "simple_rnn": t.nn.RNN}[layer.cell]
    module = make(len(layer.kernel), layer.units).eval()
    for parameter, values in zip(module.parameters(), layer.transposed((1, 0, 2)), strict=True):
        parameter.copy_(t.from_numpy(values))
    tensor = t.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))
    return lambda: module(tensor)[0]


@peer(RNN, "ONNX Runtime", "onnxruntime")
def _(layer: RNNWeights, x: np.ndarray) -> Work:
    session, xt = _onnxruntime(_onnx_rnn(layer, x)), np.ascontiguousarray(x.swapaxes(0, 1))
    return lambda: session.run(None, {"x": xt})[0]


@peer(RNN, "OpenVINO", "openvino")
def _(layer: RNNWeights, x: np.ndarray) -> Work:
    return _openvino(_onnx_rnn(layer, x), np.ascontiguousarray(x.swapaxes(0, 1)))


# ---- ONNX, for both runtimes ----------------------------------------------------------------------------------------


def _onnx_model(nodes: list[Any], x: tuple[int, ...], y: tuple[int, ...], weights: dict[str, np.ndarray]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def _onnx_matmul(w: np.ndarray, batch: int) -> bytes:
    from onnx import helper

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _onnx_model([node], (batch, w.shape[0]), (batch, w.shape[1]), {"w": w})


def _onnx_rnn(layer: RNNWeights, x: np.ndarray) -> bytes:
    from onnx import helper

    batch, steps, inputs = x.shape
    kernel, recurrent, *biases = layer.transposed((0, 1, 2))
    weights = {"W": kernel[None], "R": recurrent[None], "B": np.concatenate(biases)[None]}
    kind, options = ("GRU", {"linear_before_reset": 1}) if layer.cell == "gru" else ("RNN", {})
    nodes = [
        helper.make_node(kind, ["x", *weights], ["directions"], hidden_size=layer.units, **options),
        helper.make_node("Squeeze", ["directions", "axis"], ["y"]),
    ]
    weights["axis"] = np.array([1], np.int64)
    return _onnx_model(nodes, (steps, batch, inputs), (steps, batch, layer.units), weights)


def _onnxruntime(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _openvino(model: bytes, x: np.ndarray) -> Work:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]
