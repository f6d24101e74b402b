"""Interrupted trainings: backups, kills, several devices. Each in processes of its own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from _helpers import ROOT, Watch, assert_sparsity, pruned_weights, run_python, scheduled, sequence_data, updates
from keras import layers

import keras_blocksparse as kbs

BLOCK = (4, 4)
SCHEDULE = kbs.PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=3, end_step=40, frequency=4)


def make_model(optimizer: str = "adam") -> keras.Model:
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, SCHEDULE, BLOCK, filters="gru")
    model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize("order", ["backup first", "backup last"])
def test_backup_and_restore_goes_on_where_it_was(order, tmp_path):
    x, y = sequence_data(samples=64)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    def callbacks(*more):
        backup, update = keras.callbacks.BackupAndRestore(tmp_path / "backup"), kbs.UpdatePruningStep()
        return [*([backup, update] if order == "backup first" else [update, backup]), *more]

    first = make_model()
    with pytest.raises(KeyboardInterrupt):
        first.fit(x, y, batch_size=8, epochs=6, verbose=0, callbacks=callbacks(Interrupt()))
    second = make_model()
    watch = Watch(SCHEDULE, BLOCK, tmp_path, 2)
    second.fit(x, y, batch_size=8, epochs=6, verbose=0, callbacks=callbacks(watch))
    assert [step for step, _ in watch.seen] == list(range(25, 49))
    # The same masks as the model that was interrupted had: what was zero at step 24 (no revival before an update) is.
    for variable, gates in pruned_weights(second):
        assert_sparsity(variable, BLOCK, 0.8, gates)


KILLED = """
import json, os, sys
import keras, numpy as np
import keras_blocksparse as kbs
from keras import layers
sys.path.insert(0, sys.argv[2])
from _helpers import block_zeros, pruned_weights, sequence_data, updates

folder, mode = sys.argv[1], sys.argv[3]
schedule = kbs.PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=3, end_step=40, frequency=4)
model_file = folder + "/model.keras"
if mode == "load" and os.path.exists(model_file):
    model = keras.saving.load_model(model_file)
else:
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, schedule, (4, 4), filters="gru")
    model.compile(keras.optimizers.AdamW(0.01), "mse")

