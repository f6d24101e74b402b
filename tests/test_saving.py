"""Copies and files: pruning survives wherever Keras copies a layer, and leaves no trace once it is stripped."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from _helpers import Watch, assert_sparsity, pruned_weights, run_python, sequence_data
from keras import layers

import keras_blocksparse as kbs

BLOCK = (4, 4)
SCHEDULE = kbs.PolynomialDecay(initial_sparsity=0.25, final_sparsity=0.75, begin_step=1, end_step=6, frequency=1)

#: Puts a wall in front of this package: whatever imports it fails.
STRANGER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras_blocksparse":
            raise ModuleNotFoundError("this process has never heard of " + name)
sys.meta_path.insert(0, Wall())
try:
    import keras_blocksparse
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the wall does not stand")
import numpy as np
folder = sys.argv[1]
x = np.load(folder + "/x.npy")
"""


def prune(target: Any, **options: Any) -> Any:
    return kbs.prune_low_magnitude_block(target, SCHEDULE, BLOCK, **options)


def train(model: Any, count: int | None, steps: int = 8, watch: Any = None) -> Any:
    x, y = sequence_data(samples=8 * steps, outputs=int(model.output_shape[-1]) if model.built else 3)
    watch = watch or Watch(SCHEDULE, BLOCK, count=count)
    if getattr(model, "optimizer", None) is None:
        model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert watch.seen
    return watch


def head() -> layers.Layer:
    return layers.Dense(3)


# ---- pruned layers in layers, and copies of both

RECIPES = {
    "unbuilt layer": (lambda: keras.Sequential([prune(layers.GRU(12)), head()]), 2),
    "unbuilt layer under an Input": (
        lambda: keras.Sequential([keras.Input((4, 8)), prune(layers.LSTM(12)), head()]),
        2,
    ),
    "Bidirectional": (lambda: keras.Sequential([layers.Bidirectional(prune(layers.GRU(12))), head()]), 4),
    "Bidirectional with a backward layer": (
        lambda: keras.Sequential(
            [
                layers.Bidirectional(prune(layers.GRU(12)), backward_layer=prune(layers.GRU(12, go_backwards=True))),
                head(),
            ]
        ),
        4,
    ),
    "TimeDistributed": (
        lambda: keras.Sequential([layers.TimeDistributed(prune(layers.Dense(8))), layers.GlobalMaxPooling1D(), head()]),
        1,
    ),
    "RNN of cells": (
        lambda: keras.Sequential(
            [layers.RNN([prune(layers.GRUCell(12)), layers.LSTMCell(8), prune(layers.SimpleRNNCell(8))]), head()]
        ),
        4,
    ),
    "RNN of one cell": (lambda: keras.Sequential([layers.RNN(prune(layers.LSTMCell(12))), head()]), 2),
    "TimeDistributed of a Bidirectional": (
        lambda: keras.Sequential(
            [
                keras.Input((4, 8)),
                layers.Reshape((2, 2, 8)),
                layers.TimeDistributed(layers.Bidirectional(prune(layers.SimpleRNN(8)))),
                layers.GlobalMaxPooling1D(),
                head(),
            ]
        ),
        4,
    ),
    "a list of layers": (
        lambda: keras.Sequential([*prune([layers.GRU(12, return_sequences=True), layers.LSTM(8)]), head()]),
        4,
    ),
    "a nested model": (
        lambda: keras.Sequential(
            [keras.Input((4, 8)), prune(keras.Sequential([keras.Input((4, 8)), layers.GRU(12)])), head()]
        ),
        2,
    ),
    "EinsumDense": (
        lambda: keras.Sequential(
            [keras.Input((4, 8)), layers.Flatten(), prune(layers.EinsumDense("ab,bc->ac", 8)), head()]
        ),
        1,
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("copy", ["clone_model", "from_config"])
def test_copies_keep_the_pruning(recipe, copy):
    make, count = RECIPES[recipe]
    original = make()
    original.build((None, 4, 8))
    copied = (
        keras.models.clone_model(original)
        if copy == "clone_model"
        else type(original).from_config(json.loads(json.dumps(original.get_config())))
    )
    copied.build((None, 4, 8))
    train(copied, count)
    # Copies share nothing: the original is as it was.
    assert not any((v.numpy() == 0).any() for v, _ in pruned_weights(original))


def test_a_layer_comes_back_from_its_own_config():
    layer = prune(layers.GRU(12, kernel_constraint=keras.constraints.MaxNorm(2.0)), keep_diagonal=True, revival=False)
    copied = layers.GRU.from_config(json.loads(json.dumps(layer.get_config())))
    for name in ("kernel_constraint", "recurrent_constraint"):
        mine, theirs = (getattr(one.cell, name) for one in (layer, copied))
        assert isinstance(theirs, kbs.BlockPruning)
        assert theirs is not mine
        assert theirs.settings == mine.settings
        assert (theirs.gates, theirs.diagonal) == (mine.gates, mine.diagonal)
    assert copied.cell.kernel_constraint.constraint.max_value == 2.0
    assert copied.cell.bias_constraint is None


def test_copies_of_a_model_are_pruned_as_one_group():
    # "global" ranks over all layers; two settings that only look alike would rank each layer by itself
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(8)])
    prune(model, distribution="global")
    copied = keras.models.clone_model(model)
    assert len(kbs.Pruner(model).settings) == len(kbs.Pruner(copied).settings) == 1


