"""Keras's layers trained on the package's native loop, against themselves in Keras's own loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from examples.common.fitting import _LeaveOutZeros, pruned_layers
from examples.common.native import _Packing, native_loop
from keras_blocksparse.sparse import BlockSparseMatrix, BlockStructure


def loss_and_gradients(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True) ** 3)
    return loss, *tape.gradient(loss, model.trainable_variables)


@settings(max_examples=12)
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
    with keras.saving.custom_object_scope({"ReLU": keras.layers.ReLU}):  # for Keras before 3.10
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


@pytest.mark.parametrize("cell", [keras.layers.GRU, keras.layers.LSTM, keras.layers.SimpleRNN])
def test_leaving_out_zeros_changes_only_gradients_of_zeros(cell):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6, 10)), cell(24, return_sequences=True)])
    kbs.prune_low_magnitude_block(model, kbs.ConstantSparsity(target_sparsity=0.75, begin_step=0), (8, 4))
    kbs.Pruner(model).prune_now(0.75)
    x = np.random.default_rng(0).normal(size=(3, 6, 10)).astype("float32")
    expected_loss, *expected = loss_and_gradients(model, x)
    with native_loop(model.layers) as loops:
        loops[0].leave_out_zeros()
        loss, *found = loss_and_gradients(model, x)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for gradient, whole, weight in zip(found, expected, model.trainable_variables, strict=True):
        kept = np.asarray(weight) != 0 if "kernel" in weight.name else True
        np.testing.assert_allclose(gradient, np.where(kept, whole, 0), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.data())
def test_packing_keeps_every_element_of_the_kept_blocks(rows, columns, gates, data):
    shape = rows, columns * gates
    block = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    kept = np.random.default_rng(0).random(kbs.BlockGrid(shape, block, gates).grid_shape) < 0.5
    structure = BlockStructure(shape, block, gates, "float32", kept)
    weight = np.random.default_rng(1).normal(size=shape).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch(w := tf.constant(weight))
        values = _Packing(w, structure).values(w)
        loss = tf.reduce_sum(values**2)
    dense = BlockSparseMatrix.from_values(structure, values.numpy()).to_dense()
    np.testing.assert_array_equal(dense, BlockSparseMatrix.from_dense(weight, block, gates, keep=kept).to_dense())
    np.testing.assert_array_equal(tape.gradient(loss, w), 2 * dense)


def test_zeros_are_left_out_when_masks_move_no_more():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 16)), keras.layers.GRU(16, name="gru")])
    schedule = kbs.PolynomialDecay(final_sparsity=0.75, begin_step=2, end_step=6, frequency=2)
    kbs.prune_low_magnitude_block(model, schedule, (4, 4))
    model.compile("adam", "mse")
    x, y = np.random.default_rng(0).normal(size=(16, 5, 16)), np.ones((16, 16))
    kept = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept.append([packing.structure.keep.mean() for packing in loops[0]._packings])

    with native_loop(model.layers) as loops:
        callbacks = [kbs.UpdatePruningStep(), _LeaveOutZeros(loops), Look()]
        model.fit(x, y, epochs=3, batch_size=4, verbose=0, callbacks=callbacks)
    assert kept == [[1, 1], [1, 1], [0.25, 0.25]]
    assert kbs.sparsity(model) == 0.75


@pytest.mark.parametrize(("arguments", "why"), [({"activation": "selu"}, "selu"), ({"recurrent_dropout": 0.5}, "0.5")])
def test_what_the_loop_cannot_train_is_refused(arguments, why):
    layer = keras.layers.GRU(4, name="gru", **arguments)
    layer.build((None, 3, 2))
    with pytest.raises(ValueError, match=f"gru cannot be trained on the native loop: .*{why}"), native_loop([layer]):
        pass
    assert "inner_loop" not in vars(layer)
