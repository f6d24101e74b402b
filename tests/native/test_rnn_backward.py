"""Gradients of whole sequences against those of stock Keras layers in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_blocksparse.sparse import set_num_threads
from tests.native.reference import RNN
from tests.native.test_rnn import GATES, LAYERS, weights

CELLS = [("gru", True), ("gru", False), ("simple_rnn", True), ("lstm", True)]
ACTIVATIONS = ["linear", "tanh", "sigmoid", "relu", "hard_sigmoid", "clipped_relu"]
LIMIT = 0.4  # of the clipped relu


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def keras_activation(name):
    return (lambda x: keras.activations.relu(x, max_value=LIMIT)) if name == "clipped_relu" else name


def keras_gradients(cell, x, dense, dy, dfinal, mask=None, initial_state=(), reset_after=True, activation="tanh",
                    recurrent_activation="sigmoid", **options):  # fmt: skip
    """Gradients of sum(y dy) + sum(final dfinal), by the names that RNN.backward uses; of the weights as matrices."""
    dense = [w.astype(np.float64) for w in dense if w is not None]
    units, count = dense[1].shape[0], 1 + (cell == "lstm")
    if cell != "simple_rnn":
        options["recurrent_activation"] = keras_activation(recurrent_activation)
    if cell == "gru":
        options["reset_after"] = reset_after
    layer = LAYERS[cell](
        units,
        activation=keras_activation(activation),
        use_bias=len(dense) == 3,
        return_state=True,
        dtype="float64",
        **options,
    )
    layer.build(x.shape)
    layer.set_weights(dense)
    x = tf.constant(x, tf.float64)
    states = [tf.constant(state, tf.float64) for state in initial_state]
    states = states or [tf.zeros((x.shape[0], units), tf.float64) for _ in range(count)]
    with tf.GradientTape() as tape:
        tape.watch([x, *states])
        outputs = layer(x, mask=None if mask is None else tf.constant(mask), initial_state=states)
        loss = tf.zeros([], tf.float64)
        for y, d in zip(outputs, [dy, *dfinal], strict=True):
            loss += 0 if d is None else tf.reduce_sum(y * d)
    names = ["x", *["initial_h", "initial_c"][:count], *["kernel", "recurrent", "bias"][: len(dense)]]
    sources = [x, *states, *(v.value for v in layer.trainable_variables)]
    gradients = tape.gradient(loss, sources, unconnected_gradients="zero")
    return dict(zip(names, (g.numpy() for g in gradients), strict=True))


def assert_near(got, expected, layer, tolerance=2e-5):
    assert set(got) == set(expected)
    for name, ours in got.items():
        theirs = expected[name]
        if name in ("kernel", "recurrent"):
            positions = getattr(layer, name).positions
            np.testing.assert_array_equal(ours[positions < 0], 0)
            theirs = np.where(positions < 0, 0, theirs.reshape(-1)[positions])
        scale = max(1, np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=name)


def check(cell, reset_after, dense, batch, steps, block_size=(4, 4), initial=True, keep_reserve=True, per_call=False,
          activation="tanh", recurrent_activation="sigmoid", mask=None, sequences=True, seed=7, without=(),
          **options):  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs, units, states = len(dense[0]), len(dense[1]), 1 + (cell == "lstm")
    x = normal(rng, batch, steps, inputs)
    initial_state = [normal(rng, batch, units) for _ in range(states)] if initial else []
    dy = normal(rng, batch, steps, units) if sequences else normal(rng, batch, units)
    dfinal = [normal(rng, batch, units) for _ in range(states)]
    dy, *dfinal = (None if i in without else d for i, d in enumerate([dy, *dfinal]))
    activations = {"reset_after": reset_after, "activation": activation, "recurrent_activation": recurrent_activation}
    options = {"return_sequences": sequences, **options}
    expected = keras_gradients(cell, x, dense, dy, dfinal, mask, initial_state, **activations, **options)
    layer = RNN(cell, *dense, **activations, limits=(LIMIT, LIMIT), block_size=block_size, per_call=per_call)
    reserve = layer.reserve(batch, steps) if keep_reserve else None
    options["reserve"] = reserve
    if keep_reserve:
        layer(x, mask, initial_state, **options)
        reserve.setflags(write=False)
        before = reserve.copy()
    got = layer.backward(x, mask, initial_state, dy=dy, dfinal=dfinal, **options)
    assert_near(got, expected, layer)
    if keep_reserve:
        np.testing.assert_array_equal(reserve, before)


def awkward_mask(rng, batch, steps):
    """Nothing, leading, trailing, both; the others at random."""
    mask = rng.random((batch, steps)) < 0.6
    mask[0] = False
    mask[1, : steps // 2] = False
    mask[1, steps // 2 :] = True
    mask[2, : steps // 2] = True
    mask[2, steps // 2 :] = False
    mask[3] = True
    mask[3, [0, -1]] = False
    return mask


@pytest.mark.parametrize("batch", [1, 6, 16, 33])
@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_every_instruction_set(isa, cell, reset_after, batch):
    check(cell, reset_after, weights(cell, 13, 26, (4, 4), reset_after), batch, 5)


@pytest.mark.parametrize("masking", ["none", "repeat", "zero"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_as_keras_does(cell, reset_after, masking, backwards, sequences):
    mask = None if masking == "none" else awkward_mask(np.random.default_rng(3), 6, 7)
    dense = weights(cell, 6, 10, (2, 2), reset_after)
    options = {"go_backwards": backwards, "zero_output_for_mask": masking == "zero"}
    check(cell, reset_after, dense, 6, 7, (2, 2), mask=mask, sequences=sequences, **options)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_steps_that_all_samples_skip(cell, reset_after, zero):
    mask = np.ones((6, 7), bool)
    mask[:, [0, 1, 4, 6]] = False
    dense = weights(cell, 6, 10, (2, 2), reset_after)
    check(cell, reset_after, dense, 6, 7, (2, 2), mask=mask, zero_output_for_mask=zero)
    check(cell, reset_after, dense, 6, 7, (2, 2), mask=np.zeros((6, 7), bool), zero_output_for_mask=zero)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_every_activation(cell, reset_after, activation):
    """Of the candidate and of the gates: each meets several others."""
    dense = weights(cell, 6, 9, (3, 3), reset_after)
    for i, recurrent in enumerate(ACTIVATIONS):
        if cell == "simple_rnn" and i:
            break
        check(cell, reset_after, dense, 4, 5, (3, 3), activation=activation, recurrent_activation=recurrent)


@settings(max_examples=200, derandomize=True)
@given(data=st.data())
def test_any_layer(data):
    # Gates that are no fractions let small differences grow with the steps: those have a test of their own.
    cell, reset_after = data.draw(st.sampled_from(CELLS))
    batch, steps = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    inputs, units = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block_size = data.draw(st.integers(1, min(17, inputs, units))), data.draw(st.integers(1, min(17, units)))
    seed = data.draw(st.integers(0, 1000))
    kernel, recurrent, bias = weights(cell, inputs, units, block_size, reset_after, seed)
    flags = {
        name: data.draw(st.booleans(), name)
        for name in ("initial", "keep_reserve", "per_call", "sequences", "go_backwards", "zero_output_for_mask")
    }
    mask = None
    if data.draw(st.booleans(), "masked"):
        mask = np.random.default_rng(seed).random((batch, steps)) < data.draw(st.sampled_from([0.2, 0.5, 0.8]))
    bias = bias if data.draw(st.booleans(), "bias") else None
    without = data.draw(st.sets(st.integers(0, 2), max_size=2), "without")
    check(
        cell, reset_after, (kernel, recurrent, bias), batch, steps, block_size, mask=mask, seed=seed, without=without,
        activation=data.draw(st.sampled_from(["tanh", "sigmoid"])), **flags,
    )  # fmt: skip


def gradients(layer, batch, steps, threads=0, keep_reserve=True, **options):
    """Of some call, the same for the same sizes."""
    rng = np.random.default_rng(8)
    x, dy = normal(rng, batch, steps, layer.kernel.shape[0]), normal(rng, batch, steps, layer.units)
    mask = rng.random((batch, steps)) < 0.8
    reserve = layer.reserve(batch, steps) if keep_reserve else None
    try:
        set_num_threads(1)
        if keep_reserve:
            layer(x, mask, reserve=reserve)
        set_num_threads(threads)
        return layer.backward(x, mask, dy=dy, reserve=reserve, **options)
    finally:
        set_num_threads(0)


@pytest.mark.parametrize("batch", [1, 8, 40, 70])
@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_threads_change_nothing(cell, reset_after, batch):
    kernel, recurrent, bias = weights(cell, 100, 800, (16, 16), reset_after)
    layer = RNN(cell, kernel, recurrent * np.float32(0.1), bias, reset_after, block_size=(16, 16))
    one = gradients(layer, batch, 6, threads=1)
    for _ in range(3):
        for name, got in gradients(layer, batch, 6).items():
            np.testing.assert_array_equal(got, one[name], err_msg=name)
    for name, got in gradients(layer, batch, 6, keep_reserve=False).items():
        scale = np.abs(one[name]).max()
        np.testing.assert_allclose(got, one[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_threads_share_what_is_reserved(cell, reset_after):
    """A run whose steps are shared between threads leaves the same reserve."""
    kernel, recurrent, bias = weights(cell, 100, 800, (16, 16), reset_after)
    layer = RNN(cell, kernel, recurrent * np.float32(0.1), bias, reset_after, block_size=(16, 16))
    rng = np.random.default_rng(9)
    x, mask = normal(rng, 8, 6, 100), rng.random((8, 6)) < 0.8
    mask[:, 2] = False
    reserves = []
    for threads in (1, 0):
        reserves.append(layer.reserve(8, 6))
        try:
            set_num_threads(threads)
            layer(x, mask, reserve=reserves[-1])
        finally:
            set_num_threads(0)
    np.testing.assert_allclose(reserves[0], reserves[1], atol=2e-5)


@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_a_reserve_does_not_change_the_run(cell, reset_after):
    layer = RNN(cell, *weights(cell, 13, 26, (4, 4), reset_after), reset_after)
    x = normal(np.random.default_rng(4), 5, 6, 13)
    for plain, reserving in zip(layer(x), layer(x, reserve=layer.reserve(5, 6)), strict=True):
        np.testing.assert_array_equal(plain, reserving)


@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
def test_what_is_not_wanted_is_left_out(cell, reset_after):
    layer = RNN(cell, *weights(cell, 13, 26, (4, 4), reset_after), reset_after)
    everything = gradients(layer, 5, 6)
    for name in everything:
        rest = gradients(layer, 5, 6, skip={name})
        assert set(rest) == set(everything) - {name}
        for other, got in rest.items():
            np.testing.assert_array_equal(got, everything[other])
    assert gradients(layer, 5, 6, skip=set(everything)) == {}


@pytest.mark.parametrize(("cell", "reset_after"), CELLS)
@pytest.mark.parametrize("keep_reserve", [False, True])
def test_no_samples_have_zero_gradients(cell, reset_after, keep_reserve):
    layer = RNN(cell, *weights(cell, 13, 26, (4, 4), reset_after), reset_after)
    for name, got in gradients(layer, 0, 6, keep_reserve=keep_reserve).items():
        np.testing.assert_array_equal(got, 0, err_msg=name)


def test_a_layer_may_get_its_bias_from_the_call_alone():
    layer = RNN("gru", *weights("gru", 6, 9, (3, 3)), block_size=(3, 3))
    per_call = RNN("gru", *weights("gru", 6, 9, (3, 3)), block_size=(3, 3), per_call=True)
    for name, got in gradients(per_call, 4, 5).items():
        np.testing.assert_array_equal(got, gradients(layer, 4, 5)[name])


@pytest.mark.parametrize("per_call", [False, True])
def test_matrices_may_have_no_blocks_at_all(per_call):
    kernel, recurrent, bias = weights("gru", 6, 9, (3, 3))
    check("gru", True, (0 * kernel, recurrent, bias), 4, 5, (3, 3), per_call=per_call)
    check("gru", True, (kernel, 0 * recurrent, bias), 4, 5, (3, 3), per_call=per_call)


def test_values_must_come_from_somewhere():
    layer = RNN("gru", *weights("gru", 6, 9, (3, 3)), block_size=(3, 3), per_call=True)
    layer.per_call = False  # the calls from here on bring nothing
    x = np.zeros((2, 3, 6), np.float32)
    with pytest.raises(ValueError, match="structure without values"):
        layer(x)
    layer.bias = None
    with pytest.raises(ValueError, match="structure without values"):
        layer.backward(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_only_float32_has_gradients(dtype):
    layer = RNN("gru", *weights("gru", 6, 9, (3, 3)), block_size=(3, 3), dtype=dtype)
    x = np.zeros((2, 3, 6), np.float32)
    with pytest.raises(RuntimeError, match="float32"):
        layer.reserve(2, 3)
    with pytest.raises(RuntimeError, match="float32"):
        layer(x, reserve=np.zeros(10**4, np.float32))
    with pytest.raises(RuntimeError, match="float32"):
        layer.backward(x)


def test_what_makes_no_sense_is_refused():
    kernel, recurrent, bias = weights("gru", 6, 9, (3, 3))
    x = np.zeros((2, 3, 6), np.float32)
    layer = RNN("gru", kernel, recurrent, block_size=(3, 3))
    layer.bias = bias
    with pytest.raises(ValueError, match="without a bias"):
        layer.backward(x)
    layer = RNN("gru", kernel, recurrent, bias, block_size=(3, 3))
    state = np.zeros((2, 9), np.float32)
    with pytest.raises(ValueError, match="only an LSTM"):
        layer.backward(x, dfinal=[state, state])
    with pytest.raises(ValueError, match="only an LSTM"):
        layer.backward(x, None, [state, state])
    for batch, steps in ((-1, 3), (2, 0), (2**40, 2**40)):
        with pytest.raises(ValueError, match="samples"):
            layer.reserve(batch, steps)
    assert GATES["gru"] * 9 == kernel.shape[1]
