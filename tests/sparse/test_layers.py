"""The block-sparse layers against Keras's own with the same weights, zeros written out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_helpers import RECURRENT, assert_close, dense_twins, normal, twins, with_zero_blocks

import keras_blocksparse as kbs
from keras_blocksparse.sparse import (
    BlockSparseDense,
    BlockSparseGRU,
    BlockSparseGRUCell,
    BlockSparseMatrix,
    BlockSparseSimpleRNN,
    BlockStructure,
    layers,
)
from keras_blocksparse.sparse.layers import native_activation

KINDS = sorted(RECURRENT)
ACTIVATIONS = ["tanh", "sigmoid", "relu", "relu6", "linear", "hard_sigmoid", "elu"]  # there is no native elu
INITIALIZERS = {"kernel_initializer": keras.initializers.RandomNormal(0, 0.2, seed=1)}


def structure(rows, cols, gates=1, dtype="float32", block_size=(4, 4)):
    w = with_zero_blocks(np.ones((rows, cols)), block_size, gates)
    return BlockSparseMatrix.from_dense(w, block_size, gates, dtype).structure


def structures(inputs=8, units=12, gates=3, dtype="float32"):
    return {
        "kernel": structure(inputs, units * gates, gates, dtype),
        "recurrent_kernel": structure(units, units * gates, gates, dtype),
    }


# ---- outputs -----------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(KINDS), batch=st.integers(1, 5), steps=st.integers(1, 5))
def test_a_layer_computes_what_keras_computes(data, kind, batch, steps):
    draw = data.draw
    inputs, units = draw(st.integers(1, 20)), draw(st.integers(2, 20))
    options = {
        name: draw(st.booleans(), label=name)
        for name in ("use_bias", "return_sequences", "return_state", "go_backwards", "zero_output_for_mask", "unroll")
    }
    options["activation"] = draw(st.sampled_from(ACTIVATIONS), label="activation")
    if options["go_backwards"] and options["zero_output_for_mask"]:
        options["unroll"] = False  # Keras's unrolled loop zeroes the outputs of the wrong steps
    if kind != "SimpleRNN":
        options["recurrent_activation"] = draw(st.sampled_from(ACTIVATIONS), label="recurrent_activation")
    if kind == "GRU":
        options["reset_after"] = draw(st.booleans(), label="reset_after")
    stock, sparse = twins(kind, inputs, units, **INITIALIZERS, **options)
    call = {}
    if draw(st.booleans(), label="mask"):
        call["mask"] = np.array(draw(st.lists(st.lists(st.booleans(), min_size=steps, max_size=steps), min_size=batch,
                                              max_size=batch)))  # fmt: skip
    if draw(st.booleans(), label="initial_state"):
        call["initial_state"] = [normal(batch, units, seed=s) for s in range(2 if kind == "LSTM" else 1)]
    x = normal(batch, steps, inputs)
    wanted = stock(x, **call)
    # Without a bounded activation states grow, and every element has the rounding errors of the largest.
    largest = max(1.0, *(float(np.abs(y).max()) for y in keras.tree.flatten(wanted)))
    assert_close(sparse(x, **call), wanted, atol=1e-5 * largest)


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"activation": "softmax"}])
@pytest.mark.parametrize("shape", [(5, 10), (2, 3, 10), (2, 3, 4, 10)])
def test_dense_computes_what_keras_computes(shape, options):
    stock, sparse = dense_twins(10, 14, **options)
    assert_close(sparse(normal(*shape)), stock(normal(*shape)))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_graph_agree_and_the_shape_is_known(kind):
    stock, sparse = twins(kind, 8, 12, return_sequences=True)
    x = normal(2, 5, 8)
    graph = tf.function(sparse, input_signature=[tf.TensorSpec((None, None, 8))])
    assert_close(graph(x), stock(x))
    assert graph.get_concrete_function().output_shapes[-1] == 12
    assert sparse(keras.Input((5, 8))).shape == (None, 5, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_the_wrappers(kind):
    stock, sparse = twins(kind, 8, 12, return_sequences=True)
    wrapped = [keras.layers.Bidirectional(layer) for layer in (stock, sparse)]
    x, mask = normal(2, 5, 8), np.array([[True] * 3 + [False] * 2, [True] * 5])
    for layer in wrapped:
        layer.build(x.shape)
    assert type(wrapped[1].backward_layer) is type(sparse)
    for direction in ("forward_layer", "backward_layer"):
        old, new = (getattr(layer, direction).cell for layer in wrapped)
        for name in ("kernel", "recurrent_kernel"):
            getattr(old, name).assign(getattr(stock.cell, name))
            getattr(new, f"{name}_values").assign(getattr(sparse.cell, f"{name}_values"))
        new.bias.assign(old.bias)
    assert_close(wrapped[1](x, mask=mask), wrapped[0](x, mask=mask))

    videos = normal(2, 3, 5, 8)
    assert_close(keras.layers.TimeDistributed(sparse)(videos), keras.layers.TimeDistributed(stock)(videos))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateful_layer_goes_on_where_it_was(kind):
    stock, sparse = twins(kind, 8, 12)
    outputs = []
    for layer in (stock, sparse):
        twin = type(layer).from_config({**layer.get_config(), "stateful": True})
        twin.build((2, 3, 8))
        twin.set_weights(layer.get_weights())
        first, second = twin(normal(2, 3, 8)), twin(normal(2, 3, 8))
        assert not np.allclose(first, second)
        twin.reset_state()
        outputs.append([first, second, twin(normal(2, 3, 8))])
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_in_an_rnn(kind):
    stock, sparse = twins(kind, 8, 12)
    assert_close(keras.layers.RNN(sparse.cell)(normal(2, 5, 8)), stock(normal(2, 5, 8)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dropout", [{"dropout": 0.4}, {"recurrent_dropout": 0.4}, {"dropout": 0.3, "recurrent_dropout": 0.2}]
)
def test_dropout_is_keras_own(kind, dropout):
    stock, sparse = twins(kind, 8, 12, seed=5, **dropout)
    x = normal(4, 5, 8)
    assert_close(sparse(x, training=True), stock(x, training=True))
    assert_close(sparse(x), stock(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"activation": "elu"}])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_under_mixed_precision_it_computes_in_float32_and_casts(kind, policy, options):
    stock, sparse = twins(kind, 8, 12, return_sequences=True, return_state=True, dtype="float32", **options)
    mixed = type(sparse).from_config({**sparse.get_config(), "dtype": policy})
    mixed.build((None, 3, 8))
    mixed.set_weights(sparse.get_weights())
    assert all(weight.dtype == "float32" for weight in mixed.weights)
    outputs = mixed(normal(2, 5, 8))
    assert {keras.backend.standardize_dtype(y.dtype) for y in outputs} == {policy.removeprefix("mixed_")}
    precision = 2**-10 if policy == "mixed_float16" else 2**-7
    for got, wanted in zip(outputs, stock(normal(2, 5, 8)), strict=True):
        # Inputs and (step by step) states are rounded once a step; tanh and sigmoid do not make more of it.
        np.testing.assert_allclose(tf.cast(got, "float32"), wanted, atol=8 * precision)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.02), ("int8", 0.05)])
@pytest.mark.parametrize("kind", [*KINDS, "Dense"])
def test_short_weights_compute_nearly_the_same_and_do_not_train(kind, dtype, bound):
    """bfloat16 rounds by 2**-9 of each weight, int8 by 2**-8 of the largest of an output and of an input's."""
    stock, sparse = dense_twins(32, 64, dtype) if kind == "Dense" else twins(kind, 32, 64, dtype)
    assert not sparse.trainable_variables
    assert {weight.dtype for weight in sparse.weights} == {"uint8", "float32"}
    x = normal(4, 32) if kind == "Dense" else normal(4, 5, 32)
    wanted = np.asarray(stock(x))
    assert np.abs(sparse(x) - wanted).max() < bound * np.abs(wanted).max()
    again = type(sparse).from_config(sparse.get_config())
    again.build(x.shape)
    again.set_weights(sparse.get_weights())
    assert_close(again(x), sparse(x))
    fresh = type(sparse).from_config(sparse.get_config())
    fresh.build(x.shape)
    assert not fresh.kernel.to_dense().any()


