"""After every batch from begin_step on, in the model and in every checkpoint: the scheduled sparsity, gate by gate.

Each case is one way of building or training a model. The same watcher stands before and after `UpdatePruningStep` in
the list of callbacks, and each of both also writes a checkpoint after every batch and looks into the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from _helpers import (
    BLOCK_SIZES,
    GATES,
    Watch,
    assert_sparsity,
    pruned_weights,
    read_arrays,
    scheduled,
    sequence_data,
    updates,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import keras_blocksparse as kbs

BLOCK = (4, 4)
STEPS = 8  # of two epochs with four batches each
SCHEDULE = kbs.PolynomialDecay(initial_sparsity=0.25, final_sparsity=0.75, begin_step=2, end_step=7, frequency=2)


def data(features: int = 8) -> tuple[np.ndarray, np.ndarray]:
    return sequence_data(samples=32, steps=4, features=features)


def train(
    model: Any, folder: Path, count: int | None, *, schedule: Any = SCHEDULE, block: tuple[int, int] = BLOCK,
    inputs: Any = None, targets: Any = None, ahead: int = 0, callbacks: tuple = (), optimizer: Any = None,
    epochs: int = 2, compiled: bool = False, **how: Any,
) -> list[tuple[int, float]]:  # fmt: skip
    """Compiles and fits under two watchers; returns what the one before `UpdatePruningStep` has seen."""
    x, y = data()
    x = x if inputs is None else inputs
    y = y if targets is None else targets
    if not compiled:
        model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), "mse", **how)
    watchers = []
    for name in ("before", "after"):
        (folder / name).mkdir(exist_ok=True)
        watchers.append(Watch(schedule, block, folder / name, count, ahead))
    before, after = watchers
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Keras 3.5, where an execution is longer than what is left of the epoch
        warnings.filterwarnings("ignore", "Your input ran out of data")
        model.fit(
            x, y, batch_size=8, epochs=epochs, verbose=0, shuffle=False,
            callbacks=[before, *callbacks, kbs.UpdatePruningStep(), after],
        )  # fmt: skip
    assert before.seen == after.seen
    assert before.seen, "the watchers saw nothing"
    return before.seen


def rnn_model(layer: Any, features: int = 8, **input_options: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4, features), **input_options), layer, layers.Dense(3, name="head")])


def pruned(model: Any, filters: Any = None, **options: Any) -> Any:
    """Prunes all but the head, whose 3 units are smaller than a block."""
    filters = filters or (lambda layer: layer.name != "head")
    return kbs.prune_low_magnitude_block(model, SCHEDULE, BLOCK, filters=filters, **options)


# ---- kinds of layers


class Encoder(keras.Model):
    """A subclassed model with a nested layer that holds layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = layers.Dense(3, name="head")

    def call(self, x: Any) -> Any:
        return self.head(self.block(x))


class Block(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = layers.GRU(12, return_sequences=True)
        self.parts = [layers.Dense(8), layers.LSTM(8)]

    def call(self, x: Any) -> Any:
        return self.parts[1](self.parts[0](self.rnn(x)))


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((4, 8)), layers.GRU(12, return_sequences=True), layers.Dense(8)])
    innermost = keras.Sequential([keras.Input((4, 8)), layers.SimpleRNN(8)])
    x = keras.Input((4, 8))
    return keras.Model(x, layers.Dense(3, name="head")(innermost(inner(x))))


def shared() -> keras.Model:
    gru, x = layers.GRU(8, return_sequences=True), keras.Input((4, 8))
    return keras.Model(x, layers.Dense(3, name="head")(layers.Flatten()(gru(gru(x)))))


def with_initial_state() -> keras.Model:
    x = keras.Input((4, 8))
    state = layers.Dense(12)(layers.GlobalAveragePooling1D()(x))
    y, *states = layers.LSTM(12, return_sequences=True, return_state=True)(x, initial_state=[state, state])
    return keras.Model(x, layers.Dense(3, name="head")(layers.LSTM(12)(y, initial_state=states)))


