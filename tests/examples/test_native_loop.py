"""Keras's layers trained on the package's native loop, against themselves in Keras's own loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from examples.common.fitting import pruned_layers
from examples.common.native import native_loop


def loss_and_gradients(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True) ** 3)
    return loss, *tape.gradient(loss, model.trainable_variables)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([keras.layers.GRU, keras.layers.LSTM, keras.layers.SimpleRNN]), st.integers(1, 40),
    st.integers(1, 40), st.integers(1, 5), st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_keras_own(cell, inputs, units, steps, backwards):
    model = keras.Sequential([keras.Input((steps, inputs)), cell(units, return_sequences=True, go_backwards=backwards)])
    x = np.random.default_rng(0).normal(size=(3, steps, inputs)).astype("float32")
    expected = loss_and_gradients(model, x)
    with native_loop(pruned_layers(model, None)):
        found = loss_and_gradients(model, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_pruning_goes_on_as_ever_and_the_layer_is_itself_afterwards():
    keras.utils.set_random_seed(0)
    rnn = keras.layers.SimpleRNN(16, activation=keras.layers.ReLU(max_value=20.0))
    model = keras.Sequential([keras.Input((5, 8)), keras.layers.Bidirectional(rnn), keras.layers.Dense(1)])
    kbs.prune_low_magnitude_block(
        model, kbs.ConstantSparsity(target_sparsity=0.75, begin_step=2), (4, 4), filters="rnn"
    )
    model.compile("adam", "mse")
    x, y = np.ones((16, 5, 8), "float32"), np.ones((16, 1), "float32")
    layers = pruned_layers(model, "rnn")
    assert [layer.name for layer in layers] == ["forward_simple_rnn", "backward_simple_rnn"]
    with native_loop(layers):
        model.fit(x, y, epochs=8, batch_size=4, verbose=0, callbacks=[kbs.UpdatePruningStep()])
        trained = model(x)
    assert kbs.sparsity(layers) == pytest.approx(0.75, abs=0.02)
    assert all(layer.inner_loop.__func__ is keras.layers.SimpleRNN.inner_loop for layer in layers)
    np.testing.assert_allclose(model(x), trained, rtol=1e-5)


@pytest.mark.parametrize(("arguments", "why"), [({"activation": "selu"}, "selu"), ({"recurrent_dropout": 0.5}, "0.5")])
def test_what_the_loop_cannot_train_is_refused(arguments, why):
    layer = keras.layers.GRU(4, name="gru", **arguments)
    layer.build((None, 3, 2))
    with pytest.raises(ValueError, match=f"gru cannot be trained on the native loop: .*{why}"), native_loop([layer]):
        pass
    assert "inner_loop" not in vars(layer)