# ---- gradients ---------------------------------------------------------------------------------------------------


GRADIENT_OPTIONS = [
    {},
    {"use_bias": False},
    {"return_sequences": True, "go_backwards": True},
    {"return_sequences": True, "zero_output_for_mask": True},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in KINDS for options in GRADIENT_OPTIONS),
        ("GRU", {"reset_after": False}),
        ("GRU", {"reset_after": False, "use_bias": False}),
        ("GRU", {"recurrent_activation": "hard_sigmoid"}),
        ("LSTM", {"recurrent_activation": "hard_sigmoid", "return_sequences": True}),
    ],
)
@pytest.mark.parametrize("activation", ["tanh", "relu6", "elu"])
def test_gradients_are_the_dense_ones_of_the_kept_blocks(kind, activation, options):
    stock, sparse = twins(kind, 8, 12, activation=activation, **options)
    x = tf.constant(normal(3, 4, 8))
    states = [tf.constant(normal(3, 12, seed=s)) for s in range(2 if kind == "LSTM" else 1)]
    mask = np.array([[True] * 4, [True, True, False, True], [False, True, True, False]])
    found = []
    for layer in (stock, sparse):
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            y = layer(x, initial_state=states, mask=mask)
            loss = tf.reduce_sum(y * tf.cos(tf.reshape(tf.range(tf.size(y), dtype=tf.float32), tf.shape(y))))
        found.append(tape.gradient(loss, [x, *states, *(v.value for v in layer.trainable_variables)]))
    before = 1 + len(states)
    assert_close(found[1][:before], found[0][:before])
    assert_close(found[1][before + 2 :], found[0][before + 2 :])  # bias
    for dense, flat, name in zip(found[0][before:], found[1][before:], ("kernel", "recurrent_kernel"), strict=False):
        positions, values = getattr(sparse, name).positions, np.asarray(tf.convert_to_tensor(flat))
        assert_close(values[positions >= 0], dense.numpy().reshape(-1)[positions[positions >= 0]])
        assert not values[positions < 0].any()