KINDS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "GRU": (lambda: rnn_model(layers.GRU(12)), 2),
    "GRU without reset_after": (lambda: rnn_model(layers.GRU(12, reset_after=False)), 2),
    "SimpleRNN": (lambda: rnn_model(layers.SimpleRNN(12)), 2),
    "LSTM": (lambda: rnn_model(layers.LSTM(12)), 2),
    "ragged GRU": (lambda: rnn_model(layers.GRU(10), features=8), 2),
    "Bidirectional": (lambda: rnn_model(layers.Bidirectional(layers.GRU(12))), 4),
    "Bidirectional of two kinds": (
        lambda: rnn_model(
            layers.Bidirectional(layers.LSTM(12), backward_layer=layers.GRU(12, go_backwards=True), merge_mode="concat")
        ),
        4,
    ),
    "TimeDistributed": (
        lambda: keras.Sequential(
            [
                keras.Input((4, 8)),
                layers.TimeDistributed(layers.Dense(8)),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3, name="head"),
            ]
        ),
        1,
    ),
    "RNN of cells": (
        lambda: rnn_model(layers.RNN([layers.GRUCell(12), layers.LSTMCell(8), layers.SimpleRNNCell(8)])),
        6,
    ),
    "RNN of one cell": (lambda: rnn_model(layers.RNN(layers.GRUCell(12))), 2),
    "RNN of StackedRNNCells": (lambda: rnn_model(layers.RNN(layers.StackedRNNCells([layers.GRUCell(8)] * 1))), 2),
    "nested models": (nested, 5),
    "shared layer": (shared, 2),
    "initial_state": (with_initial_state, 5),
    "masking": (
        lambda: keras.Sequential([keras.Input((4, 8)), layers.Masking(), layers.GRU(12), layers.Dense(3, name="head")]),
        2,
    ),
    "stateful": (lambda: rnn_model(layers.GRU(12, stateful=True), batch_size=8), 2),
    "subclassed, built": (lambda: build(Encoder()), 5),
    "subclassed, not built": (Encoder, 5),
    "Sequential, not built": (lambda: keras.Sequential([layers.GRU(12), layers.Dense(3, name="head")]), 2),
    "EinsumDense and attention": (
        lambda: attention_model(),
        6,
    ),
    "unrolled": (lambda: rnn_model(layers.GRU(12, unroll=True)), 2),
    "return_sequences twice": (
        lambda: keras.Sequential(
            [keras.Input((4, 8)), layers.GRU(8, return_sequences=True), layers.GRU(12), layers.Dense(3, name="head")]
        ),
        4,
    ),
}


def build(model: keras.Model) -> keras.Model:
    model(data()[0][:1])
    return model


def attention_model() -> keras.Model:
    x = keras.Input((4, 8))
    y = layers.MultiHeadAttention(2, 4)(x, x)
    y = layers.EinsumDense("abc,cd->abd", output_shape=(None, 8))(y)
    y = layers.Dense(8)(layers.GlobalAveragePooling1D()(y))
    return keras.Model(x, layers.Dense(3, name="head")(y))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers(kind, tmp_path):
    make, count = KINDS[kind]
    model = pruned(make())
    steps = [step for step, _ in train(model, tmp_path, count)]
    assert steps == list(range(2, STEPS + 1))


@pytest.mark.parametrize("kind", ["subclassed, not built", "Sequential, not built"])
@pytest.mark.parametrize("begin", [0, 1])
def test_a_model_that_is_not_built_is_sparse_after_its_first_batch(kind, begin, tmp_path):
    make, count = KINDS[kind]
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=begin, frequency=1)
    model = kbs.prune_low_magnitude_block(make(), schedule, BLOCK, filters=lambda layer: layer.name != "head")
    assert train(model, tmp_path, count, schedule=schedule)[0] == (1, 0.5)


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("kind", GATES)
def test_block_sizes(kind, block, tmp_path):
    # No block but 1x1 divides these sizes, and gates end inside of blocks; 32x32 needs more than 37 for its half block.
    features, units = (66, 70) if block == (32, 32) else (34, 37)
    model = rnn_model(getattr(layers, kind)(units), features=features)
    kbs.prune_low_magnitude_block(model, SCHEDULE, block, filters="rnn|gru|lstm")
    x = np.random.default_rng(0).normal(size=(32, 4, features)).astype("float32")
    train(model, tmp_path, 2, block=block, inputs=x)


# ---- ways of training

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: keras.optimizers.SGD(0.05),
    "Nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "RMSprop with clipping": lambda: keras.optimizers.RMSprop(0.01, global_clipnorm=1.0),
    "Lion": lambda: keras.optimizers.Lion(0.001),
    "EMA": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "EMA that overwrites every batch": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=1),
    "EMA that overwrites": lambda: keras.optimizers.SGD(
        0.05, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "EMA inside loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01, use_ema=True)),
}


