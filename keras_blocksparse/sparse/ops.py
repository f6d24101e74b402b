"""The native products and recurrent loops as TensorFlow ops, with gradients.

The ops work eagerly, in `tf.function`, in `tf.data` and in a SavedModel; not under XLA (`jit_compile=True`), and on the
CPU only.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from keras_blocksparse.sparse import _native
from keras_blocksparse.sparse.matrix import BlockSparseMatrix
from keras_blocksparse.sparse.structure import BlockStructure

OLDEST_TENSORFLOW = (2, 17)


def register_ops() -> ModuleType:
    """Registers the native ops with TensorFlow. Everything in the package that needs them does so itself.

    Call it before `tf.saved_model.load` of a model that was saved with block-sparse layers, in a program that uses
    nothing else of the package.

    Returns:
        module with TensorFlow's raw wrappers of the ops.

    Raises:
        ImportError: the native library is missing, is another library, or cannot work with this TensorFlow.
    """
    with _loading:
        return _load()


_loading = threading.Lock()


@functools.cache
def _load() -> ModuleType:
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if version < OLDEST_TENSORFLOW:
        raise ImportError(
            f"The native ops need TensorFlow {'.'.join(map(str, OLDEST_TENSORFLOW))} or newer. "
            f"Received: {tf.__version__}"
        )
    path = _native.library_path().with_name("libkbs_tf.so")
    if not path.is_file():
        raise ImportError(f"The native ops' library is missing: {path}. Reinstall keras_blocksparse")
    _native.library()  # the one beside it, checked
    if op_def_registry.get("KerasBlocksparse>Matmul") is not None:
        # TensorFlow would accept a second copy without a word, and fail at every call.
        raise ImportError(
            "Another copy of keras_blocksparse's native ops is already loaded in this process. Remove one of the two "
            f"installations; this one is {path}"
        )
    try:
        ops = tf.load_op_library(str(path))
    except tf.errors.OpError as error:
        raise ImportError(f"TensorFlow {tf.__version__} cannot load {path}: {error}") from error
    if not hasattr(ops, "keras_blocksparse_matmul"):
        library = ctypes.CDLL(str(path))
        _native.declare(library, {"kbs_tf_error": (ctypes.c_char_p, [])})
        reason = library.kbs_tf_error().decode()
        raise ImportError(f"keras_blocksparse's native ops do not work with TensorFlow {tf.__version__}: {reason}")
    return ops


def block_sparse_matmul(
    x: Any, matrix: BlockSparseMatrix | BlockStructure, values: Any = None, bias: Any = None
) -> tf.Tensor:
    """`x W + bias`, with gradients of any order to `x`, `values` and `bias`.

    Example:

    >>> W = kbs.BlockSparseMatrix.from_dense(w, block_size=(16, 16))
    >>> values = tf.Variable(W.values)  # to train the kept blocks
    >>> with tf.GradientTape() as tape:
    ...     y = kbs.block_sparse_matmul(x, W, values)
    >>> tape.gradient(y, values).shape == W.values.shape
    True

    Args:
        x: float32 `(..., rows)`, a tensor or an array.
        matrix: the matrix `(rows, cols)`, `W` or `W.T`; or only its structure, with `values`.
        values: float32 tensor or variable that stands in for the matrix's own values, of the shape of `matrix.values`.
            Matrices of bfloat16 and int8 take uint8, as `matrix.values` gives it, and have no gradients.
        bias: float32 `(cols,)`, or None.

    Returns:
        float32 `(..., cols)`.

    Raises:
        ValueError: something has another type or rank.
        tf.errors.InvalidArgumentError: sizes do not fit each other.
    """
    transposed = isinstance(matrix, BlockSparseMatrix) and matrix.transposed
    structure = _structure(matrix, "matrix")
    if values is None:
        if isinstance(matrix, BlockStructure):
            raise ValueError("A structure has no values of its own: give `values`")
        values = matrix.values
    x = _floats(x, "x")
    y = register_ops().keras_blocksparse_matmul(
        x=x,
        values=_values(values, structure, "values"),
        bias=_floats([] if bias is None else bias, "bias"),
        structure=structure.packed,
        transposed=transposed,
    )
    if x.shape.rank is not None:
        y.set_shape([*x.shape[:-1], structure.shape[0 if transposed else 1]])
    return y


def block_sparse_rnn(
    x: Any,
    mask: Any,
    initial_states: Sequence[Any],
    kernel: BlockStructure,
    kernel_values: Any,
    recurrent: BlockStructure,
    recurrent_values: Any,
    bias: Any,
    *,
    cell: str,
    activation: str,
    recurrent_activation: str = "linear",
    activation_limit: float = 0.0,
    recurrent_limit: float = 0.0,
    reset_after: bool = False,
    go_backwards: bool = False,
    return_sequences: bool = False,
    zero_output_for_mask: bool = False,
    training: bool = False,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """A recurrent layer over a whole sequence in one call, as `keras.layers.GRU`, `LSTM` and `SimpleRNN` compute it.

    Has first derivatives with respect to `x`, the initial states, the values and the bias.

    Args:
        x: float32 `(batch, steps, inputs)`.
        mask: bool `(batch, steps)`, or None. Steps that are False keep the state and repeat the output.
        initial_states: float32 `(batch, units)`: `[h]`, for an LSTM `[h, c]`.
        kernel: structure of the input matrix `(inputs, gates * units)`, with the cell's gates.
        kernel_values: float32, of `kernel.values_shape`; uint8 for structures of bfloat16 and int8.
        recurrent: structure of the recurrent matrix `(units, gates * units)`.
        recurrent_values: its values.
        bias: float32, in the shape that the Keras layer has it, or None.
        cell: "gru", "lstm" or "simple_rnn".
        activation: of the output: "linear", "tanh", "sigmoid", "relu", "hard_sigmoid" or "clipped_relu".
        recurrent_activation: of the gates.
        activation_limit: of a clipped relu, `min(max(x, 0), limit)`.
        recurrent_limit: the same for the gates.
        reset_after: of a GRU.
        go_backwards: whether to go through `x` from its end; outputs are in the order they are computed.
        return_sequences: whether to return every step's output.
        zero_output_for_mask: whether masked steps put out zeros.
        training: whether gradients will be asked for, and what they need is to be kept. Without it they are the same,
            but run the layer a second time.

    Returns:
        output `(batch, steps, units)`, or `(batch, units)` of the last step, and the final states.

    Raises:
        ValueError: something has another type or rank, or an unknown name.
        tf.errors.InvalidArgumentError: sizes do not fit each other.
    """
    if cell not in _native.CELLS:
        raise ValueError(f"`cell` must be one of {tuple(_native.CELLS)}. Received: cell={cell!r}")
    for name in (activation, recurrent_activation):
        if name not in _native.ACTIVATIONS:
            raise ValueError(f"Activations must be among {tuple(_native.ACTIVATIONS)}. Received: {name!r}")
    count = 2 if cell == "lstm" else 1
    if len(initial_states) != count:
        raise ValueError(f"{cell!r} has {count} state(s). Received: {len(initial_states)} initial states")
    states = [_floats(state, "initial_states") for state in initial_states]
    x = _floats(x, "x")
    y, h, c, _ = register_ops().keras_blocksparse_rnn(
        x=x,
        mask=tf.zeros((0, 0), tf.bool) if mask is None else tf.convert_to_tensor(mask, tf.bool, name="mask"),
        initial_h=states[0],
        initial_c=states[1] if cell == "lstm" else tf.zeros((0,)),
        kernel_values=_values(kernel_values, kernel, "kernel_values"),
        recurrent_values=_values(recurrent_values, recurrent, "recurrent_values"),
        bias=_floats([] if bias is None else bias, "bias"),
        kernel=_structure(kernel, "kernel").packed,
        recurrent=_structure(recurrent, "recurrent").packed,
        cell=_native.CELLS[cell],
        activation=_native.ACTIVATIONS[activation],
        recurrent_activation=_native.ACTIVATIONS[recurrent_activation],
        # Python's integers would be floats to TensorFlow only on its slow path.
        activation_limit=float(activation_limit),
        recurrent_limit=float(recurrent_limit),
        reset_after=reset_after,
        go_backwards=go_backwards,
        return_sequences=return_sequences,
        zero_output_for_mask=zero_output_for_mask,
        reserve=training and kernel.dtype == recurrent.dtype == "float32",  # others have no gradients
    )
    if return_sequences:
        y.set_shape([x.shape[0], x.shape[1], recurrent.shape[0]])
    else:
        y = tf.squeeze(y, 1)
    return y, [h, c][:count]


# ---- gradients -------------------------------------------------------------------------------------------------------


@tf.RegisterGradient("KerasBlocksparse>Matmul")
def _matmul_gradient(op: tf.Operation, dy: tf.Tensor) -> list[tf.Tensor]:
    x, values, bias = op.inputs
    _refuse_short(values)
    structure, transposed = op.get_attr("structure"), op.get_attr("transposed")
    ops = register_ops()
    dx = ops.keras_blocksparse_matmul(
        x=dy, values=values, bias=tf.zeros((0,)), structure=structure, transposed=not transposed
    )
    left, right = (dy, x) if transposed else (x, dy)
    dvalues = ops.keras_blocksparse_sampled_product(x=left, dy=right, structure=structure)
    dx.set_shape(x.shape)
    dvalues.set_shape(values.shape)
    return [dx, dvalues, _bias_gradient(dy, bias)]


@tf.RegisterGradient("KerasBlocksparse>SampledProduct")
def _sampled_product_gradient(op: tf.Operation, dvalues: tf.Tensor) -> list[tf.Tensor]:
    x, dy = op.inputs
    structure, none = op.get_attr("structure"), tf.zeros((0,))
    matmul = register_ops().keras_blocksparse_matmul
    dx = matmul(x=dy, values=dvalues, bias=none, structure=structure, transposed=True)
    ddy = matmul(x=x, values=dvalues, bias=none, structure=structure, transposed=False)
    dx.set_shape(x.shape)
    ddy.set_shape(dy.shape)
    return [dx, ddy]


@tf.RegisterGradient("KerasBlocksparse>Rnn")
def _rnn_gradient(op: tf.Operation, *gradients: tf.Tensor) -> list[tf.Tensor | None]:
    inputs = list(op.inputs)
    _refuse_short(*inputs[4:6])
    names = [*_RNN_ATTRIBUTES, "kernel", "recurrent"]
    dy, dfinal_h, dfinal_c, _ = gradients
    results = register_ops().keras_blocksparse_rnn_grad(
        *inputs, op.outputs[3], dy, dfinal_h, dfinal_c, **{name: op.get_attr(name) for name in names}
    )
    dx, *rest = results
    return [dx, None, *rest]


@tf.RegisterGradient("KerasBlocksparse>RnnGrad")
def _rnn_second_gradient(op: tf.Operation, *gradients: tf.Tensor) -> list[tf.Tensor]:
    raise NotImplementedError(
        "block_sparse_rnn has first derivatives only. For second ones write the loop with block_sparse_matmul, or use "
        "the dense layer"
    )


_RNN_ATTRIBUTES = (
    "cell",
    "activation",
    "recurrent_activation",
    "activation_limit",
    "recurrent_limit",
    "reset_after",
    "go_backwards",
    "return_sequences",
    "zero_output_for_mask",
)


def _bias_gradient(dy: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    if bias.shape == (0,):
        return bias
    return tf.reduce_sum(tf.reshape(dy, (-1, tf.shape(dy)[-1])), axis=0)


def _refuse_short(*values: tf.Tensor) -> None:
    if any(value.dtype != tf.float32 for value in values):
        raise ValueError(
            "Block-sparse weights of bfloat16 and int8 are for inference and have no gradients. Fine-tune a float32 "
            'model, then convert: to_block_sparse(model, dtype="int8")'
        )


# ---- arguments -------------------------------------------------------------------------------------------------------


def _structure(matrix: Any, name: str) -> BlockStructure:
    if isinstance(matrix, BlockStructure):
        return matrix
    if isinstance(matrix, BlockSparseMatrix):
        return matrix.T.structure if matrix.transposed else matrix.structure
    raise ValueError(f"`{name}` must be a BlockSparseMatrix or a BlockStructure. Received: {type(matrix).__name__}")


def _floats(value: Any, name: str) -> tf.Tensor:
    """float32, refusing tensors of another type: a silent cast of a sequence would cost more than the product."""
    if not (hasattr(value, "dtype") or hasattr(value, "value")):
        return tf.convert_to_tensor(value, tf.float32)
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype != tf.float32:
        raise ValueError(f"`{name}` must be float32. Received: dtype={tensor.dtype.name}")
    return tensor


def _values(value: Any, structure: BlockStructure, name: str) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype.name != structure.values_dtype or tensor.shape.rank not in (None, 1):
        raise ValueError(
            f"`{name}` must be {structure.values_dtype} of shape {structure.values_shape}, for a matrix of "
            f"{structure.dtype}. Received: dtype={tensor.dtype.name}, shape={tensor.shape}"
        )
    return tensor
