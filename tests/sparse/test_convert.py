"""to_block_sparse and to_dense, against the model they were given."""

import json
import os
import re
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from _helpers import ROOT, run_python
from layer_helpers import assert_close, normal, twins, with_zero_blocks, zero_blocks

import keras_blocksparse as kbs
from keras_blocksparse.sparse import BlockSparseDense, BlockSparseGRU, BlockSparseLSTM, BlockSparseSimpleRNN

LAYERS = {
    "SimpleRNN": lambda **k: keras.layers.SimpleRNN(16, name="layer", **k),
    "GRU": lambda **k: keras.layers.GRU(16, name="layer", **k),
    "LSTM": lambda **k: keras.layers.LSTM(16, name="layer", **k),
    "Bidirectional": lambda **k: keras.layers.Bidirectional(keras.layers.GRU(8, **k), name="layer"),
    "Dense": lambda **k: keras.layers.Dense(16, activation="tanh", name="layer", **k),
}


def small_model(kind="GRU", **options):
    """One layer with zero blocks, and a dense head."""
    layer = LAYERS[kind](**options)
    after = [keras.layers.Flatten()] if kind == "Dense" else []
    model = keras.Sequential([keras.Input((4, 8)), layer, *after, keras.layers.Dense(3, name="head")])
    return zero_blocks(model, skip=["head"])


def quietly(model, *args, **kwargs):
    return kbs.to_block_sparse(model, *args, verbose=False, **kwargs)


def deep_model():
    """Everything the walk has to find: branches, masks, states, nesting, sharing, wrappers, operations."""
    tokens, sequence = keras.Input((5,), name="tokens"), keras.Input((5, 8), name="sequence")
    x = keras.layers.Embedding(11, 8, mask_zero=True)(tokens)
    x, state = keras.layers.GRU(16, return_sequences=True, return_state=True, name="encoder")(x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(8, return_sequences=True), merge_mode="sum", name="both")(x)
    shared = keras.layers.TimeDistributed(keras.layers.Dense(8, name="inner"), name="frames")
    nested = keras.Sequential([keras.Input((5, 8)), keras.layers.SimpleRNN(16, name="rnn"), keras.layers.Dense(16)],
                              name="nested")  # fmt: skip
    y = keras.layers.Lambda(lambda v: 2.0 * v)(shared(sequence)) + shared(x)
    y = keras.layers.GRU(16, go_backwards=True, name="decoder")(y, initial_state=state) - nested(shared(x))
    return keras.Model([tokens, sequence], keras.layers.Dense(3, name="head")(y), name="deep")


def deep_input():
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 10, 0, 1, 2]])
    return {"tokens": tokens, "sequence": normal(3, 5, 8)}


# ---- the copy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_copy_computes_what_the_model_computes(kind, dtype):
    model = small_model(kind)
    fast = quietly(model, dtype=dtype)
    x = normal(3, 4, 8)
    wanted = model.predict(x, verbose=0)
    if dtype == "float32":
        assert_close(fast.predict(x, verbose=0), wanted)
        assert_close(fast(x), model(x))
    # bfloat16 rounds by 2**-9 of a weight, int8 by 2**-8 of the largest weight of an output and input of a row
    assert np.abs(fast.predict(x, verbose=0) - wanted).max() < 0.06 * np.abs(wanted).max()
    assert fast.layers[0].name == "layer"
    fast.compile(loss="mse")
    model.compile(loss="mse")
    y = normal(3, 3)
    assert fast.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=0.1 if dtype != "float32" else 1e-4
    )


def test_every_layer_is_found_wherever_it_is():
    model = zero_blocks(deep_model(), skip=["head"])
    weights = [w.numpy() for w in model.weights]
    fast = quietly(model)
    assert_close(fast(deep_input()), model(deep_input()))
    kinds = {layer.name: type(layer) for layer in fast._flatten_layers()}
    assert kinds["encoder"] is kinds["decoder"] is BlockSparseGRU
    assert kinds["forward_lstm"] is kinds["backward_lstm"] is BlockSparseLSTM
    assert kinds["inner"] is BlockSparseDense
    assert kinds["rnn"] is BlockSparseSimpleRNN
    assert kinds["head"] is keras.layers.Dense
    assert [layer.name for layer in fast.layers] == [layer.name for layer in model.layers]
    assert fast.name == "deep"
    assert len(fast.weights) == len(model.weights)  # the shared layer is one still
    for weight, before in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(weight, before)


