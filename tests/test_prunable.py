"""Which weights of which layers are found, and how a user adds layers of his own."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from _helpers import Watch, assert_sparsity, pruned_weights, sequence_data
from keras import layers

import keras_blocksparse as kbs
from keras_blocksparse import prunable
from keras_blocksparse.prunable import find_prunable_layers

BLOCK = (4, 4)
HALF = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=0, frequency=1)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(prunable, "_registry", dict(prunable._registry))


def found(root: Any, filters: Any = None, everything: bool = False) -> list[str]:
    return [layer.path for layer in find_prunable_layers(root, filters, everything)]


def names(layer: Any) -> list[str]:
    return [spec.name for adapted in find_prunable_layers(layer) for spec in adapted.get_weight_specs()]


@pytest.mark.parametrize(
    ("layer", "weights", "gates"),
    [
        (layers.GRU(8), ["kernel", "recurrent_kernel"], "zrh"),
        (layers.GRUCell(8), ["kernel", "recurrent_kernel"], "zrh"),
        (layers.LSTM(8), ["kernel", "recurrent_kernel"], "ifco"),
        (layers.LSTMCell(8), ["kernel", "recurrent_kernel"], "ifco"),
        (layers.SimpleRNN(8), ["kernel", "recurrent_kernel"], None),
        (layers.SimpleRNNCell(8), ["kernel", "recurrent_kernel"], None),
        (layers.Dense(8), ["kernel"], None),
        (layers.EinsumDense("ab,bc->ac", 8), ["kernel"], None),
        (layers.Embedding(32, 8), ["embeddings"], None),
        (layers.Conv1D(8, 3), ["kernel"], None),
        (layers.Conv2D(8, 3), ["kernel"], None),
    ],
)
def test_keras_layers_and_their_weights(layer, weights, gates):
    (adapted,) = find_prunable_layers(layer)
    assert isinstance(adapted, kbs.PrunableLayer)
    specs = adapted.get_weight_specs()
    assert [spec.name for spec in specs] == weights
    assert {spec.gates for spec in specs} == {tuple(gates or [""])}
    assert adapted.get_prunable_weights() == [], "not built yet"


def test_built_layers_give_their_variables_and_never_a_bias():
    gru = layers.GRU(8)
    gru.build((None, 4, 8))
    (adapted,) = find_prunable_layers(gru)
    assert [id(w) for w in adapted.get_prunable_weights()] == [id(gru.cell.kernel), id(gru.cell.recurrent_kernel)]


def test_the_gates_lie_as_the_layer_computes_them():
    # Put a gate's part of the recurrent kernel to zero and see which gate of the cell no longer sees the state.
    keras.utils.set_random_seed(0)
    cell = layers.GRUCell(4, reset_after=False, use_bias=False)
    cell.build((None, 4))
    kernel, recurrent = (w.numpy() for w in (cell.kernel, cell.recurrent_kernel))
    x, h = np.random.default_rng(0).normal(size=(2, 1, 4)).astype("float32")
    (adapted,) = find_prunable_layers(cell)
    order = "".join(adapted.get_weight_specs()[0].gates)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    part = {g: (x @ kernel[:, 4 * i : 4 * i + 4], recurrent[:, 4 * i : 4 * i + 4]) for i, g in enumerate(order)}
    z, r = (sigmoid(part[g][0] + h @ part[g][1]) for g in "zr")
    candidate = np.tanh(part["h"][0] + (r * h) @ part["h"][1])
    expected = z * h + (1 - z) * candidate
    np.testing.assert_allclose(np.array(cell(x, h)[0]), expected, rtol=1e-5)


def test_models_are_walked_in_their_order_each_layer_once_with_paths():
    shared, x = layers.Dense(8, name="shared"), keras.Input((4, 8))
    inner = keras.Sequential([keras.Input((4, 8)), layers.GRU(8, return_sequences=True, name="gru")], name="encoder")
    y = layers.Bidirectional(layers.LSTM(8), name="both")(shared(inner(shared(x))))
    model = keras.Model(x, layers.Dense(3, name="head")(y))
    assert sorted(found(model)) == sorted(["shared", "encoder/gru", "both/forward_lstm", "both/backward_lstm", "head"])
    assert len(set(found([model, model]))) == len(found([model, model]))


def test_by_default_a_model_leaves_embeddings_and_convolutions_out():
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Embedding(32, 8, name="table"),
            layers.Conv1D(8, 3, name="conv"),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.GRU(8, name="gru"),
            layers.Dropout(0.1),
            layers.Dense(4, name="head"),
        ]
    )
    assert found(model) == ["gru", "head"]
    assert found(model, everything=True) == ["table", "conv", "gru", "head"]
    assert found(model, filters="table|conv") == ["table", "conv"]
    assert found(model.layers[0]) == ["table"], "a layer that is named itself is meant"
    assert found([model.layers[1], model.layers[4]]) == ["conv", "gru"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("gru", ["encoder/gru_a", "encoder/gru_b"]),
        ("^encoder/", ["encoder/gru_a", "encoder/gru_b"]),
        (["gru_b$", "head"], ["encoder/gru_b", "head"]),
        (("gru_b$",), ["encoder/gru_b"]),
        (lambda layer: isinstance(layer, layers.Dense), ["middle", "head"]),
        (re.compile("b$").search and "b$", ["encoder/gru_b"]),
        ("nothing", []),
        ([], []),
    ],
)
def test_filters(filters, expected):
    encoder = keras.Sequential(
        [
            keras.Input((4, 8)),
            layers.GRU(8, return_sequences=True, name="gru_a"),
            layers.GRU(8, name="gru_b"),
        ],
        name="encoder",
    )
    model = keras.Sequential([encoder, layers.Dense(8, name="middle"), layers.Dense(3, name="head")])
    assert found(model, filters) == expected


def test_filters_pick_single_weights():
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(8, name="gru"), layers.Dense(3, name="head")])
    (gru,) = find_prunable_layers(model, "recurrent_kernel")
    assert [spec.name for spec in gru.get_weight_specs() if gru.picks(spec)] == ["recurrent_kernel"]
    pruned = kbs.prune_low_magnitude_block(model, kbs.ConstantSparsity(), (4, 4), filters="gru/recurrent")
    cell = pruned.layers[0].cell
    assert isinstance(cell.recurrent_kernel.constraint, kbs.BlockPruning)
    assert cell.kernel.constraint is None
    unbuilt = kbs.prune_low_magnitude_block(
        layers.GRU(8, name="gru"), kbs.ConstantSparsity(), (4, 4), filters="recurrent_kernel"
    )
    unbuilt.build((None, 4, 8))
    assert isinstance(unbuilt.cell.recurrent_kernel.constraint, kbs.BlockPruning)
    assert unbuilt.cell.kernel.constraint is None


@pytest.mark.parametrize("filters", [3, [1, 2], [None], {"a": 1}])
def test_filters_that_cannot_be(filters):
    with pytest.raises(TypeError, match=re.escape(f"filters={filters!r}")):
        find_prunable_layers(keras.Sequential([layers.Dense(3)]), filters)


@pytest.mark.parametrize("root", [3, "gru", None, object(), [layers.Dense, 3]])
def test_things_that_are_no_layers(root):
    with pytest.raises(TypeError, match="Expected a Keras model or layer.*Received"):
        find_prunable_layers(root)


# ---- layers that need care


@pytest.mark.parametrize(
    ("equation", "output", "shape", "rows"),
    [
        ("ab,bc->ac", 8, (None, 12), 1),
        ("abc,cd->abd", (None, 8), (None, 4, 12), 1),
        ("abc,cde->abde", (None, 2, 8), (None, 4, 12), 1),
        ("abcd,cde->abe", (None, 8), (None, 4, 3, 4), 2),
    ],
)
def test_einsum_dense_is_read_as_inputs_by_outputs(equation, output, shape, rows):
    layer = layers.EinsumDense(equation, output)
    layer.build(shape)
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    kbs.Pruner(layer).step()
    assert_sparsity(layer.kernel, BLOCK, 0.5, row_axes=rows)
    assert layer.kernel.numpy().reshape(12, -1).shape[1] in (8, 16)


def test_einsum_dense_whose_sum_comes_last_is_refused():
    layer = layers.EinsumDense("ab,cb->ac", 8)
    layer.build((None, 12))
    with pytest.warns(UserWarning, match=r"summed axes must come first.*equation='ab,cb->ac'"):
        kbs.prune_low_magnitude_block([layer, built_dense()], HALF, BLOCK)


def built_dense() -> layers.Dense:
    layer = layers.Dense(8)
    layer.build((None, 8))
    return layer


def test_attention_projections_are_pruned():
    layer = layers.MultiHeadAttention(2, 8)
    x = np.random.default_rng(0).normal(size=(2, 4, 16)).astype("float32")
    layer(x, x)
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    kbs.Pruner(layer).step()
    weights = pruned_weights(layer)
    assert len(weights) == 4
    for variable, gates in weights:
        assert_sparsity(variable, BLOCK, 0.5, gates, variable.constraint.row_axes)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Conv1D(8, 3), (None, 16, 8)),
        (layers.Conv2D(8, (3, 2)), (None, 8, 8, 6)),
        (layers.Conv2D(8, 1), (None, 8, 8, 16)),
        (layers.Embedding(40, 10), (None,)),
    ],
)
def test_convolutions_and_embeddings_reach_the_target(layer, shape):
    layer.build(shape)
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    kbs.Pruner(layer).step()
    (variable,) = find_prunable_layers(layer)[0].get_prunable_weights()
    assert_sparsity(variable, BLOCK, 0.5)


def test_an_embedding_in_training(tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Embedding(40, 8), layers.GRU(8), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, HALF, BLOCK, filters="embedding")
    model.compile("adam", "mse")
    random = np.random.default_rng(0)
    watch = Watch(HALF, BLOCK, tmp_path, 1)
    model.fit(
        random.integers(0, 40, (32, 6)), random.normal(size=(32, 3)), batch_size=8, verbose=0,
        callbacks=[watch, kbs.UpdatePruningStep()],
    )  # fmt: skip
    assert len(watch.seen) == 4


def lora_dense() -> layers.Dense:
    layer = built_dense()
    layer.enable_lora(2)
    return layer


def test_a_dense_layer_with_lora_is_left_out_with_its_reason():
    lora, plain = lora_dense(), built_dense()
    model = keras.Sequential([keras.Input((8,)), lora, plain])
    with pytest.warns(UserWarning, match=r"not a plain weight \(LoRA or quantization is on\)"):
        kbs.prune_low_magnitude_block(model, HALF, BLOCK)
    assert [v.path for v, _ in pruned_weights(model)] in ([], [plain.kernel.path])
    kbs.Pruner(model).step()
    assert (plain.kernel.numpy() == 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.array(keras.ops.convert_to_numpy(lora.kernel)).all()


def test_lora_can_be_put_on_a_layer_once_it_is_stripped():
    layer = built_dense()
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    kbs.Pruner(layer).prune_now(0.5)
    kbs.strip_pruning(layer).enable_lora(2)
    assert len(layer.trainable_weights) == 3


def test_only_lora_layers_is_an_error():
    with pytest.raises(ValueError, match=r"Nothing to prune:\n.*LoRA"):
        kbs.prune_low_magnitude_block(keras.Sequential([keras.Input((8,)), lora_dense()]), HALF, BLOCK)


# ---- layers of one's own


@keras.saving.register_keras_serializable("tests")
class Highway(layers.Layer):
    """Has no constraint argument, as most layers people write."""

    def __init__(self, units: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.units = units

    def build(self, shape: Any) -> None:
        self.transform = self.add_weight(shape=(shape[-1], self.units), name="transform")
        self.carry = self.add_weight(shape=(shape[-1], 2 * self.units), name="carry")

    def call(self, x: Any) -> Any:
        gate, _ = keras.ops.split(x @ self.carry, 2, axis=-1)
        return keras.ops.sigmoid(gate) * (x @ self.transform)

    def get_config(self) -> dict:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Careful(layers.Layer):
    """Takes constraints and returns them, as Keras layers do."""

    def __init__(self, units: int = 8, w_constraint: Any = None, w_regularizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.units = units
        self.w_constraint = keras.constraints.get(w_constraint)
        self.w_regularizer = keras.regularizers.get(w_regularizer)

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(
            shape=(shape[-1], self.units), constraint=self.w_constraint, regularizer=self.w_regularizer, name="w"
        )

    def call(self, x: Any) -> Any:
        return x @ self.w

    def get_config(self) -> dict:
        own = {
            "units": self.units,
            "w_constraint": keras.constraints.serialize(self.w_constraint),
            "w_regularizer": keras.regularizers.serialize(self.w_regularizer),
        }
        return {**super().get_config(), **own}


def fit_dense(model: Any, count: int) -> None:
    watch = Watch(HALF, BLOCK, count=count)
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    model.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, np.ones((32, 8)), batch_size=8, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert watch.seen


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("lasso", [None, 0.01])
def test_a_layer_without_a_constraint_argument(registry, built, lasso):
    weights = [kbs.PrunableWeight("transform"), kbs.PrunableWeight("carry", gates=("a", "b"))]
    kbs.register_prunable(Highway, weights=weights)
    layer = Highway()
    if built:
        layer.build((None, 8))
    model = keras.Sequential([kbs.prune_low_magnitude_block(layer, HALF, BLOCK, group_lasso=lasso)])
    fit_dense(model, 2)
    assert layer.carry.constraint.gates == 2
    kbs.strip_pruning(model)
    assert layer.transform.constraint is None
    assert layer.transform.regularizer is None


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("lasso", [None, 0.01])
def test_a_layer_with_a_constraint_argument_keeps_its_pruning_in_copies_and_files(registry, built, lasso, tmp_path):
    kbs.register_prunable(Careful, weights=[kbs.PrunableWeight("w")])
    layer = Careful(w_constraint=keras.constraints.MaxNorm(2.0))
    if built:
        layer.build((None, 8))
    model = keras.Sequential([kbs.prune_low_magnitude_block(layer, HALF, BLOCK, group_lasso=lasso)])
    fit_dense(model, 1)
    model.save(tmp_path / "model.keras")
    fit_dense(keras.models.clone_model(model), 1)
    fit_dense(keras.saving.load_model(tmp_path / "model.keras"), 1)
    kbs.strip_pruning(model)
    assert isinstance(layer.w.constraint, keras.constraints.MaxNorm)
    assert layer.w_regularizer is None


def test_an_adapter_class_of_the_users_own(registry):
    @kbs.register_prunable(Highway)
    class PrunableHighway(kbs.PrunableLayer):
        weights = (kbs.PrunableWeight("transform"),)

    class Special(Highway):
        """Subclasses come along."""

    layer = Special()
    layer.build((None, 8))
    assert names(layer) == ["transform"]
    assert isinstance(find_prunable_layers(layer)[0], PrunableHighway)


def test_a_subclass_of_a_keras_layer_comes_along():
    class MyGRU(layers.GRU):
        pass

    assert names(MyGRU(8)) == ["kernel", "recurrent_kernel"]


class WithWeights(layers.Layer):
    """Says itself what to prune, as layers written for tfmot do."""

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(shape=(shape[-1], 8), name="w")
        self.other = self.add_weight(shape=(shape[-1], 8), name="other")

    def call(self, x: Any) -> Any:
        return x @ self.w + x @ self.other

    def get_prunable_weights(self) -> list:
        return [self.w]


@pytest.mark.parametrize("built", [True, False])
def test_an_object_with_get_prunable_weights(built):
    layer = WithWeights()
    if built:
        layer.build((None, 8))
    fit_dense(keras.Sequential([kbs.prune_low_magnitude_block(layer, HALF, BLOCK)]), 1)
    assert (layer.w.numpy() == 0).mean() == 0.5
    assert layer.other.numpy().all()


def test_a_gru_that_names_its_weights_keeps_its_gates():
    class Named(layers.GRU):
        def get_prunable_weights(self) -> list:
            return [self.cell.recurrent_kernel]

    model = keras.Sequential([keras.Input((4, 8)), Named(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, HALF, BLOCK, filters="named")
    kbs.Pruner(model).step()
    assert_sparsity(model.layers[0].cell.recurrent_kernel, BLOCK, 0.5, 3)
    assert model.layers[0].cell.kernel.numpy().all()


def test_a_plain_object_with_weights_and_no_layer_at_all():
    class Holder:
        def __init__(self) -> None:
            self.w = keras.Variable(np.random.default_rng(0).normal(size=(8, 8)).astype("float32"))

        def get_prunable_weights(self) -> list:
            return [self.w]

    holder = Holder()
    kbs.prune_low_magnitude_block(holder, HALF, BLOCK)
    kbs.Pruner(holder).step()
    assert_sparsity(holder.w, BLOCK, 0.5)


def test_an_rnn_with_a_cell_of_the_users_own(registry):
    @keras.saving.register_keras_serializable("tests")
    class MinimalCell(layers.Layer):
        def __init__(self, units: int, **options: Any) -> None:
            super().__init__(**options)
            self.units = self.state_size = units

        def build(self, shape: Any) -> None:
            self.inner = self.add_weight(shape=(shape[-1], self.units), name="inner")
            self.recurrent = self.add_weight(shape=(self.units, self.units), name="recurrent")

        def call(self, x: Any, states: Any) -> Any:
            y = keras.ops.tanh(x @ self.inner + states[0] @ self.recurrent)
            return y, [y]

    weights = [
        kbs.PrunableWeight("inner", kind="recurrent"),
        kbs.PrunableWeight("recurrent", kind="recurrent", diagonal=True),
    ]
    kbs.register_prunable(MinimalCell, weights=weights)
    model = keras.Sequential([keras.Input((4, 8)), layers.RNN(MinimalCell(12)), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, HALF, BLOCK, filters="rnn")
    model.compile("sgd", "mse")
    x, y = sequence_data()
    watch = Watch(HALF, BLOCK, count=2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[watch, kbs.UpdatePruningStep()])
    assert len(watch.seen) == 4


@pytest.mark.parametrize("arguments", [(), ("Highway",), (Highway(),)])
def test_register_takes_classes(arguments):
    with pytest.raises(TypeError, match="takes layer classes"):
        kbs.register_prunable(*arguments)


def test_register_decorates_adapters():
    with pytest.raises(TypeError, match="decorates a subclass of PrunableLayer"):
        kbs.register_prunable(Highway)(Highway)


def test_a_weight_name_that_is_not_there_is_said(registry):
    kbs.register_prunable(Highway, weights=[kbs.PrunableWeight("transfrom")])
    layer = Highway()
    layer.build((None, 8))
    with pytest.raises((ValueError, AttributeError), match="transfrom"):
        kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