@pytest.mark.parametrize(
    ("name", "revival"), [*((name, True) for name in OPTIMIZERS), ("SGD", False), ("AdamW", False), ("EMA", False)]
)
def test_optimizers(name, revival, tmp_path):
    model = pruned(rnn_model(layers.GRU(12)), revival=revival)
    train(model, tmp_path, 2, optimizer=OPTIMIZERS[name]())
    for variable, gates in pruned_weights(model):  # an EMA is written to the weights when training has ended
        assert_sparsity(variable, BLOCK, 0.75, gates)


@pytest.mark.parametrize(
    "how",
    [{"run_eagerly": True}, {"jit_compile": True}, {"jit_compile": False}, {"steps_per_execution": 2}],
    ids=lambda how: "{}={}".format(*next(iter(how.items()))),
)
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_ways_of_running_a_step(kind, how, tmp_path):
    model = pruned(KINDS[kind][0]())
    seen = train(model, tmp_path, 2, **how)
    assert [step for step, _ in seen] == list(range(2, STEPS + 1, how.get("steps_per_execution", 1)))


@pytest.mark.parametrize("per_execution", [3, 4, 5])
def test_executions_that_do_not_divide_the_epoch(per_execution, tmp_path):
    # 4 batches an epoch: the last execution of an epoch is shorter than the others
    model = pruned(rnn_model(layers.GRU(12)))
    train(model, tmp_path, 2, steps_per_execution=per_execution)
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.75, gates)


def test_an_ema_with_an_unbuilt_model(tmp_path):
    model = pruned(Encoder())
    train(model, tmp_path, 5, optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=2))


@pytest.mark.parametrize("swap_on_epoch", [True, False])
def test_swapping_ema_weights_in_and_out(swap_on_epoch, tmp_path):
    model = pruned(rnn_model(layers.GRU(12)))
    seen = []

    class EpochEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            step = updates(self.model)
            for variable, gates in pruned_weights(self.model):
                assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, step), gates, note=f"epoch {epoch}")
            seen.append(step)

    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    train(
        model, tmp_path, 2, optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8),
        callbacks=(swap, EpochEnd()),
    )  # fmt: skip
    assert seen == [4, 8]
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.75, gates)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "EMA"])
def test_gradient_accumulation(name, tmp_path):
    optimizer = OPTIMIZERS[name]()
    optimizer = type(optimizer).from_config({**optimizer.get_config(), "gradient_accumulation_steps": 2})
    model = pruned(rnn_model(layers.GRU(12)))
    # 16 batches are 8 steps. Masks move with the first batch of an update, before the weights do.
    seen = train(model, tmp_path, 2, optimizer=optimizer, epochs=4, ahead=1)
    assert seen[-1][0] == STEPS
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.75, gates)