def test_gradients_of_dense_are_those_of_the_kept_blocks():
    stock, sparse = dense_twins(10, 14, activation="tanh")
    x = tf.constant(normal(3, 10))
    found = []
    for layer in (stock, sparse):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(layer(x)))
        found.append(tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)]))
    (dx, dense, db), (dx2, flat, db2) = found
    assert_close([dx2, db2], [dx, db])
    positions, values = sparse.kernel.positions, np.asarray(tf.convert_to_tensor(flat))
    assert_close(values[positions >= 0], dense.numpy().reshape(-1)[positions[positions >= 0]])


# ---- what runs natively --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "native"),
    [
        (None, ("linear", 0.0)),
        ("tanh", ("tanh", 0.0)),
        ("sigmoid", ("sigmoid", 0.0)),
        ("relu", ("relu", 0.0)),
        ("hard_sigmoid", ("hard_sigmoid", 0.0)),
        ("relu6", ("clipped_relu", 6.0)),
        (keras.layers.ReLU(), ("relu", 0.0)),
        (keras.layers.ReLU(max_value=20), ("clipped_relu", 20.0)),
        (keras.layers.ReLU(max_value=20, negative_slope=0.1), None),
        (keras.layers.ReLU(threshold=1), None),
        ("elu", None),
        (lambda x: x, None),
    ],
)
def test_activations_are_recognised(activation, native):
    assert native_activation(keras.activations.get(activation)) == native


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_relu_layer_is_an_activation(kind):
    stock, sparse = twins(kind, 8, 12, activation=keras.layers.ReLU(max_value=0.5))
    assert_close(sparse(normal(2, 5, 8)), stock(normal(2, 5, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_loop_runs_when_it_can(kind, monkeypatch):
    calls = []
    run = layers.block_sparse_rnn
    monkeypatch.setattr(layers, "block_sparse_rnn", lambda *a, **k: calls.append(k["cell"]) or run(*a, **k))

    def fused(training=False, **options):
        calls.clear()
        twins(kind, 8, 12, **options)[1](normal(2, 5, 8), training=training)
        return calls

    assert len(fused()) == 1
    assert len(fused(dropout=0.5, training=True)) == 1
    assert len(fused(recurrent_dropout=0.5)) == 1
    assert not fused(recurrent_dropout=0.5, training=True)
    assert not fused(activation="elu")


# ---- weights and config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_keras_names_and_flat_values(kind):
    stock, sparse = twins(kind, 8, 12)
    assert [w.path.split("/", 1)[1] for w in sparse.weights] == [w.path.split("/", 1)[1] for w in stock.weights]
    assert sparse.cell.kernel_values.shape == sparse.cell.kernel_structure.values_shape
    assert sparse.cell.recurrent_kernel_values.shape == sparse.cell.recurrent_kernel_structure.values_shape
    np.testing.assert_array_equal(sparse.kernel.to_dense(), stock.cell.kernel)
    np.testing.assert_array_equal(sparse.recurrent_kernel.to_dense(), stock.cell.recurrent_kernel)
    assert sparse.supports_jit is False


@pytest.mark.parametrize("kind", [*KINDS, "Dense"])
def test_a_config_makes_the_same_layer(kind):
    options = {"use_bias": False, "kernel_regularizer": "l2", "name": "mine", "activation": "relu"}
    _, sparse = dense_twins(8, 12, **options) if kind == "Dense" else twins(kind, 8, 12, unroll=True, **options)
    again = type(sparse).from_config(sparse.get_config())
    assert again.get_config() == sparse.get_config()
    stock_config = {**sparse.get_config()}
    for name in sparse.matrices:
        assert BlockStructure.from_config(stock_config.pop(name)).values_shape == getattr(sparse, name).values.shape
    stock = keras.layers.Dense if kind == "Dense" else RECURRENT[kind][0]
    assert stock.from_config(stock_config).get_config() == stock_config


def test_an_initializer_fills_the_kept_blocks_with_what_it_would_put_there():
    initializer = keras.initializers.RandomNormal(seed=3)
    layer = BlockSparseGRU(12, kernel_initializer=initializer, recurrent_initializer="ones", **structures())
    layer.build((None, 3, 8))
    dense = np.asarray(keras.initializers.RandomNormal(seed=3)((8, 36)))
    mask = with_zero_blocks(np.ones((8, 36)), gates=3)
    np.testing.assert_array_equal(layer.kernel.to_dense(), dense * mask)
    np.testing.assert_array_equal(layer.recurrent_kernel.to_dense(), with_zero_blocks(np.ones((12, 36)), gates=3))
    assert layer.kernel_regularizer is None


def test_a_layer_can_be_built_inside_a_compiled_step():
    layer = BlockSparseGRU(12, **structures())
    model = keras.Sequential([layer, BlockSparseDense(4, kernel=structure(12, 4))])
    model.compile("sgd", "mse")
    model.fit(normal(4, 3, 8), normal(4, 4), verbose=0)
    assert layer.kernel.to_dense().any()


def test_l2_of_the_kept_blocks_is_l2_of_the_matrix():
    stock, sparse = twins("GRU", 8, 12, kernel_regularizer=keras.regularizers.L2(0.1), recurrent_regularizer="l1")
    assert_close(sparse.losses, stock.losses)


def test_fresh_layers_have_no_matrix_yet():
    with pytest.raises(AttributeError, match="no `kernel` before it is built"):
        _ = BlockSparseGRU(12, **structures()).kernel


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": structure(8, 36, 1)}, r"`kernel` must have 3 gate\(s\). Received: gates=1"),
        (
            {"kernel": structure(8, 24, 3)},
            r"`kernel` must have shape \(inputs, 36\) for units=12. Received: shape=\(8, 24\)",
        ),
        ({"recurrent_kernel": structure(8, 36, 3)}, r"`recurrent_kernel` must have shape \(12, 36\) for units=12"),
        ({"recurrent_kernel": structure(12, 36, 3, "int8")}, "same dtype. Received: float32 and int8"),
        ({"kernel_constraint": "max_norm"}, "MaxNorm looks at the whole matrix.*Received: kernel_constraint=MaxNorm"),
        ({"recurrent_regularizer": "orthogonal_regularizer"}, "recurrent_regularizer=OrthogonalRegularizer"),
        ({"use_cudnn": True}, "cuDNN has no block-sparse matrices"),
        ({"kernel": {"shape": [8, 36]}}, "Not the config of a block structure"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseGRU(12, **{**structures(), **change})


@pytest.mark.parametrize("layer_class", [BlockSparseGRU, BlockSparseGRUCell, BlockSparseSimpleRNN, BlockSparseDense])
def test_a_missing_structure_is_an_error_that_says_what_to_do(layer_class):
    with pytest.raises(TypeError, match=r"needs `kernel`: .*kbs.to_block_sparse.*Received: kernel=None"):
        layer_class(12)


def test_other_inputs_than_the_structure_has_are_an_error():
    with pytest.raises(ValueError, match=r"`kernel` of shape \(9, 36\). Received: a structure of shape \(8, 36\)"):
        BlockSparseGRU(12, **structures()).build((None, 3, 9))


def test_dense_refuses_what_would_make_it_dense():
    with pytest.raises(ValueError, match="no LoRA"):
        BlockSparseDense(12, kernel=structure(8, 12), lora_rank=2)
    layer = BlockSparseDense(12, kernel=structure(8, 12))
    layer.build((None, 8))
    with pytest.raises(ValueError, match="no LoRA"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="not quantized by Keras"):
        BlockSparseDense(12, kernel=structure(8, 12), dtype="int8_from_float32")
    with pytest.raises(NotImplementedError):
        layer.quantize("int8")


def test_a_short_layer_has_no_gradient_to_hand_on():
    _, sparse = twins("GRU", 8, 12, "int8")
    x = tf.constant(normal(2, 3, 8))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = sparse(x)
    with pytest.raises(ValueError, match="for inference and have no gradients"):
        tape.gradient(y, x)


def test_public_names():
    assert kbs.BlockSparseGRU is BlockSparseGRU
    assert keras.saving.get_registered_name(BlockSparseGRU) == "keras_blocksparse>BlockSparseGRU"
