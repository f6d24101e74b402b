"""Keras's recurrent and Dense layers with block-sparse matrices, computed by the native ops.

Each class derives from Keras's own, which goes on to do all that does not touch the matrices: config, states, masks,
dropout, `Bidirectional`. Two of Keras's hooks are taken: `add_weight`, by which a layer asks for a matrix in its
`build` and here gets a flat variable of the kept blocks, and `RNN.inner_loop`, where Keras would choose cuDNN and here
the native loop is chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_blocksparse.schedules import PACKAGE
from keras_blocksparse.sparse.matrix import BlockSparseMatrix
from keras_blocksparse.sparse.ops import block_sparse_matmul, block_sparse_rnn
from keras_blocksparse.sparse.structure import BlockStructure, pack

#: On these, the flat values give what the dense matrix would give: zeros stay zeros and add nothing.
ELEMENTWISE = (
    keras.regularizers.L1,
    keras.regularizers.L2,
    keras.regularizers.L1L2,
    keras.constraints.NonNeg,
)


class BlockSparseWeights(keras.layers.Layer):
    """Stands before a Keras class, and puts kept blocks in the place of its matrices.

    Attributes:
        kernel_structure: `BlockStructure` of the kernel; the recurrent kernel's is `recurrent_kernel_structure`.
        kernel_values: the variable that holds the kept blocks, flat; the recurrent kernel's is
            `recurrent_kernel_values`. float32 and trainable, or uint8 and not.
    """

    #: Names of the matrices, which are also the constructor arguments that say which blocks are kept.
    matrices: ClassVar[tuple[str, ...]] = ("kernel", "recurrent_kernel")
    #: Equal parts of a matrix beside each other.
    gates: ClassVar[int] = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name, None) for name in self.matrices}
        super().__init__(*args, **kwargs)
        self.supports_jit = False
        for name, value in given.items():
            structure, values = _read(value, name, type(self).__name__)
            setattr(self, f"{name}_structure", structure)
            setattr(self, f"_{name}_start", values)
            self._check(name, structure)

    def _check(self, name: str, structure: BlockStructure) -> None:
        """Raises ValueError unless a structure fits the layer."""
        if structure.gates != self.gates:
            raise ValueError(f"`{name}` must have {self.gates} gate(s). Received: gates={structure.gates}")
        rows, cols = structure.shape
        if cols != self.gates * self.units or (name == "recurrent_kernel" and rows != self.units):
            wanted = (self.units if name == "recurrent_kernel" else "inputs", self.gates * self.units)
            raise ValueError(
                f"`{name}` must have shape ({wanted[0]}, {wanted[1]}) for units={self.units}. "
                f"Received: shape={structure.shape}"
            )
        if structure.dtype != self.kernel_structure.dtype:
            raise ValueError(
                "All matrices of a layer must have the same dtype. "
                f"Received: {self.kernel_structure.dtype} and {structure.dtype}"
            )
        if self.dtype_policy.quantization_mode is not None:
            raise ValueError(
                "A block-sparse layer is not quantized by Keras. Give it int8 structures, or use "
                f"kbs.to_block_sparse(model, dtype='int8'). Received: dtype={self.dtype_policy.name!r}"
            )
        if structure.dtype == "float32":
            for kind in ("regularizer", "constraint"):
                if reason := not_elementwise(getattr(self, attribute_of(name, kind))):
                    raise ValueError(f"{reason}. Received: {attribute_of(name, kind)}={reason.split()[0]}")

    @property
    def kernel(self) -> BlockSparseMatrix:
        """A snapshot of the kernel."""
        return _snapshot(self, "kernel")

    @kernel.setter
    def kernel(self, variable: Any) -> None:
        self._kernel = variable  # where Keras's build puts it

    @property
    def recurrent_kernel(self) -> BlockSparseMatrix:
        """A snapshot of the recurrent kernel."""
        return _snapshot(self, "recurrent_kernel")

    @recurrent_kernel.setter
    def recurrent_kernel(self, variable: Any) -> None:
        self._recurrent_kernel = variable

    @property
    def kernel_values(self) -> Any:
        """The kept blocks of the kernel, flat."""
        return self._kernel

    @property
    def recurrent_kernel_values(self) -> Any:
        """The kept blocks of the recurrent kernel, flat."""
        return self._recurrent_kernel

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Keras's, except that a matrix becomes a flat variable of its kept blocks."""
        kwargs["autocast"] = False  # the native ops compute in float32, whatever the policy
        short = self.kernel_structure.dtype != "float32"
        if short:
            kwargs.update(trainable=False, regularizer=None, constraint=None)
        if (name := kwargs.get("name")) in self.matrices:
            structure, start = getattr(self, f"{name}_structure"), getattr(self, f"_{name}_start")
            if tuple(kwargs["shape"]) != structure.shape:
                raise ValueError(
                    f"{self.name!r} was built for inputs that need a `{name}` of shape {tuple(kwargs['shape'])}. "
                    f"Received: a structure of shape {structure.shape}"
                )
            if start is not None:
                initializer: Any = _constant(start)
            elif short:
                initializer = _constant(pack(structure, None)[len(structure.packed) :])
            else:
                initializer = _kept(keras.initializers.get(kwargs["initializer"]), structure)
            kwargs.update(shape=structure.values_shape, dtype=structure.values_dtype, initializer=initializer)
            setattr(self, f"_{name}_start", None)
        return super().add_weight(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The Keras class's config, and the structures."""
        structures = {name: getattr(self, f"{name}_structure").get_config() for name in self.matrices}
        return {**super().get_config(), **structures}

    def _product(self, x: Any, name: str, bias: Any = None) -> Any:
        """`x W + bias` in float32."""
        values = ops.convert_to_tensor(getattr(self, f"_{name}"))
        bias = None if bias is None else ops.cast(bias, "float32")
        return block_sparse_matmul(ops.cast(x, "float32"), getattr(self, f"{name}_structure"), values, bias)


class BlockSparseCell(BlockSparseWeights):
    """What the cells share: one step, unfused, by Keras's equations."""

    #: The native loop's name for it.
    native_name: ClassVar[str]

    def _gates(self, x: Any, name: str, bias: Any, mask: Any) -> list[Any]:
        """The product with each gate, under one dropout mask, one for each gate, or none."""
        if isinstance(mask, list):  # a whole product for each gate: plain, and only with recurrent dropout
            products = [self._product(x * gate_mask, name, bias) for gate_mask in mask]
            return [ops.split(product, self.gates, axis=-1)[gate] for gate, product in enumerate(products)]
        return ops.split(self._product(x if mask is None else x * mask, name, bias), self.gates, axis=-1)

    def _masks(self, inputs: Any, state: Any, training: Any) -> tuple[Any, Any]:
        """Dropout masks of the inputs and of the state, None where there is no dropout."""
        if not training:
            return None, None
        return (
            self.get_dropout_mask(inputs) if 0 < self.dropout < 1 else None,
            self.get_recurrent_dropout_mask(state) if 0 < self.recurrent_dropout < 1 else None,
        )


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseSimpleRNNCell(BlockSparseCell, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell` with block-sparse matrices. See `BlockSparseSimpleRNN`."""

    native_name = "simple_rnn"

    def call(self, sequence: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """One step: `(batch, inputs)` and the state `(batch, units)` to output and new state."""
        state = states[0] if isinstance(states, (list, tuple)) else states
        input_mask, state_mask = self._masks(sequence, state, training)
        (x,) = self._gates(sequence, "kernel", self.bias, input_mask)
        (h,) = self._gates(state, "recurrent_kernel", None, state_mask)
        h = ops.cast(self.activation(x + h), self.compute_dtype)
        return h, [h] if isinstance(states, (list, tuple)) else h


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseGRUCell(BlockSparseCell, keras.layers.GRUCell):
    """`keras.layers.GRUCell` with block-sparse matrices. See `BlockSparseGRU`."""

    gates = 3
    native_name = "gru"

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """One step: `(batch, inputs)` and the state `(batch, units)` to output and new state."""
        before = states[0] if isinstance(states, (list, tuple)) else states
        input_mask, state_mask = self._masks(inputs, before, training)
        h = ops.cast(before, "float32")
        bias, recurrent_bias = self.bias, None
        if bias is not None and self.reset_after:
            bias, recurrent_bias = bias[0], bias[1]
        x_z, x_r, x_h = self._gates(inputs, "kernel", bias, input_mask)
        h_z, h_r, h_h = self._gates(before, "recurrent_kernel", recurrent_bias, state_mask)
        z, r = self.recurrent_activation(x_z + h_z), self.recurrent_activation(x_r + h_r)
        if self.reset_after:
            h_h = r * h_h
        else:
            h_h = self._gates(r * h, "recurrent_kernel", None, state_mask)[2]
        h = ops.cast(z * h + (1 - z) * self.activation(x_h + h_h), self.compute_dtype)
        return h, [h] if isinstance(states, (list, tuple)) else h


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseLSTMCell(BlockSparseCell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` with block-sparse matrices. See `BlockSparseLSTM`."""

    gates = 4
    native_name = "lstm"

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """One step: `(batch, inputs)` and the states `(batch, units)` to output and new states."""
        before, c = states[0], ops.cast(states[1], "float32")
        input_mask, state_mask = self._masks(inputs, before, training)
        x = self._gates(inputs, "kernel", self.bias, input_mask)
        h = self._gates(before, "recurrent_kernel", None, state_mask)
        i, f, g, o = (x_gate + h_gate for x_gate, h_gate in zip(x, h, strict=True))
        c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(g)
        h = ops.cast(self.recurrent_activation(o) * self.activation(c), self.compute_dtype)
        return h, [h, ops.cast(c, self.compute_dtype)]


class BlockSparseRNN(keras.layers.RNN):
    """What the layers share. It stands between Keras's layer and `keras.layers.RNN`.

    So Keras's constructor, which makes the stock cell, hands it here, and no argument of it has to be repeated.
    """

    cell_class: ClassVar[type]
    matrices: ClassVar[tuple[str, ...]] = BlockSparseCell.matrices

    def __init__(self, cell: Any, **kwargs: Any) -> None:
        matrices = {name: kwargs.pop(name, None) for name in self.matrices}
        super().__init__(self.cell_class(**_settings(cell), **matrices), **kwargs)
        self.supports_jit = False

    @property
    def use_cudnn(self) -> bool:
        """Always False: `Bidirectional` asks for it, and there are no block-sparse matrices in cuDNN."""
        return False

    @use_cudnn.setter
    def use_cudnn(self, value: Any) -> None:
        if value is True:
            raise ValueError("cuDNN has no block-sparse matrices. `use_cudnn` must be 'auto' or False. Received: True")

    @property
    def kernel(self) -> BlockSparseMatrix:
        """A snapshot of the kernel."""
        return self.cell.kernel

    @property
    def recurrent_kernel(self) -> BlockSparseMatrix:
        """A snapshot of the recurrent kernel."""
        return self.cell.recurrent_kernel

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> tuple[Any, Any, list[Any]]:
        """The whole sequence: by the native loop if it can run the cell, else by Keras's loop over the cell."""
        cell = self.cell
        if why_unfused(cell) or (training and why_unfused_in_training(cell)):
            return super().inner_loop(sequences, initial_state, mask, training=training)
        return run_natively(
            self, cell.native_name, (cell.kernel_structure, ops.convert_to_tensor(cell.kernel_values)),
            (cell.recurrent_kernel_structure, ops.convert_to_tensor(cell.recurrent_kernel_values)),
            sequences, initial_state, mask, training,
        )  # fmt: skip

    def get_config(self) -> dict[str, Any]:
        """The Keras layer's config, and the structures."""
        structures = {name: getattr(self.cell, f"{name}_structure").get_config() for name in self.matrices}
        return {**super().get_config(), **structures}


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseSimpleRNN(keras.layers.SimpleRNN, BlockSparseRNN):
    """`keras.layers.SimpleRNN` with block-sparse matrices.

    Takes, computes and returns what Keras's layer does. `kbs.to_block_sparse` makes it from one. With the activations
    tanh, sigmoid, relu, relu6 (or `keras.layers.ReLU(max_value)`), hard_sigmoid and linear it runs in one native loop;
    with others, and in training with `recurrent_dropout`, step by step.

    float32 values are trained, and blocks that are not kept stay zero. bfloat16 and int8 are for inference: nothing of
    the layer trains. Whatever the layer's dtype policy, it computes in float32.

    Example:

    >>> structure = kbs.BlockStructure((64, 256), (16, 16), 1, "float32", keep=np.random.rand(1, 4, 16) < 0.1)
    >>> recurrent = kbs.BlockStructure((256, 256), (16, 16), 1, "float32", keep=np.random.rand(1, 16, 16) < 0.1)
    >>> layer = kbs.BlockSparseSimpleRNN(256, kernel=structure, recurrent_kernel=recurrent)
    >>> layer(np.ones((8, 100, 64), "float32")).shape
    TensorShape([8, 256])
    >>> layer.recurrent_kernel  # a snapshot
    <BlockSparseMatrix 256 x 256, blocks 16x16, 10.2% dense, float32>

    The arguments are those of `keras.layers.SimpleRNN`, and two more by name, `kernel` and `recurrent_kernel`. They say
    which blocks are kept of the matrices `(inputs, units)` and `(units, units)`: each is a `BlockStructure`, the config
    of one, or a `BlockSparseMatrix`, whose values are what the weight begins with. Without such values, the layer's
    initializer fills the kept blocks with what it would put there in the dense matrix (bfloat16 and int8: zeros).
    Regularizers and constraints of float32 matrices must work on each element by itself: L1, L2, L1L2, NonNeg.

    Raises:
        TypeError: `kernel` or `recurrent_kernel` is missing, or none of these.
        ValueError: they do not fit the layer or each other, or a regularizer or constraint looks at the whole matrix.
    """

    cell_class = BlockSparseSimpleRNNCell


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseGRU(keras.layers.GRU, BlockSparseRNN):
    """`keras.layers.GRU` with block-sparse matrices.

    Everything that `BlockSparseSimpleRNN` says holds; the matrices are `(inputs, 3 * units)` and `(units, 3 * units)`,
    and their structures have 3 gates: z, r, h.
    """

    cell_class = BlockSparseGRUCell


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseLSTM(keras.layers.LSTM, BlockSparseRNN):
    """`keras.layers.LSTM` with block-sparse matrices.

    Everything that `BlockSparseSimpleRNN` says holds; the matrices are `(inputs, 4 * units)` and `(units, 4 * units)`,
    and their structures have 4 gates: i, f, c, o.
    """

    cell_class = BlockSparseLSTMCell


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockSparseDense(BlockSparseWeights, keras.layers.Dense):
    """`keras.layers.Dense` with a block-sparse kernel.

    Takes, computes and returns what Keras's layer does, except LoRA and quantization by Keras. `kbs.to_block_sparse`
    makes it from one. float32 values are trained, and blocks that are not kept stay zero; a layer of bfloat16 or int8
    is for inference, and nothing of it trains.

    The arguments are those of `keras.layers.Dense`, and one more by name, `kernel`, which says which blocks are kept of
    the matrix `(inputs, units)`: a `BlockStructure`, the config of one, or a `BlockSparseMatrix`, whose values are what
    the weight begins with. Everything else about it is as in `BlockSparseSimpleRNN`.

    Raises:
        TypeError: `kernel` is missing, or none of these.
        ValueError: it does not fit the layer, a regularizer or constraint looks at the whole matrix, or `lora_rank` is
            given.
    """

    matrices = ("kernel",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.lora_rank:
            self.enable_lora(self.lora_rank)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """`activation(x W + bias)` for `x` of shape `(..., inputs)`."""
        x = ops.cast(self._product(inputs, "kernel", self.bias), self.compute_dtype)
        return x if self.activation is None else self.activation(x)

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A block-sparse layer has no LoRA, whose product would be dense. Use kbs.to_dense first. "
            f"Received: rank={rank}"
        )

    # Keras's Dense saves its kernel by name, to allow for LoRA and quantization.
    save_own_variables = keras.layers.Layer.save_own_variables
    load_own_variables = keras.layers.Layer.load_own_variables


def attribute_of(matrix: str, kind: str) -> str:
    """Keras's name for the "initializer", "regularizer" or "constraint" of a matrix."""
    return f"{matrix.removesuffix('_kernel')}_{kind}"


def not_elementwise(thing: Any) -> str:
    """Why a regularizer or constraint cannot work on the kept values alone; "" if it can, or is None."""
    if thing is None or type(thing) in ELEMENTWISE:
        return ""
    known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
    return (
        f"{type(thing).__name__} looks at the whole matrix, of which a block-sparse layer has the kept blocks only "
        f"(possible are {known})"
    )


def run_natively(
    layer: Any, name: str, kernel: tuple[BlockStructure, Any], recurrent_kernel: tuple[BlockStructure, Any],
    sequences: Any, initial_state: Any, mask: Any, training: Any = False,
) -> tuple[Any, Any, list[Any]]:  # fmt: skip
    """What `keras.layers.RNN.inner_loop` does, in one native call, for a cell that `why_unfused` has nothing against.

    Args:
        layer: a recurrent Keras layer, block-sparse or not.
        name: the native loop's for its cell.
        kernel: structure and values of the input matrix.
        recurrent_kernel: those of the recurrent one.
        sequences: see Keras, as all that follows.
        initial_state: one state, or a list.
        mask: bool, or None.
        training: whether gradients will be asked for.
    """
    cell = layer.cell
    if training and cell.dropout:
        sequences = sequences * ops.expand_dims(cell.get_dropout_mask(sequences[:, 0, :]), 1)
    (activation, limit), (recurrent_activation, recurrent_limit) = (
        native_activation(getattr(cell, name, None)) or ("", 0.0) for name in ("activation", "recurrent_activation")
    )
    y, states = block_sparse_rnn(
        ops.cast(sequences, "float32"),
        None if mask is None else ops.cast(keras.tree.flatten(mask)[0], "bool"),
        [ops.cast(state, "float32") for state in keras.tree.flatten(initial_state)],
        *kernel,
        *recurrent_kernel,
        None if cell.bias is None else ops.cast(cell.bias, "float32"),
        cell=name,
        activation=activation,
        recurrent_activation=recurrent_activation,
        activation_limit=limit,
        recurrent_limit=recurrent_limit,
        reset_after=getattr(cell, "reset_after", False),
        go_backwards=layer.go_backwards,
        return_sequences=layer.return_sequences,
        zero_output_for_mask=layer.zero_output_for_mask,
        training=bool(training),
    )
    return y, y, states  # last output and all outputs: Keras takes the one that `return_sequences` asks for


def why_unfused(cell: Any) -> str:
    """Why the native loop cannot run a cell, Keras's own or a block-sparse one; "" if it can."""
    for name in ("activation", "recurrent_activation"):
        if native_activation(activation := getattr(cell, name, None)) is None:
            return f"the native loop has no {name}={getattr(activation, '__name__', activation)}"
    return ""


def why_unfused_in_training(cell: Any) -> str:
    """Why it cannot in training; "" if it can."""
    if cell.recurrent_dropout:
        return f"recurrent_dropout={cell.recurrent_dropout}"
    if cell.dropout == 1 or (cell.dropout and getattr(cell, "implementation", 2) == 1):
        return f"dropout={cell.dropout} of implementation={getattr(cell, 'implementation', 2)}"
    return ""


def native_activation(activation: Any) -> tuple[str, float] | None:
    """The native loop's name and limit for a Keras activation; None if it has none."""
    if activation is None:
        return "linear", 0.0
    if type(activation) is keras.layers.ReLU and not activation.negative_slope and not activation.threshold:
        limit = activation.max_value
        return ("relu", 0.0) if limit is None else ("clipped_relu", float(limit))
    if activation is keras.activations.relu6:
        return "clipped_relu", 6.0
    for name in ("linear", "tanh", "sigmoid", "relu", "hard_sigmoid"):
        if activation is getattr(keras.activations, name):
            return name, 0.0
    return None


def _read(value: Any, name: str, owner: str) -> tuple[BlockStructure, np.ndarray | None]:
    """A constructor's argument as a structure, and the values to begin with."""
    if isinstance(value, BlockSparseMatrix):
        return value.structure, value.values.copy()
    if isinstance(value, BlockStructure):
        return value, None
    if isinstance(value, Mapping):
        return BlockStructure.from_config(dict(value)), None
    raise TypeError(
        f"{owner} needs `{name}`: a kbs.BlockStructure, its config, or a kbs.BlockSparseMatrix. (To make block-sparse "
        f"layers from trained ones, use kbs.to_block_sparse.) Received: {name}={value!r}"
    )


def _snapshot(owner: Any, name: str) -> BlockSparseMatrix:
    variable = getattr(owner, f"_{name}", None)
    if variable is None:
        raise AttributeError(f"{owner.name!r} has no `{name}` before it is built")
    values = np.asarray(ops.convert_to_tensor(variable))
    return BlockSparseMatrix.from_values(getattr(owner, f"{name}_structure"), values)


def _settings(cell: Any) -> dict[str, Any]:
    """Constructor arguments of a Keras cell, as live objects: a config would refuse what cannot be saved."""
    parameters = inspect.signature(type(cell).__init__).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    settings = {name: getattr(cell, name) for name in names}
    if hasattr(cell, "implementation"):
        settings["implementation"] = cell.implementation
    return {**settings, "name": cell.name, "trainable": cell.trainable, "dtype": cell.dtype_policy}


def _constant(values: np.ndarray) -> Callable[..., Any]:
    def initializer(shape: Any, dtype: Any = None) -> Any:
        return ops.convert_to_tensor(values, dtype)

    return initializer


def _kept(dense: Any, structure: BlockStructure) -> Callable[..., Any]:
    """What `dense` puts into the kept blocks of a dense matrix, and zeros in the padding."""
    zeros = np.zeros(structure.values_shape, np.float32)
    positions = BlockSparseMatrix.from_values(structure, zeros).positions

    def initializer(shape: Any, dtype: Any = None) -> Any:
        flat = ops.reshape(dense(structure.shape, dtype=dtype), (-1,))
        return ops.where(positions >= 0, ops.take(flat, np.maximum(positions, 0)), 0.0)

    return initializer