@pytest.mark.parametrize(
    ("policy", "revival"),
    [
        ("mixed_float16", True),
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        ("mixed_bfloat16", False),
        ("float16", True),
        ("bfloat16", True),
        ("float64", True),
    ],
)
def test_dtypes(policy, revival, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        # Keras cannot draw an orthogonal matrix in bfloat16
        model = pruned(rnn_model(layers.GRU(12, recurrent_initializer="glorot_uniform")), revival=revival)
    finally:
        keras.config.set_dtype_policy("float32")
    train(model, tmp_path, 2, optimizer=keras.optimizers.SGD(0.01))
    assert {v.dtype for v, _ in pruned_weights(model)} == {
        policy.removeprefix("mixed_") if "mixed" not in policy else "float32"
    }


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        (keras.constraints.MaxNorm(0.3), lambda w: (np.linalg.norm(w, axis=0) < 0.3 + 1e-5).all()),
        (keras.constraints.NonNeg(), lambda w: (w >= 0).all()),
    ],
)
@pytest.mark.parametrize("revival", [True, False])
def test_a_constraint_of_the_users_own_holds_beside_ours(constraint, holds, revival, tmp_path):
    layer = layers.GRU(12, kernel_constraint=constraint, recurrent_constraint=constraint)
    model = pruned(rnn_model(layer), revival=revival)

    class Holds(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            assert all(holds(variable.numpy()) for variable, _ in pruned_weights(self.model))

    train(model, tmp_path, 2, callbacks=(Holds(),))
    kbs.strip_pruning(model)
    assert model.layers[0].cell.kernel.constraint is model.layers[0].cell.kernel_constraint
    assert type(model.layers[0].cell.kernel.constraint) is type(constraint)


@pytest.mark.parametrize("lasso", [0.01, kbs.GroupLassoRegularizer(0.01, BLOCK, off_at_end=False)])
@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": True}, {}])
def test_with_group_lasso(lasso, how, tmp_path):
    train(pruned(rnn_model(layers.GRU(12)), group_lasso=lasso), tmp_path, 2, **how)


@pytest.mark.parametrize("score", ["max", "mean", "l2", lambda blocks: np.abs(blocks).sum(axis=(1, 2))])
def test_scores(score, tmp_path):
    train(pruned(rnn_model(layers.GRU(12)), score=score), tmp_path, 2)


def test_a_dataset_of_unknown_length(tmp_path):
    x, y = data()

    def batches():
        for start in range(0, 32, 8):
            yield x[start : start + 8], y[start : start + 8]

    signature = (tf.TensorSpec((None, 4, 8)), tf.TensorSpec((None, 3)))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    model = pruned(rnn_model(layers.GRU(12)))
    model.compile("sgd", "mse")
    watch = Watch(SCHEDULE, BLOCK, tmp_path, 2)
    model.fit(dataset, epochs=2, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert len(watch.seen) == 7


def test_a_frozen_layer_is_pruned_and_else_left_as_it_is():
    model = rnn_model(layers.GRU(12))
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    pruned(model).compile("sgd", "mse")
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    for old, variable in zip(before[:2], model.layers[0].weights[:2], strict=True):
        assert_sparsity(variable, BLOCK, 0.75, 3)
        np.testing.assert_array_equal(variable.numpy(), old * (variable.numpy() != 0))


def test_keras_own_checkpoints_before_and_after_are_sparse(tmp_path):
    # tfmot's suite holds that checkpoints are NOT sparse (its issue #206). Ours are, each of them.
    model = pruned(rnn_model(layers.GRU(12)))
    model.compile("adam", "mse")
    x, y = data()
    save = [
        keras.callbacks.ModelCheckpoint(
            tmp_path / (name + "-{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=1
        )
        for name in ("before", "after")
    ]
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[save[0], kbs.UpdatePruningStep(), save[1]])
    files = sorted(tmp_path.glob("*.h5"))
    assert len(files) == 2 * STEPS
    for file in files:
        epoch, batch = (int(number) for number in file.name.split(".")[0].split("-")[1:])
        step = (epoch - 1) * 4 + batch
        arrays = [a for a in read_arrays(file) if a.shape in {(8, 36), (12, 36)}]
        kernels = [a for a in arrays if abs(a).max() > 0.1]
        assert len(arrays) == 6, "two weights and two moments of Adam for each"
        assert len(kernels) >= 2
        if step >= 2:
            sparse = 0
            for array in arrays:
                try:
                    assert_sparsity(array, BLOCK, scheduled(SCHEDULE, step), 3)
                    sparse += 1
                except AssertionError:
                    continue
            assert sparse >= 2, file.name


# ---- training again


def test_a_second_fit_without_compiling_goes_on(tmp_path):
    model = pruned(rnn_model(layers.GRU(12)))
    model.compile("sgd", "mse")
    x, y = data()
    with pytest.warns(UserWarning, match=r"end_step=7.*ends at step 4"):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, 4), gates)
    seen = train(model, tmp_path, 2, compiled=True, epochs=1)
    assert [step for step, _ in seen] == [5, 6, 7, 8]
    assert train(model, tmp_path, 2, compiled=True, epochs=1)[-1] == (12, 0.75)


def test_pruning_after_a_fit_without_compiling_is_seen(tmp_path):
    model = rnn_model(layers.GRU(12))
    model.compile("sgd", "mse")
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0)
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=5, frequency=1)
    kbs.prune_low_magnitude_block(model, schedule, BLOCK, filters="gru")
    seen = train(model, tmp_path, 2, compiled=True, schedule=schedule)
    assert [step for step, _ in seen] == list(range(5, 13))


def test_pruning_a_layer_after_a_fit_without_compiling_is_seen(tmp_path):
    model = rnn_model(layers.GRU(12))
    model.compile("sgd", "mse")
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0)
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=5, frequency=1)
    kbs.prune_low_magnitude_block(model.layers[0], schedule, BLOCK)
    train(model, tmp_path, 2, compiled=True, schedule=schedule)