# ---- files


def save_and_load(model: Any, path: Path) -> Any:
    model.save(path)
    return keras.saving.load_model(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_model_that_was_not_stripped_goes_on(recipe, tmp_path):
    make, count = RECIPES[recipe]
    model = make()
    with pytest.warns(UserWarning, match="does not get to its end"):
        train(model, count, steps=3)
    before = [v.numpy() for v, _ in pruned_weights(model)]
    loaded = save_and_load(model, tmp_path / "model.keras")
    for old, (variable, _) in zip(before, pruned_weights(loaded), strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)
    watch = train(loaded, count)
    assert watch.seen[0] == (4, pytest.approx(SCHEDULE.target(4)))


def test_a_new_process_that_imports_the_package_goes_on(tmp_path):
    model = keras.Sequential([layers.Bidirectional(prune(layers.GRU(12), group_lasso=0.01)), head()])
    with pytest.warns(UserWarning, match="does not get to its end"):
        train(model, 4, steps=3)
    model.save(tmp_path / "model.keras")
    code = """
import sys, keras, numpy as np
import keras_blocksparse as kbs
model = keras.saving.load_model(sys.argv[1])
print(kbs.sparsity(model), int(model.optimizer.iterations))
x = np.random.default_rng(0).normal(size=(32, 4, 8)).astype("float32")
model.fit(x, x[:, 0, :3], batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep()])
model.save(sys.argv[1])
print(kbs.sparsity(model), int(model.optimizer.iterations))
"""
    first, second = (line.split() for line in run_python(code, str(tmp_path / "model.keras")).splitlines()[-2:])
    assert float(first[0]) == pytest.approx(SCHEDULE.target(3), abs=0.06)
    assert first[1] == "3"
    assert float(second[0]) == pytest.approx(0.75, abs=0.06)
    assert second[1] == "7"
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for variable, gates in pruned_weights(loaded):
        assert_sparsity(variable, BLOCK, 0.75, gates)


def test_weights_files_have_the_names_and_shapes_of_a_plain_model(tmp_path):
    import h5py

    def listing(model: Any, name: str) -> list:
        model.save_weights(tmp_path / name)
        with h5py.File(tmp_path / name) as file:
            names: list = []
            file.visititems(lambda key, item: names.append((key, getattr(item, "shape", None))))
        return names

    plain = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    pruned = keras.models.clone_model(plain)
    prune(pruned.layers[0], group_lasso=0.1)
    assert listing(plain, "plain.weights.h5") == listing(pruned, "pruned.weights.h5")
    assert [w.shape for w in plain.weights] == [w.shape for w in pruned.weights]
    train(pruned, 2)
    plain.load_weights(tmp_path / "pruned.weights.h5")  # either way round
    pruned.load_weights(tmp_path / "plain.weights.h5")


def stripped_model(tmp_path: Path, kind: str = "functional") -> Any:
    x, _ = sequence_data(samples=4)
    np.save(tmp_path / "x.npy", x)
    gru = layers.Bidirectional(layers.GRU(12, kernel_regularizer=keras.regularizers.L2(1e-4)))
    stack = [gru, layers.Dense(8, kernel_constraint=keras.constraints.MaxNorm(3.0)), head()]
    if kind == "functional":
        outputs = inputs = keras.Input((4, 8))
        for layer in stack:
            outputs = layer(outputs)
        model = keras.Model(inputs, outputs)
    else:
        model = keras.Sequential(stack)
    prune(model if kind == "functional" else stack[:2], filters=lambda layer: layer is not stack[2], group_lasso=0.01)
    train(model, 5)
    assert kbs.strip_pruning(model) is model
    assert not pruned_weights(model)
    np.save(tmp_path / "y.npy", model.predict(x, verbose=0))
    return model


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_stripped_keras_file_loads_where_nobody_knows_this_package(kind, tmp_path):
    model = stripped_model(tmp_path, kind)
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "keras_blocksparse" not in archive.read("config.json").decode()
    code = """
import keras
model = keras.saving.load_model(folder + "/model.keras")
np.testing.assert_allclose(model.predict(x, verbose=0), np.load(folder + "/y.npy"), rtol=1e-5, atol=1e-6)
model.fit(x, np.load(folder + "/y.npy"), verbose=0)     # optimizer, regularizer and constraint are the user's
print(type(model.layers[-2].kernel_constraint).__name__)
"""
    assert run_python(STRANGER + code, str(tmp_path)).split()[-1] == "MaxNorm"


def test_stripped_weights_load_where_nobody_knows_this_package(tmp_path):
    stripped_model(tmp_path).save_weights(tmp_path / "model.weights.h5")
    code = """
import keras
from keras import layers
model = keras.Sequential([keras.Input((4, 8)), layers.Bidirectional(layers.GRU(12)), layers.Dense(8), layers.Dense(3)])
inputs = keras.Input((4, 8)); y = inputs
for layer in model.layers: y = layer(y)
model = keras.Model(inputs, y)
model.load_weights(folder + "/model.weights.h5")
np.testing.assert_allclose(model.predict(x, verbose=0), np.load(folder + "/y.npy"), rtol=1e-5, atol=1e-6)
print("zeros", sum(int((w.numpy() == 0).sum()) for w in model.weights if len(w.shape) == 2) > 500)
"""
    assert run_python(STRANGER + code, str(tmp_path)).split()[-2:] == ["zeros", "True"]


def test_a_stripped_saved_model_serves_where_nobody_knows_this_package(tmp_path):
    stripped_model(tmp_path).export(tmp_path / "served")
    code = """
import tensorflow as tf
served = tf.saved_model.load(folder + "/served")
np.testing.assert_allclose(served.serve(x).numpy(), np.load(folder + "/y.npy"), rtol=1e-5, atol=1e-6)
names = [v.name for v in served.variables]
assert not any("mask" in name or "unmasked" in name for name in names), names
print(len(names))
"""
    run_python(STRANGER + code, str(tmp_path))


def test_a_model_under_pruning_can_be_exported_and_served(tmp_path):
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4, 8)), prune(layers.GRU(12)), head()])
    train(model, 2)
    model.export(tmp_path / "served")
    x, _ = sequence_data(samples=4)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x).numpy(), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