def test_the_way_back_gives_the_same_model():
    model = zero_blocks(deep_model(), skip=["head"])
    dense = kbs.to_dense(quietly(model))
    assert [w.path for w in dense.weights] == [w.path for w in model.weights]
    for got, wanted in zip(dense.weights, model.weights, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert all(type(layer).__module__.startswith("keras.") for layer in dense._flatten_layers())
    assert_close(dense(deep_input()), model(deep_input()))
    stored = {name: type(dense.get_layer(name)) for name in ("encoder", "both", "nested")}
    assert stored == {"encoder": keras.layers.GRU, "both": keras.layers.Bidirectional, "nested": keras.Sequential}


def test_short_weights_come_back_as_the_numbers_they_stand_for():
    fast = quietly(small_model(), dtype="int8")
    dense = kbs.to_dense(fast)
    np.testing.assert_array_equal(dense.layers[0].cell.kernel, fast.layers[0].kernel.to_dense())
    assert all(v.trainable for v in dense.variables if "seed" not in v.path)


def test_nothing_of_compile_is_carried_and_a_loss_need_not_be_known():
    model = small_model()
    model.compile("sgd", loss=lambda y, p: keras.ops.mean((y - p) ** 2))
    fast = quietly(model)
    assert not fast.compiled
    assert model.compiled
    model.fit(normal(4, 4, 8), normal(4, 3), verbose=0)


def test_a_shared_layer_stays_shared_between_nested_models():
    gru = keras.layers.GRU(16, name="gru")
    inner = keras.Sequential([keras.Input((4, 8)), gru, keras.layers.Dense(3, name="head")])
    x = keras.Input((4, 8))
    model = zero_blocks(keras.Model(x, [inner(x), gru(x)]), skip=["head"])
    fast = quietly(model)
    assert len(fast.weights) == len(model.weights)
    assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_a_stateful_model_goes_on_where_it_was():
    model = keras.Sequential([keras.Input(batch_shape=(2, 4, 8)), keras.layers.GRU(16, stateful=True)])
    zero_blocks(model)
    fast = quietly(model)
    for _ in range(2):
        assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))
    fast.layers[0].reset_state()
    model.layers[0].reset_state()
    assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_a_model_that_was_built_by_its_first_call():
    model = keras.Sequential([keras.layers.GRU(16), keras.layers.Dense(3, name="head")])
    model(normal(2, 4, 8))
    zero_blocks(model, skip=["head"])
    assert_close(quietly(model)(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_a_mixed_precision_model():
    policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model = keras.Sequential(
        [keras.Input((4, 8)), keras.layers.GRU(16, dtype=policy), keras.layers.Dense(4, dtype=policy)]
    )
    zero_blocks(model, sparsity=0.5)
    fast = quietly(model, max_density=None)
    assert [type(layer) for layer in fast.layers] == [BlockSparseGRU, BlockSparseDense]
    assert fast.layers[0].dtype_policy.name == "mixed_bfloat16"
    x = normal(2, 4, 8)
    np.testing.assert_allclose(tf.cast(fast(x), "float32"), tf.cast(model(x), "float32"), atol=0.05)


def test_a_weight_that_is_all_zero():
    model = small_model()
    model.layers[0].cell.kernel.assign(np.zeros((8, 48)))
    fast = quietly(model)
    assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))
    assert_close(kbs.to_dense(fast)(normal(2, 4, 8)), model(normal(2, 4, 8)))