def test_pruning_anew_between_two_fits_is_seen(tmp_path):
    model = pruned(rnn_model(layers.GRU(12)))
    train(model, tmp_path, 2)
    schedule = kbs.ConstantSparsity(target_sparsity=0.9, begin_step=9, frequency=1)
    kbs.prune_low_magnitude_block(model, schedule, (2, 2), filters="gru")
    train(model, tmp_path, 2, compiled=True, schedule=schedule, block=(2, 2))


def test_training_on_after_stripping_fills_the_zeros(tmp_path):
    model = pruned(rnn_model(layers.GRU(12)))
    train(model, tmp_path, 2)
    kbs.strip_pruning(model)
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0)
    assert (model.layers[0].cell.kernel.numpy() == 0).mean() < 0.1


def test_fits_without_the_callback_keep_the_masks_and_warn_once():
    model = pruned(rnn_model(layers.GRU(12)))
    kbs.Pruner(model).prune_now(0.5)
    model = keras.models.clone_model(model)
    model.compile("sgd", "mse")
    x, y = data()
    with pytest.warns(UserWarning, match=r"nothing moves its mask.*UpdatePruningStep"):
        model.fit(x, y, batch_size=8, verbose=0)


# ---- loops of one's own


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_loop_with_a_tape(compiled, with_optimizer):
    model = pruned(rnn_model(layers.GRU(12)))
    optimizer = keras.optimizers.Adam(0.01)
    pruner = kbs.Pruner(model, optimizer) if with_optimizer else kbs.Pruner(model)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    run = tf.function(step) if compiled else step
    x, y = data()
    for number in range(1, 11):
        run(x[:8], y[:8])
        for variable, gates in pruned_weights(model):  # before the masks move, they hold
            assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, number - 1), gates, note=number)
        pruner.step()
        assert pruner.iterations == number
        for variable, gates in pruned_weights(model):
            assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, number), gates, note=number)


def test_a_loop_that_updates_weights_itself():
    # No optimizer, so no constraint is called: step() must bring the weights to their masks every time.
    model = pruned(rnn_model(layers.SimpleRNN(12)))
    pruner, (x, y) = kbs.Pruner(model), data()
    for number in range(1, 11):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x[:8]) - y[:8]))
        for variable, gradient in zip(
            model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
        ):
            variable.assign_sub(0.05 * gradient)
        pruner.step()
        for variable, gates in pruned_weights(model):
            assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, number), gates, note=number)


def test_train_on_batch_with_a_pruner():
    model = pruned(rnn_model(layers.GRU(12)))
    model.compile("adam", "mse")
    pruner, (x, y) = kbs.Pruner(model), data()
    for number in range(1, 11):
        model.train_on_batch(x[:8], y[:8])
        pruner.step()
        for variable, gates in pruned_weights(model):
            assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, number), gates, note=number)


def test_steps_may_be_told_and_skipped():
    model = pruned(rnn_model(layers.GRU(12)))
    pruner = kbs.Pruner(model)
    for number in (1, 4, 5, 100):
        pruner.step(number)
        for variable, gates in pruned_weights(model):
            assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, number), gates, note=number)


# ---- anything else


@settings(max_examples=8, derandomize=True)
@given(
    kind=st.sampled_from(sorted(GATES)), units=st.integers(4, 21), features=st.integers(4, 21),
    block=st.sampled_from([b for b in BLOCK_SIZES if max(b) <= 4] + [(3, 2), (2, 4)]),
    final=st.floats(0.1, 0.95), begin=st.integers(0, 3), length=st.integers(0, 4), frequency=st.integers(1, 5),
    revival=st.booleans(),
)  # fmt: skip
def test_anything(kind, units, features, block, final, begin, length, frequency, revival):
    schedule = kbs.PolynomialDecay(
        initial_sparsity=final / 2, final_sparsity=final, begin_step=begin, end_step=begin + length, frequency=frequency
    )
    model = rnn_model(getattr(layers, kind)(units), features=features)
    kbs.prune_low_magnitude_block(model, schedule, block, filters=lambda layer: layer.name != "head", revival=revival)
    x, y = data(features)
    watch = Watch(schedule, block, count=2)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert watch.seen[-1][0] == STEPS
