"""prune_low_magnitude_block, Pruner, strip_pruning and sparsity: what they do, and what they say when they cannot."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from _helpers import (
    BLOCK_SIZES,
    GATES,
    assert_sparsity,
    block_zeros,
    cut,
    pruned_weights,
    sequence_data,
    split_gates,
    updates,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import keras_blocksparse as kbs

BLOCK = (4, 4)
HALF = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=0, frequency=1)


def gru_model(units: int = 16, features: int = 8) -> keras.Model:
    return keras.Sequential([keras.Input((4, features)), layers.GRU(units), layers.Dense(8, name="head")])


def fit(model: Any, epochs: int = 1, **compile_options: Any) -> Any:
    x, y = sequence_data(outputs=8)
    model.compile(**{"optimizer": "sgd", "loss": "mse", **compile_options})
    return model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[kbs.UpdatePruningStep()])


# ---- what it returns and leaves


def test_it_works_in_place_and_returns_what_it_was_given():
    model, layer = gru_model(), layers.GRU(8)
    several = [layers.Dense(8), layers.Dense(8)]
    assert kbs.prune_low_magnitude_block(model, HALF, BLOCK) is model
    assert kbs.prune_low_magnitude_block(layer, HALF, BLOCK) is layer
    assert kbs.prune_low_magnitude_block(several, HALF, BLOCK) is several


def test_pruning_and_stripping_change_no_output_object_name_or_optimizer():
    model = gru_model()
    model.compile("adam", "mse")
    x, y = sequence_data(outputs=8)
    model.fit(x, y, verbose=0)
    before, weights, optimizer = model.predict(x, verbose=0), list(model.weights), model.optimizer
    kbs.prune_low_magnitude_block(model, HALF, BLOCK)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    assert model.optimizer is optimizer
    assert [type(layer).__name__ for layer in model.layers] == ["GRU", "Dense"]
    kbs.strip_pruning(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))


def test_stripping_after_training_changes_no_output():
    model = kbs.prune_low_magnitude_block(gru_model(), HALF, BLOCK)
    fit(model)
    x, _ = sequence_data()
    before = model.predict(x, verbose=0)
    kbs.strip_pruning(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert not pruned_weights(model)
    assert kbs.sparsity(model) == pytest.approx(0.5, abs=0.02)
    kbs.strip_pruning(model)  # twice is no harm


def test_a_sparsity_of_zero_is_no_operation():
    keras.utils.set_random_seed(3)
    plain = gru_model()
    model = keras.models.clone_model(plain)
    model.set_weights(plain.get_weights())
    nothing = kbs.ConstantSparsity(target_sparsity=0.0, begin_step=0, frequency=1)
    kbs.prune_low_magnitude_block(model, nothing, BLOCK)
    x, y = sequence_data(outputs=8)
    for one, callbacks in ((plain, []), (model, [kbs.UpdatePruningStep()])):
        one.compile(keras.optimizers.SGD(0.1), "mse")
        one.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=callbacks)
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_extreme_sparsity_leaves_one_block_of_every_gate_and_warns():
    model = kbs.prune_low_magnitude_block(
        gru_model(), kbs.ConstantSparsity(target_sparsity=0.999, frequency=1), BLOCK, filters="gru"
    )
    pruner = kbs.Pruner(model)
    with pytest.warns(UserWarning, match=r"gate [zrh] is asked to be 99.9% zero and is left at.*so few blocks"):
        pruner.step()
    for variable, gates in pruned_weights(model):
        assert block_zeros(variable.numpy(), BLOCK, gates) == [variable.shape[0] * 16 - 16] * 3


def test_inference_needs_no_callback():
    model = kbs.prune_low_magnitude_block(gru_model(), HALF, BLOCK)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.isfinite(model.predict(sequence_data()[0], verbose=0)).all()


def test_biases_are_never_pruned():
    model = kbs.prune_low_magnitude_block(gru_model(), HALF, BLOCK)
    for layer in model.layers:
        for weight in layer.weights:
            if "bias" in weight.path:
                weight.assign(np.ones(weight.shape))
    kbs.Pruner(model).prune_now(0.9)
    assert all(w.numpy().all() for w in model.weights if "bias" in w.path)


# ---- masks against an oracle


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(GATES)), units=st.integers(1, 40), features=st.integers(1, 40),
    block=st.sampled_from(BLOCK_SIZES), sparsity=st.floats(0, 0.97), score=st.sampled_from(["max", "mean", "l2"]),
)  # fmt: skip
def test_prune_now_zeroes_the_lowest_blocks_of_each_gate(kind, units, features, block, sparsity, score):
    layer = getattr(layers, kind)(units)
    layer.build((None, 3, features))
    before = {w.path: w.numpy().astype(np.float64) for w in layer.weights}
    fits = {"kernel": block[0] <= features and block[1] <= units, "recurrent_kernel": max(block) <= units}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if not any(fits.values()):
            with pytest.raises(ValueError, match=r"No weight can be pruned with block_size="):
                kbs.prune_low_magnitude_block(layer, HALF, block)
            return
        kbs.prune_low_magnitude_block(layer, HALF, block, score=score)
        kbs.Pruner(layer).prune_now(sparsity)
    representative = {
        "max": lambda b: np.abs(b).max(), "mean": lambda b: np.abs(b).mean(), "l2": lambda b: np.sqrt((b**2).mean()),
    }[score]  # fmt: skip
    for name, fit_block in fits.items():
        variable = getattr(layer.cell, name)
        if not fit_block:
            np.testing.assert_array_equal(variable.numpy(), before[variable.path])
            continue
        assert_sparsity(variable, block, sparsity, GATES[kind])
        for old, new in zip(
            split_gates(before[variable.path], GATES[kind]), split_gates(variable.numpy(), GATES[kind]), strict=True
        ):
            pairs = list(zip(cut(old, block), cut(new, block), strict=True))
            gone = [representative(a) for a, b in pairs if not b.any()]
            kept = [representative(a) for a, b in pairs if b.any()]
            assert max(gone, default=0) <= min(kept) * (1 + 1e-5)
            assert all((a == b).all() for a, b in pairs if b.any()), "what is kept is not touched"


def test_prune_now_by_threshold():
    layer = layers.Dense(16)
    layer.build((None, 16))
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    expected = np.mean([np.sqrt((block**2).mean()) < 0.25 for block in cut(layer.kernel.numpy(), BLOCK)])
    assert 0 < expected < 1
    assert kbs.Pruner(layer).prune_now(threshold=0.25) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "sparsity=None, threshold=None"),
        ({"sparsity": 0.5, "threshold": 0.1}, "sparsity=0.5, threshold=0.1"),
        ({"sparsity": 1.0}, r"\[0, 1\).*sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
    ],
)
def test_prune_now_says_what_it_cannot(arguments, words):
    pruner = kbs.Pruner(kbs.prune_low_magnitude_block(gru_model(), HALF, BLOCK))
    with pytest.raises(ValueError, match=words):
        pruner.prune_now(**arguments)


def test_the_diagonal_is_kept_and_the_sparsity_is_what_it_was():
    model = kbs.prune_low_magnitude_block(gru_model(32), HALF, BLOCK, filters="gru", keep_diagonal=True)
    cell = model.layers[0].cell
    cell.recurrent_kernel.assign(cell.recurrent_kernel.numpy() * (1 - np.tile(0.99 * np.eye(32), 3)))
    kbs.Pruner(model).prune_now(0.75)
    for gate in split_gates(cell.recurrent_kernel.numpy(), 3):
        assert np.diag(gate).all()
    assert_sparsity(cell.recurrent_kernel, BLOCK, 0.75, 3)
    assert_sparsity(cell.kernel, BLOCK, 0.75, 3)


def test_a_diagonal_that_does_not_fit_warns():
    model = kbs.prune_low_magnitude_block(gru_model(16), HALF, (8, 8), filters="gru", keep_diagonal=True)
    with pytest.warns(UserWarning, match="is asked to be 75.0% zero") as caught:
        kbs.Pruner(model).prune_now(0.75)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 3
    assert all("recurrent_kernel" in text and "keep_diagonal" in text and "left at 50.0%" in text for text in told)


def test_blocks_come_back_with_revival_and_do_not_without():
    def masks(revival: bool) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = gru_model(16)
        kbs.prune_low_magnitude_block(model, HALF, (1, 1), filters="gru", revival=revival)
        result = []

        class Record(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                result.append(np.concatenate([v.numpy().ravel() == 0 for v, _ in pruned_weights(self.model)]))

        x, y = sequence_data(outputs=8)
        model.compile(keras.optimizers.Adam(0.1), "mse")
        model.fit(x, y, batch_size=8, epochs=6, verbose=0, callbacks=[kbs.UpdatePruningStep(), Record()])
        return result

    back = [(a & ~b).any() for a, b in itertools.pairwise(masks(True))]
    assert any(back), "some block comes back"
    without = masks(False)
    assert not any((a & ~b).any() for a, b in itertools.pairwise(without)), "none comes back"


def test_after_the_end_nothing_comes_back_even_with_revival():
    schedule = kbs.PolynomialDecay(final_sparsity=0.5, begin_step=0, end_step=2, frequency=1)
    model = kbs.prune_low_magnitude_block(gru_model(32), schedule, BLOCK, filters="gru")
    fit(model, optimizer=keras.optimizers.Adam(0.05))
    masks = [v.numpy() == 0 for v, _ in pruned_weights(model)]
    x, y = sequence_data(outputs=8)
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    for mask, (variable, _) in zip(masks, pruned_weights(model), strict=True):
        np.testing.assert_array_equal(variable.numpy() == 0, mask)


# ---- distributions in a model


def shares(model: Any) -> dict[str, list[float]]:
    return {
        variable.path.split("/", 1)[-1]: [
            zeros * gates / variable.numpy().size for zeros in block_zeros(variable.numpy(), BLOCK, gates)
        ]
        for variable, gates in pruned_weights(model)
    }


def test_gate_densities_reach_the_gates():
    model = gru_model(40)
    distribution = kbs.Uniform(gate_density={"z": 1, "r": 1, "h": 4})
    kbs.prune_low_magnitude_block(model, HALF, BLOCK, filters="gru", distribution=distribution)
    kbs.Pruner(model).prune_now(0.9)
    for z, r, h in shares(model).values():
        assert (z, r, h) == pytest.approx((0.95, 0.95, 0.8), abs=0.03)


def test_layer_overrides_reach_the_layers():
    model = keras.Sequential([keras.Input((4, 16)), layers.GRU(32, name="encoder"), layers.Dense(32, name="decoder")])
    schedule = kbs.PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=4, frequency=1)
    distribution = kbs.Uniform(layer_sparsity={"decoder": 0.5, "encoder/recurrent": 0.0})
    kbs.prune_low_magnitude_block(model, schedule, BLOCK, distribution=distribution)
    kbs.Pruner(model).step(4)
    encoder, decoder = model.layers
    assert_sparsity(encoder.cell.kernel, BLOCK, 0.9, 3)
    assert encoder.cell.recurrent_kernel.numpy().all()
    assert_sparsity(decoder.kernel, BLOCK, 0.5)


@pytest.mark.parametrize("distribution", ["erk", "global", "per_layer_type", kbs.Global(min_sparsity=0.3)])
def test_other_distributions_reach_the_total(distribution, tmp_path):
    model = keras.Sequential([keras.Input((4, 16)), layers.GRU(32), layers.Dense(32), layers.Dense(64)])
    schedule = kbs.PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=3, frequency=1)
    kbs.prune_low_magnitude_block(model, schedule, BLOCK, distribution=distribution)
    model.compile("adam", "mse")
    x, _ = sequence_data(features=16)
    model.fit(x, np.ones((32, 64)), batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    assert kbs.sparsity(model) == pytest.approx(0.8, abs=0.01)
    assert len({round(share, 2) for part in shares(model).values() for share in part}) > 1


def test_layers_pruned_by_calls_of_their_own_follow_their_own_schedules():
    model = keras.Sequential([keras.Input((4, 16)), layers.GRU(32), layers.Dense(32)])
    kbs.prune_low_magnitude_block(model.layers[0], kbs.ConstantSparsity(target_sparsity=0.75, frequency=1), (8, 4))
    kbs.prune_low_magnitude_block(model.layers[1], kbs.ConstantSparsity(target_sparsity=0.25, begin_step=3), (4, 4))
    pruner = kbs.Pruner(model)
    pruner.step(1)
    assert_sparsity(model.layers[0].cell.kernel, (8, 4), 0.75, 3)
    assert model.layers[1].kernel.numpy().all()
    pruner.step(3)
    assert_sparsity(model.layers[1].kernel, BLOCK, 0.25)


def test_pruning_again_replaces_schedule_and_lasso_and_keeps_the_users_own():
    layer = layers.Dense(16, kernel_constraint="non_neg", kernel_regularizer="l2")
    layer.build((None, 16))
    for _ in range(3):
        kbs.prune_low_magnitude_block(layer, HALF, BLOCK, group_lasso=0.1)
    assert isinstance(layer.kernel.constraint.constraint, keras.constraints.NonNeg)
    kbs.prune_low_magnitude_block(layer, HALF, BLOCK)
    assert isinstance(layer.kernel.regularizer, keras.regularizers.L2)
    kbs.strip_pruning(layer)
    assert isinstance(layer.kernel.constraint, keras.constraints.NonNeg)
    assert isinstance(layer.kernel.regularizer, keras.regularizers.L2)


# ---- BP, GL, GLP and the threshold ramp


def lasso_value(model: Any, block: tuple[int, int] = BLOCK) -> float:
    return sum(
        np.linalg.norm(b)
        for variable, gates in pruned_weights(model)
        for gate in split_gates(variable.numpy().astype(np.float64), gates)
        for b in cut(gate, block)
    )


def test_bp_gl_and_glp_each_from_one_argument():
    ends = {}
    schedule = kbs.PolynomialDecay(final_sparsity=0.5, begin_step=1, end_step=8, frequency=1)
    for name, (ramp, lasso) in {"BP": (schedule, None), "GL": (None, 0.05), "GLP": (schedule, 0.05)}.items():
        keras.utils.set_random_seed(0)
        model = kbs.prune_low_magnitude_block(gru_model(), ramp, BLOCK, group_lasso=lasso, filters="gru")
        history = fit(model, epochs=4)
        assert np.isfinite(history.history["loss"]).all()
        assert all(np.isfinite(w).all() for w in model.get_weights())
        ends[name] = (kbs.sparsity(model), lasso_value(model))
    assert ends["BP"][0] == ends["GLP"][0] == pytest.approx(0.5, abs=0.05)
    assert ends["GL"][0] == 0, "by itself it never lands on zero"
    assert ends["GLP"][1] < ends["BP"][1]


def test_gl_cuts_the_small_blocks_by_a_threshold():
    model = kbs.prune_low_magnitude_block(gru_model(), None, BLOCK, group_lasso=0.05, filters="gru")
    fit(model)
    energies = [
        np.sqrt((b**2).mean())
        for v, g in pruned_weights(model)
        for m in split_gates(v.numpy(), g)
        for b in cut(m, BLOCK)
    ]
    threshold = float(np.median(energies))
    assert kbs.Pruner(model).prune_now(threshold=threshold) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("off_at_end", [True, False])
@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_lambda_goes_to_zero_at_the_end_of_the_schedule_and_masks_stay(off_at_end, how):
    schedule = kbs.PolynomialDecay(final_sparsity=0.5, begin_step=1, end_step=5, frequency=1)
    lasso = kbs.GroupLassoRegularizer(0.25, (2, 2), off_at_end=off_at_end)
    model = kbs.prune_low_magnitude_block(gru_model(), schedule, BLOCK, group_lasso=lasso, filters="gru")
    update, penalties = kbs.UpdatePruningStep(), []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            strength = set(update.pruner.strengths.values())
            assert len(strength) == 1
            penalties.append((updates(model), strength.pop(), float(sum(model.losses)), lasso_value(model)))

    x, y = sequence_data(outputs=8)
    model.compile("sgd", "mse", **how)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[update, Record()])
    for step, strength, loss, norms in penalties:
        assert strength == (0.25 if step < 5 or not off_at_end else 0.0), step
        assert loss == pytest.approx(strength * norms, rel=1e-3), step
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.5, gates)


def test_lambda_is_taken_out_of_the_compiled_gradient():
    # All data zero, so that only the penalty moves the weights: they stop when the schedule ends.
    schedule = kbs.PolynomialDecay(final_sparsity=0.5, begin_step=1, end_step=3, frequency=1)
    layer = layers.Dense(8, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    kbs.prune_low_magnitude_block(model, schedule, BLOCK, group_lasso=0.1)
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(layer.kernel.numpy())

    model.compile(keras.optimizers.SGD(0.1), "mse")
    zeros = np.zeros((48, 8), "float32")
    model.fit(zeros, zeros, batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep(), Record()])
    moves = [bool(np.abs(b - a).max() > 1e-6) for a, b in itertools.pairwise(seen[2:])]
    assert np.abs(seen[1] - seen[0]).max() > 1e-4
    assert not any(moves), moves


def test_the_users_regularizer_is_kept_beside_group_lasso():
    layer = layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.5))
    model = keras.Sequential([keras.Input((8,)), layer])
    kbs.prune_low_magnitude_block(model, HALF, BLOCK, group_lasso=0.1)
    kbs.Pruner(model)
    kernel = layer.kernel.numpy().astype(np.float64)
    expected = 0.5 * (kernel**2).sum() + 0.1 * sum(np.linalg.norm(b) for b in cut(kernel, BLOCK))
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    kbs.strip_pruning(model)
    assert float(sum(model.losses)) == pytest.approx(0.5 * (kernel**2).sum(), rel=1e-5)


Q = {"max": {"recurrent": 0.1045, "dense": 0.18}, "l2": {"recurrent": 0.06, "dense": 0.105}}


@pytest.mark.parametrize("score", Q)
def test_a_threshold_ramp_zeroes_what_lies_below_it(score):
    model = gru_model(32, 16)
    ramp = kbs.ThresholdRamp(q=Q[score], begin_step=0, ramp_step=200, end_step=400)
    kbs.prune_low_magnitude_block(model, ramp, BLOCK, score=score)
    pruner = kbs.Pruner(model)
    before = [(v.numpy().astype(np.float64), g) for v, g in pruned_weights(model)]
    representative = (lambda b: np.abs(b).max()) if score == "max" else (lambda b: np.sqrt((b**2).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruner.step(400)
    # Eq. 1, Eq. 2 and Algorithm 1 at the last step
    theta = 2 * 100 / (2 * 200 + 3 * 200) * 16 ** (1 / 4)
    eps = {kind: q * (theta * 201 + 1.5 * theta * 201) / 100 for kind, q in ramp.q.items()}
    assert pruner.thresholds == pytest.approx(eps)
    some = 0
    for (old, gates), (variable, _) in zip(before, pruned_weights(model), strict=True):
        kind = "dense" if "head" in variable.path else "recurrent"
        for a, b in zip(split_gates(old, gates), split_gates(variable.numpy(), gates), strict=True):
            low = [representative(block) < eps[kind] for block in cut(a, BLOCK)]
            assert low == [not block.any() for block in cut(b, BLOCK)]
            some += sum(low)
    assert some


def test_a_threshold_ramp_cannot_collapse_a_layer():
    model = gru_model(32, 16)
    ramp = kbs.ThresholdRamp(q=10.0, begin_step=0, ramp_step=2, end_step=4, frequency=1, max_sparsity=0.9)
    kbs.prune_low_magnitude_block(model, ramp, BLOCK)
    pruner = kbs.Pruner(model)
    with pytest.warns(UserWarning, match=r"threshold .* would zero 100.0% of .*held at max_sparsity=0.9"):
        pruner.step(4)
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, 0.9, gates)


def test_a_ramp_read_off_a_dense_model_ends_at_its_sparsity():
    model = gru_model(32)
    ramp = kbs.ThresholdRamp.from_dense(model, sparsity=0.9, epochs=50, steps_per_epoch=100)
    kbs.prune_low_magnitude_block(model, ramp, (1, 1))
    kbs.Pruner(model).step(ramp.end_step)
    assert kbs.sparsity(model) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        (HALF, "broad"),
        (kbs.ThresholdRamp(q=0.9, begin_step=0, ramp_step=2, end_step=4, frequency=1, max_sparsity=0.5), "peaked"),
    ],
)
def test_by_default_blocks_go_by_their_energy_and_under_the_papers_threshold_by_their_largest_weight(schedule, kept):
    layer = layers.Dense(4, use_bias=False)
    layer.build((None, 8))
    blocks = {"broad": np.full((4, 4), 0.5), "peaked": np.diag([1.0, 0, 0, 0]) + 0.01}
    layer.kernel.assign(np.concatenate(list(blocks.values())))
    kbs.prune_low_magnitude_block(layer, schedule, BLOCK)
    kbs.Pruner(layer).step(4)
    np.testing.assert_allclose(
        layer.kernel.numpy(), np.concatenate([block * (name == kept) for name, block in blocks.items()]), rtol=1e-6
    )


def test_with_a_neighborhood_a_weak_block_among_strong_ones_stays_and_a_stronger_one_alone_goes():
    layer = layers.Dense(16, use_bias=False)
    layer.build((None, 8))
    # Two neighborhoods of 8x8, four blocks each: the left one is strong but for one block.
    blocks = np.array([[4.0, 4.0, 2.0, 0.1], [4.0, 1.0, 0.1, 0.1]])
    for neighborhood, kept in [
        (None, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ((8, 8), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ((16, 16), [[1, 1, 1, 0], [1, 0, 0, 0]]),  # larger than the weight: all are neighbors
    ]:
        layer.kernel.assign(np.kron(blocks, np.ones((4, 4))))
        kbs.prune_low_magnitude_block(layer, HALF, BLOCK, neighborhood=neighborhood)
        kbs.Pruner(layer).step(0)
        np.testing.assert_allclose(layer.kernel.numpy(), np.kron(blocks * kept, np.ones((4, 4))), rtol=1e-6)
        kbs.strip_pruning(layer)


def test_a_score_of_a_file_that_keras_could_not_save_becomes_the_default():
    from keras_blocksparse.constraints import PruningSettings
    from keras_blocksparse.serialization import LostObject

    assert PruningSettings(HALF, score=LostObject("my_score")).score == "l2"


# ---- bad input


def prune(**change: Any) -> Any:
    arguments = {"to_prune": gru_model(), "pruning_schedule": HALF, "block_size": BLOCK, **change}
    return kbs.prune_low_magnitude_block(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_size": (64, 64)}, ValueError, r"No weight can be pruned with block_size=\(64, 64\).*\n.*8 x 16"),
        ({"block_size": (-4, 4)}, ValueError, r"block_size=\(-4, 4\)"),
        ({"block_size": (0, 4)}, ValueError, r"block_size=\(0, 4\)"),
        ({"block_size": (4.0, 4)}, TypeError, r"block_size=\(4.0, 4\)"),
        ({"block_size": 4}, ValueError, "block_size=4"),
        ({"score": "median"}, ValueError, "score='median'"),
        ({"neighborhood": (8, 6)}, ValueError, r"multiples of the block's.*neighborhood=\(8, 6\)"),
        ({"neighborhood": "wide"}, ValueError, "neighborhood='wide'"),
        ({"distribution": "unifrom"}, ValueError, "distribution='unifrom'"),
        ({"pruning_schedule": 0.9}, TypeError, "pruning_schedule=0.9"),
        ({"pruning_schedule": "fast"}, TypeError, "pruning_schedule='fast'"),
        ({"pruning_schedule": None}, ValueError, "pruning_schedule=None, group_lasso=None"),
        ({"group_lasso": -1.0}, ValueError, "strength=-1.0"),
        ({"group_lasso": "strong"}, (TypeError, ValueError), "'strong'"),
        ({"filters": 3}, TypeError, "filters=3"),
        ({"filters": "lstm"}, ValueError, r"filters='lstm' picks none.*gru"),
        ({"to_prune": keras.Input((3,))}, TypeError, "Expected a Keras model or layer"),
        ({"to_prune": 3}, TypeError, "Received: 3 of type int"),
        ({"to_prune": []}, ValueError, "no layer to prune"),
        ({"to_prune": layers.Dropout(0.5)}, ValueError, "no layer to prune.*Dropout"),
        ({"to_prune": layers.BatchNormalization()}, ValueError, "no layer to prune"),
        ({"to_prune": keras.Sequential([layers.Flatten(), layers.ReLU()])}, ValueError, "no layer to prune"),
        ({"to_prune": keras.Sequential([layers.Conv1D(8, 3)])}, ValueError, r"no `filters` picks none.*conv1d"),
        (
            {"distribution": kbs.Uniform(layer_sparsity={"gru": 0.5}), "pruning_schedule": lambda step: (True, 0.5)},
            ValueError,
            "final_sparsity",
        ),
        ({"keep_diagonal": "yes"}, TypeError, "keep_diagonal='yes'"),
        ({"revival": None}, TypeError, "revival=None"),
    ],
)  # fmt: skip
def test_bad_input_is_quoted(change, error, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(error, match=words):
            prune(**change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad):
    model = gru_model()
    kernel = model.layers[0].cell.recurrent_kernel
    kernel.assign(np.where(np.arange(48) == 7, bad, kernel.numpy()))
    with pytest.raises(ValueError, match=r"gru.*recurrent_kernel holds NaN or infinity"):
        kbs.prune_low_magnitude_block(model, HALF, BLOCK)


def test_weights_that_diverge_under_pruning_are_named():
    model = prune()
    pruner = kbs.Pruner(model)
    model.layers[1].kernel.assign(np.full((16, 8), np.nan))
    with pytest.raises(ValueError, match=r"head.*kernel holds NaN or infinity"):
        pruner.step()


def test_a_weight_too_small_is_left_alone_with_a_warning_and_the_rest_is_pruned():
    with pytest.warns(UserWarning, match=r"head/kernel is not pruned.*16 x 8.*\(8, 16\)"):
        model = prune(block_size=(8, 16))
    assert len(pruned_weights(model)) == 2


def test_a_failed_call_leaves_the_model_as_it_was():
    model = gru_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match="No weight can be pruned"):
            prune(to_prune=model, block_size=(64, 64))
    assert all(w.constraint is None for w in model.weights)
    kernel = model.layers[1].kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match="NaN"):
        prune(to_prune=model)
    assert all(w.constraint is None for w in model.weights)


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, float("nan")])
def test_a_callable_that_asks_for_the_impossible_is_told(share):
    pruner = kbs.Pruner(prune(pruning_schedule=lambda step: (True, share)))
    with pytest.raises(ValueError, match=r"must give a sparsity in \[0, 1\).*at step 1"):
        pruner.step()


def test_pruner_says_what_is_missing():
    with pytest.raises(ValueError, match=r"Nothing in .* is under pruning.*prune_low_magnitude_block"):
        kbs.Pruner(gru_model())
    unbuilt = keras.Sequential([kbs.prune_low_magnitude_block(layers.GRU(8), HALF, BLOCK)])
    with pytest.raises(ValueError, match="not built yet"):
        kbs.Pruner(unbuilt)
    small = keras.Sequential([kbs.prune_low_magnitude_block(layers.GRU(8), HALF, (16, 16))])
    small.build((None, 4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=r"No weight can be pruned.*\n.*8 x 8"):
            kbs.Pruner(small)


# ---- sparsity()


def test_sparsity_counts_zero_elements_of_pruned_weights():
    model = prune(filters="gru")
    kbs.Pruner(model).prune_now(0.5)
    weights = [v.numpy() for v, _ in pruned_weights(model)]
    expected = sum((w == 0).sum() for w in weights) / sum(w.size for w in weights)
    assert kbs.sparsity(model) == pytest.approx(expected)
    assert kbs.sparsity(model.layers[0]) == pytest.approx(expected)
    assert kbs.sparsity([model.layers[0]]) == pytest.approx(expected)


def test_sparsity_of_a_plain_model_is_over_all_that_could_be_pruned():
    model = gru_model()
    assert kbs.sparsity(model) == 0
    model.layers[1].kernel.assign(np.zeros((16, 8)))
    total = 8 * 48 + 16 * 48 + 16 * 8
    assert kbs.sparsity(model) == pytest.approx(128 / total)


def test_sparsity_says_what_it_cannot():
    with pytest.raises(ValueError, match="Build the model first"):
        kbs.sparsity(keras.Sequential([layers.GRU(8)]))
    with pytest.raises(ValueError, match="no prunable layer"):
        kbs.sparsity(keras.Sequential([keras.Input((4,)), layers.Flatten()]))
    with pytest.raises(TypeError, match="Expected a Keras model or layer"):
        kbs.sparsity(np.ones((4, 4)))
