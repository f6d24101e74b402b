"""What PruningSummaries writes, read back from the event files."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from _helpers import ROOT, value_of
from keras import layers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import keras_blocksparse as kbs

BATCH = 8


def make_model(schedule, steps_per_execution=1, **kwargs):
    model = keras.Sequential([keras.Input((4, 16)), layers.GRU(16, name="gru"), layers.Dense(3, name="head")])
    kbs.prune_low_magnitude_block(model, schedule, block_size=(4, 4), filters="gru", **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, steps_per_execution=steps_per_execution)
    return model


def fit(model, callbacks, epochs=2, steps=6):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * BATCH, 4, 16)).astype("float32")
    y = rng.integers(0, 3, steps * BATCH)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=callbacks)


def read(log_dir):
    """Steps and values of each tag."""
    events = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


class Watch(keras.callbacks.Callback):
    """Notes zeros of each gate, thresholds and lambdas after every execution."""

    def __init__(self, update):
        super().__init__()
        self.update, self.zeros, self.thresholds, self.strengths = update, {}, {}, {}

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        kernel = value_of(self.model.get_layer("gru").cell.recurrent_kernel)
        self.zeros[step] = [np.mean(gate == 0) for gate in np.split(kernel, 3, axis=1)]
        self.thresholds[step] = dict(self.update.pruner.thresholds)
        self.strengths[step] = dict(self.update.pruner.strengths)


DECAY = kbs.PolynomialDecay(final_sparsity=0.75, begin_step=2, end_step=10, frequency=2)
RAMP = kbs.ThresholdRamp(q=0.1, begin_step=3, ramp_step=5, end_step=10, frequency=2)


def test_sparsities_of_gates_are_those_of_the_weights(tmp_path):
    model, update = make_model(DECAY), kbs.UpdatePruningStep()
    watch = Watch(update)
    fit(model, [update, kbs.PruningSummaries(tmp_path, update_freq=1), watch])
    tags = read(tmp_path)
    for index, gate in enumerate("zrh"):
        values = tags[f"sparsity/gru/recurrent_kernel/{gate}"]
        assert sorted(values) == list(range(1, 13))
        for step, value in values.items():
            assert value == pytest.approx(watch.zeros[step][index])
    assert tags["sparsity/total"][12] == pytest.approx(kbs.sparsity(model))
    assert not [tag for tag in tags if tag.startswith(("threshold", "lambda")) or "head" in tag]


@pytest.mark.parametrize("first", [True, False])
def test_thresholds_and_lambdas_are_the_pruners_in_any_order(tmp_path, first):
    model, update = make_model(RAMP, group_lasso=1e-3), kbs.UpdatePruningStep()
    watch, summaries = Watch(update), kbs.PruningSummaries(tmp_path, update_freq=1, images=False)
    fit(model, [summaries, update, watch] if first else [update, summaries, watch])
    tags = read(tmp_path)
    thresholds, strengths = tags["threshold/gru/kernel"], tags["lambda/gru/kernel"]
    assert sorted(thresholds) == list(range(3, 13))  # none before the ramp begins
    assert sorted(strengths) == list(range(1, 13))
    for step, value in thresholds.items():
        assert value == pytest.approx(watch.thresholds[step]["recurrent"])
    for step, value in strengths.items():
        assert value == pytest.approx(next(iter(watch.strengths[step].values())))
    assert strengths[1] == pytest.approx(1e-3)
    assert strengths[12] == 0
    assert not [tag for tag in tags if tag.startswith("masks")]


def test_once_an_epoch_by_default_with_pictures(tmp_path):
    model = make_model(DECAY)
    fit(model, [kbs.UpdatePruningStep(), kbs.PruningSummaries(tmp_path)])
    tags = read(tmp_path)
    assert all(sorted(values) == [6, 12] for values in tags.values())
    width, height, png = tags["masks/gru/recurrent_kernel"][12]
    image = tf.io.decode_png(png).numpy()
    assert image.shape == (int(height), int(width), 3)
    expected = kbs.plots.mask_image(kbs.sparsity_report(model).weights[1])
    np.testing.assert_array_equal(image, expected)


def test_several_steps_an_execution_pass_over_the_boundary(tmp_path):
    model = make_model(DECAY, steps_per_execution=3)
    fit(model, [kbs.UpdatePruningStep(), kbs.PruningSummaries(tmp_path, update_freq=5)], steps=9)
    assert sorted(read(tmp_path)["sparsity/total"]) == [6, 12, 15, 18]  # 18 is the end


@pytest.mark.filterwarnings("ignore:The pruning schedule does not get to its end")
def test_a_second_fit_goes_on_at_the_optimizers_step(tmp_path):
    model, summaries = make_model(DECAY), kbs.PruningSummaries(tmp_path)
    fit(model, [kbs.UpdatePruningStep(), summaries], epochs=1)
    fit(model, [kbs.UpdatePruningStep(), summaries], epochs=1)
    assert sorted(read(tmp_path)["sparsity/total"]) == [6, 12]


def test_a_regularizer_of_ones_own_has_its_lambda_written(tmp_path):
    model = keras.Sequential([layers.Dense(8, name="d", kernel_regularizer=kbs.GroupLassoRegularizer(0.25, (4, 4)))])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0, callbacks=[kbs.PruningSummaries(tmp_path)])
    assert {tag: float(values[1]) for tag, values in read(tmp_path).items()} == {
        "sparsity/d/kernel": 0, "sparsity/total": 0, "lambda/d/kernel": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("update_freq", [0, -1, 2.5, True, "batch", None])
def test_a_bad_update_freq_is_quoted(tmp_path, update_freq):
    with pytest.raises(ValueError, match=f"Received: update_freq={update_freq!r}"):
        kbs.PruningSummaries(tmp_path, update_freq=update_freq)


def test_a_bad_log_dir_is_quoted(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`log_dir` cannot be made.*Received: log_dir="):
        kbs.PruningSummaries(tmp_path / "file" / "logs")
    with pytest.raises(TypeError, match="Received: log_dir=None"):
        kbs.PruningSummaries(None)


def test_without_tensorboard_it_says_what_to_install():
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "import keras_blocksparse as kbs\n"
        "try: kbs.PruningSummaries('logs')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'PruningSummaries needs tensorboard: pip install "keras_blocksparse[tensorboard]"'