# ---- masks from zero blocks


@pytest.mark.parametrize("how", ["keras", "weights"])
def test_loading_and_pruning_again_takes_the_mask_from_the_zero_blocks(how, tmp_path):
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    prune(model, filters="gru")
    train(model, 2)
    if how == "keras":
        loaded = save_and_load(model, tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
        loaded.load_weights(tmp_path / "model.weights.h5")
    before = [w.numpy() != 0 for w in loaded.layers[0].weights[:2]]
    # A schedule that does nothing yet: what holds is the mask that was found.
    late = kbs.ConstantSparsity(target_sparsity=0.9, begin_step=10**6)
    kbs.prune_low_magnitude_block(loaded, late, BLOCK, filters="gru")
    loaded.compile("adam", "mse")
    x, y = sequence_data()
    with pytest.warns(UserWarning, match="never fires: begin_step=1000000"):
        loaded.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    for mask, variable in zip(before, loaded.layers[0].weights[:2], strict=True):
        np.testing.assert_array_equal(variable.numpy() != 0, mask)


def test_weights_that_are_loaded_after_pruning_bring_their_masks(tmp_path):
    donor = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    prune(donor, filters="gru")
    train(donor, 2)
    donor.save_weights(tmp_path / "donor.weights.h5")
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    late = kbs.ConstantSparsity(target_sparsity=0.9, begin_step=100)
    kbs.prune_low_magnitude_block(model, late, BLOCK, filters="gru")
    model.load_weights(tmp_path / "donor.weights.h5")
    model.compile("adam", "mse")
    x, y = sequence_data()
    with pytest.warns(UserWarning, match="never fires"):
        model.fit(x, y, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    for donated, variable in zip(donor.layers[0].weights[:2], model.layers[0].weights[:2], strict=True):
        np.testing.assert_array_equal(variable.numpy() == 0, donated.numpy() == 0)


@pytest.mark.parametrize("identity", ["identity", keras.initializers.Identity(0.5)])
@pytest.mark.parametrize("kind", [layers.SimpleRNN, layers.Dense])
def test_an_initializer_that_holds_zeros_is_no_mask(kind, identity):
    # Le, Jaitly and Hinton's IRNN starts from an identity: nine tenths of its blocks are zero, and none is pruned.
    kernels = {layers.SimpleRNN: {"recurrent_initializer": identity}, layers.Dense: {"kernel_initializer": identity}}
    layer = kind(40, **{"kernel_initializer": "zeros", **kernels[kind]})
    layer.build((None, 4, 40))
    kbs.prune_low_magnitude_block(layer, kbs.ConstantSparsity(target_sparsity=0.5, begin_step=10**6), BLOCK)
    assert kbs.Pruner(layer).masked_sparsity() == 0


# ---- schedules that Keras cannot save


def test_a_plain_callable_survives_copies_and_is_lost_in_files_with_a_warning(tmp_path):
    def my_schedule(step):
        return step % 2 == 0, 0.5

    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    kbs.prune_low_magnitude_block(model, my_schedule, BLOCK, filters="gru")
    copied = keras.models.clone_model(model)
    assert copied.layers[0].cell.kernel_constraint.settings.schedule is my_schedule
    kbs.Pruner(model).prune_now(0.5)
    model.save(tmp_path / "model.keras")
    code = """
import sys, warnings, keras, keras_blocksparse as kbs, numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = keras.saving.load_model(sys.argv[1])
print(any("my_schedule" in str(w.message) and "could not save" in str(w.message) for w in caught))
model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(32, 4, 8)).astype("float32")
model.fit(x, x[:, 0, :3], batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep()])
print(kbs.sparsity(model))
"""
    warned, sparsity = run_python(code, str(tmp_path / "model.keras")).split()[-2:]
    assert warned == "True"
    assert float(sparsity) == pytest.approx(0.5, abs=0.06)


def test_an_unstripped_file_in_a_strange_process_says_which_package_is_missing(tmp_path):
    model = keras.Sequential([keras.Input((4, 8)), prune(layers.GRU(12)), head()])
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.zeros(1))
    code = """
import keras
try:
    keras.saving.load_model(folder + "/model.keras")
except Exception as error:
    print("keras_blocksparse" in str(error))
"""
    assert run_python(STRANGER + code, str(tmp_path)).split()[-1] == "True"


def test_loading_an_unstripped_model_does_not_warn(tmp_path):
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), head()])
    prune(model, filters="gru")
    train(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = save_and_load(model, tmp_path / "model.keras")
    for variable, gates in pruned_weights(loaded):
        assert_sparsity(variable, BLOCK, 0.75, gates)