@pytest.mark.parametrize("activation", [lambda x: keras.ops.sin(x), keras.layers.ReLU(max_value=2.0)])
def test_an_activation_need_not_be_known_to_keras(activation):
    layers = [keras.layers.GRU(16, activation=activation), keras.layers.Dense(3, activation=activation, name="head")]
    model = zero_blocks(keras.Sequential([keras.Input((4, 8)), *layers]), skip=["head"])
    fast = quietly(model)
    assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))
    assert_close(kbs.to_dense(fast)(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_broken_weights_are_an_error():
    model = small_model()
    model.layers[0].cell.recurrent_kernel.assign(np.full((16, 48), np.nan))
    with pytest.raises(ValueError, match="layer/recurrent_kernel holds NaN"):
        quietly(model)


def test_a_nested_model_that_keras_cannot_copy_is_an_error():
    model = keras.Sequential([keras.Input((4, 8)), WithItsOwnConstructor(16), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="copies a WithItsOwnConstructor as a Functional"):
        quietly(zero_blocks(model), max_density=None)


def test_trainable_flags_are_kept():
    model = small_model()
    model.layers[0].trainable = False
    fast = quietly(model)
    assert not fast.layers[0].trainable_variables
    assert len(fast.trainable_variables) == 2


# ---- training --------------------------------------------------------------------------------------------------------


class HoldZeros(keras.constraints.Constraint):
    """Keeps what is zero now at zero."""

    def __init__(self, variable):
        self.mask = np.asarray(variable) != 0

    def __call__(self, w):
        return w * keras.ops.cast(self.mask, w.dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_gives_the_weights_of_masked_dense_training(kind):
    model = small_model(kind, kernel_regularizer="l2")
    fast = quietly(model)
    for variable in model.trainable_variables:
        if variable.name.endswith("kernel"):
            variable.constraint = HoldZeros(variable)
    x, y = normal(40, 4, 8), normal(40, 3)
    losses = []
    for trained in (model, fast):
        trained.compile(keras.optimizers.SGD(0.05, momentum=0.5), "mse")
        losses.append(trained.fit(x, y, batch_size=10, epochs=5, shuffle=False, verbose=0).history["loss"])
    assert fast.optimizer.iterations == 20
    assert losses[1][-1] < losses[1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    dense = kbs.to_dense(fast)
    for got, wanted in zip(dense.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=got.path)
    assert sum(np.count_nonzero(np.asarray(w) == 0) for w in dense.trainable_variables) > 50


@pytest.mark.slow
def test_on_two_replicas_training_gives_the_same_weights():
    run_python(
        """
import contextlib, keras, numpy as np, tensorflow as tf, keras_blocksparse as kbs
from layer_helpers import normal, zero_blocks
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
model = keras.Sequential([keras.Input((4, 8)), keras.layers.GRU(16), keras.layers.Dense(3, name="head")])
zero_blocks(model, skip=["head"])
strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
weights = []
for scope in (strategy.scope, contextlib.nullcontext):
    with scope():
        fast = kbs.to_block_sparse(model, verbose=False)
        fast.compile("sgd", "mse")
    fast.fit(normal(16, 4, 8), normal(16, 3), batch_size=8, epochs=2, shuffle=False, verbose=0)
    weights.append(fast.get_weights())
    assert kbs.to_dense(fast).get_weights()[0].shape == (8, 48)
    with scope():
        small = kbs.to_block_sparse(model, dtype="int8", verbose=False)
    small.predict(normal(16, 4, 8), verbose=0)
for mirrored, alone in zip(*weights, strict=True):
    np.testing.assert_allclose(mirrored, alone, rtol=1e-4, atol=1e-6)
""",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        CUDA_VISIBLE_DEVICES="-1",
    )


def test_padding_stays_zero_under_adam_and_weight_decay():
    model = keras.Sequential([keras.Input((4, 7)), keras.layers.GRU(9), keras.layers.Dense(3, name="head")])
    fast = quietly(zero_blocks(model, skip=["head"]), block_size=(4, 4))
    fast.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    fast.fit(normal(16, 4, 7), normal(16, 3), verbose=0)
    cell = fast.layers[0].cell
    for name in ("kernel", "recurrent_kernel"):
        padding = getattr(cell, name).positions < 0
        assert not np.asarray(getattr(cell, f"{name}_values"))[padding].any()


def test_over_short_weights_the_rest_trains():
    fast = quietly(small_model(), dtype="int8")
    before = [w.numpy() for w in fast.weights]
    fast.compile("sgd", "mse")
    fast.fit(normal(8, 4, 8), normal(8, 3), verbose=0)
    changed = [not np.array_equal(w, b) for w, b in zip(fast.weights, before, strict=True)]
    assert changed == ["head" in w.path for w in fast.weights]


def test_regularizers_and_constraints_that_need_the_matrix_leave_a_float32_layer_alone():
    for options in ({"kernel_regularizer": "orthogonal_regularizer"}, {"recurrent_constraint": "unit_norm"}):
        model = small_model(**options)
        (name,) = options
        with pytest.raises(
            ValueError, match=f"layer: its {name} .* looks at the whole matrix.*Set its cell.{name} to None"
        ):
            quietly(model)
        assert type(quietly(model, dtype="int8").layers[0]) is BlockSparseGRU
        setattr(model.layers[0].cell, name, None)
        assert type(quietly(model).layers[0]) is BlockSparseGRU
    fast = quietly(small_model(kernel_constraint="non_neg", kernel_regularizer="l1"))
    assert type(fast.layers[0]) is BlockSparseGRU


def test_groups_of_blocks_are_no_regularizer_of_flat_values():
    model = small_model(kernel_regularizer=kbs.GroupLassoRegularizer(1e-3, (4, 4), 3))
    assert "GroupLassoRegularizer looks at the whole matrix" in kbs.conversion_report(model).layers[0].note


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_file_is_about_ten_times_smaller_and_loads_in_a_new_process(tmp_path):
    model = keras.Sequential([keras.Input((10, 64)), keras.layers.GRU(256), keras.layers.Dense(9, name="head")])
    zero_blocks(model, (16, 16), 0.9, skip=["head"])
    fast = quietly(model)
    model.save(tmp_path / "dense.keras")
    fast.save(tmp_path / "fast.keras")
    dense_size, size = ((tmp_path / f"{name}.keras").stat().st_size for name in ("dense", "fast"))
    assert dense_size / size > 7
    quietly(model, dtype="int8").save(tmp_path / "int8.keras")
    assert (tmp_path / "int8.keras").stat().st_size < 0.6 * size

    np.save(tmp_path / "x.npy", normal(2, 10, 64))
    code = (
        "import keras_blocksparse, keras, numpy as np\n"
        "for name in ('fast', 'int8'):\n"
        "    np.save(name, keras.models.load_model(name + '.keras').predict(np.load('x.npy'), verbose=0))"
    )
    run_python(code, cwd=tmp_path)
    assert_close(np.load(tmp_path / "fast.npy"), model.predict(normal(2, 10, 64), verbose=0))
    assert np.abs(np.load(tmp_path / "int8.npy") - np.load(tmp_path / "fast.npy")).max() < 0.05


@pytest.mark.parametrize("kind", LAYERS)
def test_a_loaded_model_is_the_same_and_trains_on(kind, tmp_path):
    fast = quietly(small_model(kind))
    fast.compile("adam", "mse")
    x, y = normal(8, 4, 8), normal(8, 3)
    fast.fit(x, y, verbose=0)
    fast.save(tmp_path / "fast.keras")
    again = keras.models.load_model(tmp_path / "fast.keras")
    assert_close(again.predict(x, verbose=0), fast.predict(x, verbose=0))
    for model in (fast, again):
        model.fit(x, y, verbose=0, shuffle=False)
    assert_close(again.get_weights(), fast.get_weights())
    fast.save_weights(tmp_path / "fast.weights.h5")
    again.load_weights(tmp_path / "fast.weights.h5")
    assert_close(again.get_weights(), fast.get_weights())


def test_a_saved_model_of_tensorflow(tmp_path):
    fast = quietly(small_model())
    fast.export(tmp_path / "saved", verbose=False)
    x = normal(2, 4, 8)
    loaded = tf.saved_model.load(tmp_path / "saved")
    assert_close(loaded.serve(x), fast(x))


def tampered(folder, change):
    """A saved model whose config text went through `change`."""
    quietly(small_model()).save(folder / "good.keras")
    with zipfile.ZipFile(folder / "good.keras") as good, zipfile.ZipFile(folder / "bad.keras", "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            bad.writestr(name, change(data.decode()).encode() if name == "config.json" else data)
    return folder / "bad.keras"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: re.sub(r'"keep": "[^"]*"', '"keep": "AAAA"', text), "Not the config of a block structure"),
        (
            lambda text: text.replace('"block_size": [4, 4]', '"block_size": [3, 5]'),
            "Not the config of a block structure",
        ),
        (lambda text: text.replace('"shape": [8, 48]', '"shape": [8, 96]'), r"must have shape|Not the config"),
        (lambda text: text.replace('"units": 16', '"units": 32'), r"must have shape \(inputs, 96\)"),
        (lambda text: text.replace('"kernel": {"shape"', '"kernel": {"form"'), "Not the config of a block structure"),
    ],
)
def test_a_tampered_config_is_an_error(change, message, tmp_path):
    path = tampered(tmp_path, change)
    with pytest.raises((ValueError, TypeError), match=message):
        keras.models.load_model(path)


def test_tampered_weights_are_an_error(tmp_path):
    fast = quietly(small_model())
    fast.save_weights(tmp_path / "w.weights.h5")
    with h5py.File(tmp_path / "w.weights.h5", "r+") as file:
        arrays = []
        file.visititems(lambda name, item: arrays.append(name) if isinstance(item, h5py.Dataset) else None)
        name = next(name for name in arrays if "cell" in name)
        shorter = file[name][:-1]
        del file[name]
        file[name] = shorter
    with pytest.raises(ValueError, match="shape"):
        fast.load_weights(tmp_path / "w.weights.h5")


# ---- what is converted, and what is said -----------------------------------------------------------------------------


def test_the_report_says_what_became_of_each_layer(capsys):
    model = zero_blocks(deep_model(), skip=["head", "dense"])
    model.get_layer("decoder").cell.activation = keras.activations.elu
    model.get_layer("encoder").cell.recurrent_dropout = 0.1
    report = kbs.conversion_report(model)
    rows = {row.layer: row for row in report.layers}
    inside = {"both/forward_lstm", "both/backward_lstm", "frames/inner", "nested/rnn", "nested/dense"}
    assert set(rows) == inside | {"embedding", "encoder", "decoder", "head"}
    encoder = rows["encoder"]
    assert (encoder.kind, encoder.becomes, encoder.block_sizes) == ("GRU", "BlockSparseGRU", ((4, 4), (4, 4)))
    assert encoder.density == pytest.approx(0.4, abs=0.02)
    assert encoder.nbytes_dense == 4 * (8 * 48 + 16 * 48 + 2 * 48)
    assert encoder.nbytes < 0.8 * encoder.nbytes_dense
    assert encoder.note == "runs step by step in training: recurrent_dropout=0.1"
    assert rows["decoder"].note == "runs step by step: the native loop has no activation=elu"
    assert rows["both/forward_lstm"].note == ""
    fused = {"encoder": True, "decoder": False, "nested/rnn": True, "frames/inner": None, "head": None}
    assert {name: rows[name].fused for name in fused} == fused
    assert (rows["head"].becomes, rows["head"].note) == ("", "no block of it is zero")
    assert rows["embedding"].note.startswith("Embedding has no block-sparse form")
    assert rows["embedding"].nbytes == rows["embedding"].nbytes_dense == 4 * 11 * 8

    model.get_layer("decoder").cell.activation = keras.activations.tanh
    report = kbs.conversion_report(model)
    assert not capsys.readouterr().out
    kbs.to_block_sparse(model)
    printed = capsys.readouterr().out
    assert printed.strip() == str(report) == repr(report)
    table = printed.splitlines()
    assert table[0].split() == ["layer", "becomes", "fused", "blocks", "kept", "bytes", "were"]
    assert re.search(r"encoder +BlockSparseGRU +yes +4x4, 4x4 +4\d\.\d% +[\d,]+ +4,992", printed)
    assert "head is left alone: no block of it is zero" in table
    json.dumps([row.layer for row in report.layers])
    kbs.to_block_sparse(model, verbose=False)
    assert not capsys.readouterr().out


def test_a_dense_matrix_beside_a_sparse_one_is_packed_whole():
    model = small_model()
    model.layers[0].cell.kernel.assign(normal(8, 48))
    row = kbs.conversion_report(model, max_density=0.7).layers[0]
    assert row.becomes == "BlockSparseGRU"
    assert row.block_sizes == ((8, 16), (4, 4))
    assert row.density == pytest.approx((8 + 16 * 0.4) / 24, abs=0.02)
    assert_close(quietly(model, max_density=0.7)(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_a_layer_that_keeps_too_much_is_left_alone():
    model = small_model()
    model.layers[0].cell.kernel.assign(normal(8, 48))
    with pytest.raises(ValueError, match=r"layer: \d\d.\d% of it is kept: more than max_density=0.5"):
        quietly(model)
    with pytest.raises(ValueError, match="head: no block of it is zero"):
        quietly(model)
    fast = quietly(model, max_density=None)
    assert [type(layer) for layer in fast.layers] == [BlockSparseGRU, BlockSparseDense]
    assert_close(fast(normal(2, 4, 8)), model(normal(2, 4, 8)))


@pytest.mark.parametrize(
    ("block_size", "sparsity", "converts"),
    [((4, 2), 0.8, True), ((4, 2), 0.6, False), ((8, 1), 0.9, True), ((8, 1), 0.8, False)],
)
def test_narrow_blocks_must_be_fewer(block_size, sparsity, converts):
    x = keras.Input((4, 32))
    model = zero_blocks(keras.Model(x, keras.layers.GRU(32)(x)), block_size, sparsity)
    row = kbs.conversion_report(model, block_size=block_size).layers[0]
    assert bool(row.becomes) == converts
    assert row.density == pytest.approx(1 - sparsity, abs=0.01)
    assert ("in blocks so narrow that it takes as long as" in row.note) != converts


def test_zeros_in_no_blocks_are_told_from_none():
    model = small_model()
    kernel = model.layers[0].cell.recurrent_kernel
    model.layers[0].cell.kernel.assign(normal(8, 48))
    kernel.assign(np.where(np.random.default_rng(0).random((16, 48)) < 0.7, 0, normal(16, 48)))
    note = kbs.conversion_report(model).layers[0].note
    assert re.match(r"4\d.\d% of it is zero, but in no usual blocks. `block_size` says", note)


def test_the_block_size_can_be_given():
    model = small_model()
    report = kbs.conversion_report(model, block_size=(2, 4))
    assert report.layers[0].block_sizes == ((2, 4), (2, 4))
    # Larger than the matrix in one direction: cut to it.
    report = kbs.conversion_report(model, block_size=(12, 1), max_density=None)
    assert report.layers[0].block_sizes == ((8, 1), (12, 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: keras.layers.RNN(keras.layers.GRUCell(16)),
            "RNN has no block-sparse form; SimpleRNN, GRU, LSTM, Dense",
        ),
        (lambda: keras.layers.GRU(16, dtype="float64"), "its weights are float64"),
        (lambda: type("MyGRU", (keras.layers.GRU,), {})(16), "MyGRU is a subclass of GRU"),
    ],
)
def test_layers_that_have_no_block_sparse_form_are_left_alone(make, reason):
    model = keras.Sequential([keras.Input((4, 8)), make(), keras.layers.Dense(16, name="layer")])
    zero_blocks(model)
    assert kbs.conversion_report(model).layers[0].note.startswith(reason)
    assert_close(quietly(model)(normal(2, 4, 8)), model(normal(2, 4, 8)))


def test_lora_is_left_alone():
    model = small_model("Dense")
    model.layers[0].enable_lora(2)
    assert kbs.conversion_report(model).layers[0].note.startswith("LoRA or quantization")


def test_a_block_sparse_model_is_left_as_it_is():
    fast = quietly(small_model())
    with pytest.raises(ValueError, match="layer: it is block-sparse already"):
        quietly(fast)
    both = quietly(fast, max_density=None)  # the head too
    assert [type(layer) for layer in both.layers] == [BlockSparseGRU, BlockSparseDense]
    assert_close(both(normal(2, 4, 8)), fast(normal(2, 4, 8)))


def test_a_model_still_under_pruning_is_refused():
    model = small_model()
    kbs.prune_low_magnitude_block(model, kbs.ConstantSparsity(target_sparsity=0.5), block_size=(4, 4), filters="layer")
    with pytest.raises(ValueError, match=r"still under pruning. Call kbs.strip_pruning\(model\) first"):
        quietly(model)
    assert type(quietly(kbs.strip_pruning(model)).layers[0]) is BlockSparseGRU


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.gru = keras.layers.GRU(16)

    def call(self, x):
        return self.gru(x)


class WithItsOwnConstructor(keras.Model):
    def __init__(self, units):
        x = keras.Input((4, 8))
        super().__init__(x, keras.layers.GRU(units)(x))


class WithItsOwnMethods(keras.Model):
    def double(self, x):
        return 2 * self(x)


def test_a_functional_model_keeps_its_class():
    x = keras.Input((4, 8))
    model = zero_blocks(WithItsOwnMethods(x, keras.layers.GRU(16)(x)))
    assert_close(quietly(model).double(normal(2, 4, 8)), model.double(normal(2, 4, 8)))


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (Subclassed, {}, ValueError, "Subclassed is a subclassed model.*kbs.BlockSparseGRU"),
        (
            lambda: zero_blocks(WithItsOwnConstructor(16)),
            {},
            ValueError,
            "copies a WithItsOwnConstructor as a Functional",
        ),
        (lambda: keras.layers.GRU(4), {}, TypeError, "Expected a keras.Model. Received: <GRU"),
        (lambda: keras.Sequential([keras.layers.GRU(4)]), {}, ValueError, "not built yet"),
        (small_model, {"dtype": "float16"}, ValueError, "`dtype` must be one of .* Received: dtype='float16'"),
        (
            small_model,
            {"max_density": 0},
            ValueError,
            r"`max_density` must be None or in \(0, 1\]. Received: max_density=0",
        ),
        (small_model, {"max_density": True}, ValueError, "`max_density` must be"),
        (small_model, {"max_density": "half"}, ValueError, "`max_density` must be"),
        (small_model, {"block_size": 16}, ValueError, "`block_size` must be a pair"),
        (small_model, {"block_size": (4.0, 4)}, TypeError, "two integers"),
    ],
)
def test_what_cannot_be_converted_is_an_error_that_says_why(make, arguments, error, message):
    with pytest.raises(error, match=message):
        quietly(make(), **arguments)


# ---- the rest of the package -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda model, path: kbs.prune_low_magnitude_block(model, kbs.ConstantSparsity(target_sparsity=0.5)),
        lambda model, path: kbs.sparsity_report(model),
        lambda model, path: kbs.sparsity(model),
        lambda model, path: kbs.export_tflite(model, path / "model.tflite"),
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_rest_of_the_package_asks_for_the_dense_model(kind, use, tmp_path):
    with pytest.raises(ValueError, match=r"is block-sparse.*kbs.to_dense\(model\)"):
        use(quietly(small_model(kind)), tmp_path)


def test_a_dense_layer_beside_block_sparse_ones_can_be_pruned():
    fast = quietly(small_model())
    kbs.prune_low_magnitude_block(
        fast, kbs.ConstantSparsity(target_sparsity=0.5, begin_step=0), block_size=(4, 1), filters="head"
    )
    fast.compile("sgd", "mse")
    fast.fit(normal(8, 4, 8), normal(8, 3), epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    assert np.mean(np.asarray(fast.layers[-1].kernel) == 0) == pytest.approx(0.5, abs=0.1)
    kbs.strip_pruning(fast)


def test_the_dense_model_can_be_reported_pruned_and_exported(tmp_path):
    dense = kbs.to_dense(quietly(small_model()))
    assert kbs.sparsity_report(dense).pruned.sparsity == pytest.approx(0.6, abs=0.03)
    kbs.export_tflite(dense, tmp_path / "model.tflite", validate=False, measure_latency=False)
    assert (tmp_path / "model.tflite").stat().st_size
    kbs.prune_low_magnitude_block(dense, kbs.ConstantSparsity(target_sparsity=0.8), block_size=(4, 4), filters="layer")


def test_there_must_be_something_to_make_dense():
    with pytest.raises(ValueError, match="no block-sparse layer"):
        kbs.to_dense(small_model())
    with pytest.raises(TypeError, match="Expected a keras.Model"):
        kbs.to_dense(None)


def test_a_layer_made_by_hand_in_a_subclassed_model():
    stock, sparse = twins("GRU", 8, 12)
    model = Subclassed()
    model.gru = sparse
    assert_close(model(normal(2, 3, 8)), stock(normal(2, 3, 8)))
    assert with_zero_blocks(np.ones((8, 8))).any()
