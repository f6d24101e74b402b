"""Whole sequences against stock Keras layers and a float64 loop."""

import keras
import numpy as np
import pytest

from keras_blocksparse.sparse import set_num_threads
from tests.native.reference import RNN, pruned, rnn_loop

GATES = {"simple_rnn": 1, "gru": 3, "lstm": 4}
LAYERS = {"simple_rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}


def weights(cell, inputs, units, block_size=(4, 4), reset_after=True, seed=0):
    rng, gates = np.random.default_rng(seed), GATES[cell]
    shape = (2, gates * units) if cell == "gru" and reset_after else (gates * units,)
    return (
        pruned(rng, inputs, gates * units, block_size, gates, 0.5) * np.float32(0.3),
        pruned(rng, units, gates * units, block_size, gates, 0.5) * np.float32(0.3),
        (0.3 * rng.standard_normal(shape)).astype(np.float32),
    )


@pytest.mark.parametrize("batch", [1, 3, 8, 33])
@pytest.mark.parametrize(("cell", "reset_after"), [("gru", True), ("gru", False), ("simple_rnn", True), ("lstm", True)])
def test_every_instruction_set_against_a_float64_loop(isa, cell, reset_after, batch):
    rng = np.random.default_rng(1)
    kernel, recurrent, bias = weights(cell, 13, 26, (4, 4), reset_after)
    x = rng.standard_normal((batch, 37, 13)).astype(np.float32)
    states = [rng.standard_normal((batch, 26)).astype(np.float32) for _ in range(1 + (cell == "lstm"))]
    got = RNN(cell, kernel, recurrent, bias, reset_after)(x, initial_state=states)
    expected = rnn_loop(cell, x, kernel, recurrent, bias, reset_after, *states)
    for ours, theirs in zip(got, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_short_dtypes_stay_near(isa):
    kernel, recurrent, bias = weights("gru", 40, 48, (8, 8))
    x = np.random.default_rng(2).standard_normal((6, 20, 40)).astype(np.float32)
    exact = RNN("gru", kernel, recurrent, bias, block_size=(8, 8))(x)[0]
    for dtype, tolerance in (("bfloat16", 0.02), ("int8", 0.06)):
        got = RNN("gru", kernel, recurrent, bias, block_size=(8, 8), dtype=dtype)(x)[0]
        assert np.abs(got - exact).max() < tolerance
        assert np.abs(got - exact).max() > 0


@pytest.mark.parametrize("masking", ["none", "repeat", "zero"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(("cell", "reset_after"), [("gru", True), ("gru", False), ("simple_rnn", True), ("lstm", True)])
def test_as_keras_does(cell, reset_after, masking, initial, backwards, sequences):
    masked, zero = masking != "none", masking == "zero"
    rng = np.random.default_rng(3)
    kernel, recurrent, bias = weights(cell, 6, 10, (2, 2), reset_after)
    options = {"reset_after": reset_after} if cell == "gru" else {}
    layer = LAYERS[cell](
        10, return_sequences=sequences, return_state=True, go_backwards=backwards, zero_output_for_mask=zero, **options
    )
    x = rng.standard_normal((5, 7, 6)).astype(np.float32)
    layer.build(x.shape)
    layer.set_weights([kernel, recurrent, bias])
    mask = rng.random((5, 7)) < 0.6 if masked else None
    if masked:
        mask[0] = False
        mask[1, :3] = False
        mask[2, 4:] = False
    states = [rng.standard_normal((5, 10)).astype(np.float32) for _ in range(1 + (cell == "lstm"))] if initial else []
    expected = layer(x, mask=mask, initial_state=states or None)
    got = RNN(cell, kernel, recurrent, bias, reset_after, block_size=(2, 2))(
        x, mask, states, backwards, sequences, zero
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("activation", ["linear", "relu", "hard_sigmoid", "sigmoid"])
@pytest.mark.parametrize("recurrent_activation", ["hard_sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_other_activations_as_keras_does(cell, activation, recurrent_activation):
    kernel, recurrent, bias = weights(cell, 6, 9, (3, 3))
    layer = LAYERS[cell](9, return_sequences=True, activation=activation, recurrent_activation=recurrent_activation)
    x = np.random.default_rng(4).standard_normal((4, 5, 6)).astype(np.float32)
    layer.build(x.shape)
    layer.set_weights([kernel, recurrent, bias])
    got = RNN(cell, kernel, recurrent, bias, True, activation, recurrent_activation, block_size=(3, 3))(x)[0]
    np.testing.assert_allclose(got, layer(x), atol=2e-5, rtol=1e-4)


def test_a_clipped_relu_is_clipped():
    kernel, recurrent, bias = weights("simple_rnn", 6, 9, (3, 3))
    x = 10 * np.random.default_rng(4).standard_normal((4, 5, 6)).astype(np.float32)
    got = RNN("simple_rnn", kernel, recurrent, bias, activation="clipped_relu", limits=(2.0, 0.0))(x)[0]
    assert got.min() == 0
    assert got.max() == 2


def test_no_bias_is_a_bias_of_zeros():
    kernel, recurrent, bias = weights("gru", 6, 9, (3, 3))
    x = np.random.default_rng(4).standard_normal((4, 5, 6)).astype(np.float32)
    with_zeros = RNN("gru", kernel, recurrent, 0 * bias)(x)[0]
    np.testing.assert_array_equal(RNN("gru", kernel, recurrent)(x)[0], with_zeros)


@pytest.mark.parametrize("batch", [1, 8, 40, 70])
@pytest.mark.parametrize(("cell", "reset_after"), [("gru", True), ("gru", False), ("simple_rnn", True), ("lstm", True)])
def test_threads_change_nothing(cell, reset_after, batch):
    """Large enough that steps (or the batch) are shared between threads."""
    rng = np.random.default_rng(5)
    gates, units = GATES[cell], 800
    kernel, recurrent, bias = weights(cell, 100, units, (16, 16), reset_after)
    recurrent *= np.float32(0.1)
    layer = RNN(cell, kernel, recurrent, bias, reset_after, block_size=(16, 16))
    x = rng.standard_normal((batch, 12, 100)).astype(np.float32)
    mask = rng.random((batch, 12)) < 0.8
    try:
        set_num_threads(1)
        one = layer(x, mask)
        set_num_threads(0)
        for _ in range(3):
            for ours, theirs in zip(layer(x, mask), one, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=2e-5)
    finally:
        set_num_threads(0)
    assert gates * units == layer.recurrent.shape[1]


def test_what_does_not_fit_is_refused():
    kernel, recurrent, bias = weights("gru", 6, 9, (3, 3))
    with pytest.raises(ValueError, match="do not make a layer"):
        RNN("gru", kernel, recurrent[:6], bias, block_size=(3, 3))
    layer = RNN("gru", kernel, recurrent, bias, block_size=(3, 3))
    with pytest.raises(ValueError, match="0 steps"):
        layer(np.zeros((1, 0, 6), np.float32))
    assert layer(np.zeros((0, 3, 6), np.float32))[0].shape == (0, 3, 9)