class Log(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        shares = [
            zeros * gates / variable.numpy().size
            for variable, gates in pruned_weights(self.model) for zeros in block_zeros(variable.numpy(), (4, 4), gates)
        ]
        with open(folder + "/log.jsonl", "a") as file:
            step = updates(self.model)
            file.write(json.dumps({"process": os.getpid(), "step": step, "shares": shares}) + "\\n")

class Save(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.save(folder + "/next.keras")
        os.replace(folder + "/next.keras", model_file)

try:
    backup = keras.callbacks.BackupAndRestore(folder + "/backup", save_freq=1, double_checkpoint=True)
except TypeError:       # before Keras 3.6
    backup = keras.callbacks.BackupAndRestore(folder + "/backup", save_freq=1)
keep = Save() if mode == "load" else backup
x, y = sequence_data(samples=96)
model.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[keep, kbs.UpdatePruningStep(), Log()])
model.save(folder + "/done.keras")
"""


def start(folder: Path, mode: str) -> subprocess.Popen:
    command = [sys.executable, "-c", KILLED, str(folder), str(ROOT / "tests"), mode]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def read_log(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["backup", "load"])
def test_a_training_killed_in_mid_epoch_goes_on_where_it_was(mode, tmp_path):
    process = start(tmp_path, mode)
    try:
        # Past the first update and in the middle of an epoch of 12 batches.
        deadline = time.monotonic() + 240
        while not any(entry["step"] >= 17 for entry in read_log(tmp_path)):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline, "the training does not get on"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    killed_at = read_log(tmp_path)[-1]["step"]
    assert killed_at < 60, "it was done before it could be killed"

    again = start(tmp_path, mode)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors.decode()[-2000:]
    log = read_log(tmp_path)
    second = [entry for entry in log if entry["process"] == again.pid]
    # A backup is written after each batch: at most the batch that was being written is done again.
    assert killed_at <= second[0]["step"] <= killed_at + 1
    assert second[-1]["step"] >= 40
    matrices = [8 * 12] * 3 + [12 * 12] * 3
    for entry in log:
        if entry["step"] < SCHEDULE.begin_step:
            continue
        wanted = scheduled(SCHEDULE, entry["step"])
        for share, size in zip(entry["shares"], matrices, strict=True):
            assert abs(share - wanted) * size <= 8 + 1e-6, (entry, wanted)
    sums = [sum(entry["shares"]) for entry in log]
    assert all(b >= a for a, b in itertools.pairwise(sums)), "sparsity stepped back"
    model = keras.saving.load_model(tmp_path / "done.keras")
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.8, gates)


MIRRORED = """
import sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np
from keras import layers
import keras_blocksparse as kbs
sys.path.insert(0, sys.argv[1])
from _helpers import assert_sparsity, scheduled, sequence_data

folder, revival, ema, built = sys.argv[2], sys.argv[3] == "revival", sys.argv[4] == "ema", sys.argv[5] == "built"
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
schedule = kbs.PolynomialDecay(initial_sparsity=0.25, final_sparsity=0.75, begin_step=2, end_step=7, frequency=2)
with strategy.scope():
    stack = [keras.Input((4, 8))] if built else []
    model = keras.Sequential(stack + [layers.GRU(12), layers.Dense(3, name="head")])
    kbs.prune_low_magnitude_block(model, schedule, (4, 4), filters="gru", revival=revival, group_lasso=0.001)
    model.compile(keras.optimizers.Adam(0.01, use_ema=ema), "mse")
seen = []

class Check(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        step = int(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(self.model.optimizer.iterations)))
        if step < 2:
            return
        self.model.save_weights(folder + "/model.weights.h5")
        for kernel in (self.model.layers[0].cell.kernel, self.model.layers[0].cell.recurrent_kernel):
            replicas = [np.array(value) for value in strategy.experimental_local_results(kernel.value)]
            assert len(replicas) == 2
            np.testing.assert_array_equal(*replicas)
            assert_sparsity(replicas[0], (4, 4), scheduled(schedule, step), 3, note=step)
        seen.append(step)

x, y = sequence_data(samples=32)
model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[Check(), kbs.UpdatePruningStep(), Check()])
assert seen == [s for s in range(2, 9) for _ in range(2)], seen
kbs.strip_pruning(model)
print("sparsity", kbs.sparsity(model.layers[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("revival", "ema", "built"),
    [("revival", "plain", "built"), ("no", "ema", "built"), ("revival", "plain", "unbuilt")],
)
def test_two_mirrored_devices(revival, ema, built, tmp_path):
    out = run_python(MIRRORED, str(ROOT / "tests"), str(tmp_path), revival, ema, built)
    assert float(out.split()[-1]) == pytest.approx(0.75, abs=0.03)


def test_loading_weights_between_two_fits_brings_their_masks(tmp_path):
    x, y = sequence_data(samples=64)
    model = make_model()
    with pytest.warns(UserWarning, match="does not get to its end"):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    model.save_weights(tmp_path / "at16.weights.h5")
    at16 = [v.numpy() for v, _ in pruned_weights(model)]
    with pytest.warns(UserWarning, match="does not get to its end"):
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    model.load_weights(tmp_path / "at16.weights.h5")  # weights and the optimizer's iterations, as Keras saves them
    step = updates(model)
    watch = Watch(SCHEDULE, BLOCK, count=2)
    model.fit(x, y, batch_size=8, epochs=5, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert watch.seen[0][0] == step + 1
    assert len(at16) == 2
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.8, gates)


def test_stopping_and_starting_by_hand_preserves_the_sparsity(tmp_path):
    x, y = sequence_data(samples=64)
    model = make_model()
    with pytest.warns(UserWarning, match="does not get to its end"):
        model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, scheduled(SCHEDULE, 24), gates)
    watch = Watch(SCHEDULE, BLOCK, tmp_path, 2)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert [step for step, _ in watch.seen] == list(range(25, 49))


def test_training_on_long_after_the_end_keeps_the_masks():
    x, y = sequence_data(samples=64)
    model = make_model()
    model.fit(x, y, batch_size=8, epochs=6, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    masks = [v.numpy() == 0 for v, _ in pruned_weights(model)]
    for _ in range(2):
        model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[kbs.UpdatePruningStep()])
        for mask, (variable, _) in zip(masks, pruned_weights(model), strict=True):
            np.testing.assert_array_equal(variable.numpy() == 0, mask)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)  # and without the callback
    for mask, (variable, _) in zip(masks, pruned_weights(model), strict=True):
        np.testing.assert_array_equal(variable.numpy() == 0, mask)
