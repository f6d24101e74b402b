"""How a sparsity is spread over layers and gates: totals, proportions, bounds, overrides."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from keras_blocksparse import distributions
from keras_blocksparse.distributions import Part, fill_densities

fast = settings(max_examples=60)


def part(rows: int, cols: int, layer: str = "gru", gate: str = "", kind: str = "recurrent", scale: float = 1.0) -> Part:
    """A part cut into 4x4 blocks, with scores drawn from its name."""
    grid = kbs.BlockGrid((rows, cols), (4, 4))
    random = np.random.default_rng([rows, cols, *map(ord, layer + gate)])
    return Part(layer, "kernel", gate, kind, (rows, cols), grid.elements, scale * random.random(grid.grid_shape[1:]))


def total(parts: list[Part], sparsities: np.ndarray) -> float:
    sizes = [rows * cols for rows, cols in (p.shape for p in parts)]
    return float(np.dot(sparsities, sizes) / sum(sizes))


shapes = st.lists(st.tuples(st.integers(4, 64), st.integers(4, 64)), min_size=1, max_size=6)


@st.composite
def part_lists(draw: st.DrawFn) -> list[Part]:
    return [part(rows, cols, f"layer{i}", kind=f"kind{i % 2}") for i, (rows, cols) in enumerate(draw(shapes))]


# ---- uniform


@fast
@given(parts=part_lists(), sparsity=st.floats(0, 0.99))
def test_uniform_is_the_same_everywhere(parts, sparsity):
    assert kbs.Uniform()(parts, sparsity).tolist() == [sparsity] * len(parts)


# ---- ERK


@fast
@given(parts=part_lists(), sparsity=st.floats(0, 0.99))
def test_erk_reaches_the_target_and_keeps_its_proportions(parts, sparsity):
    result = kbs.ERK()(parts, sparsity)
    assert ((result >= 0) & (result <= 1)).all()
    assert total(parts, result) == pytest.approx(sparsity, abs=1e-9)
    ratio = np.array([(p.shape[0] + p.shape[1]) / (p.shape[0] * p.shape[1]) for p in parts])
    sparse = result > 1e-9
    if sparse.any():
        factors = (1 - result[sparse]) / ratio[sparse]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
        # What is dense would have gone beyond 1 by that proportion.
        assert (ratio[~sparse] * factors[0] >= 1 - 1e-6).all()


def test_erk_by_hand():
    # densities 2 e and 1.25 e... : (8 + 8) / 64 = 0.25 and (32 + 8) / 256 = 0.15625, sizes 64 and 256, density 0.25:
    # e = 80 / (0.25 * 64 + 0.15625 * 256) = 80 / 56
    parts = [part(8, 8, "a"), part(32, 8, "b")]
    np.testing.assert_allclose(1 - kbs.ERK()(parts, 0.75), [0.25 * 80 / 56, 0.15625 * 80 / 56])


@fast
@given(
    relative=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    sizes=st.lists(st.integers(1, 1000), min_size=8, max_size=8),
    density=st.floats(0.001, 1),
)
def test_densities_that_would_pass_one_are_cut_and_the_rest_gets_more(relative, sizes, density):
    relative, sizes = np.array(relative), np.array(sizes[: len(relative)], float)
    result = fill_densities(relative, sizes, density)
    assert ((result >= 0) & (result <= 1 + 1e-9)).all()
    assert np.dot(result, sizes) / sizes.sum() == pytest.approx(density, rel=1e-6)
    order = np.argsort(relative)
    assert (np.diff(result[order]) >= -1e-9).all(), "who asks for more gets no less"


# ---- global


def zeros_of_a_common_cut(parts: list[Part], sparsity: float) -> list[int]:
    """Rank the blocks of all parts in one list and zero the lowest until the target is reached."""
    ranked = sorted(
        (score, size, i)
        for i, p in enumerate(parts)
        for score, size in zip(p.scores.ravel(), p.elements.ravel(), strict=True)
    )
    zeros, target = [0] * len(parts), sparsity * sum(p.size for p in parts)
    for _, size, i in ranked:
        if sum(zeros) + size > target + 0.5:
            break
        zeros[i] += size
    return zeros


@fast
@given(parts=part_lists(), sparsity=st.floats(0, 0.95))
def test_global_without_bounds_is_one_ranking_over_all(parts, sparsity):
    result = kbs.Global(min_sparsity=0, max_sparsity=1)(parts, sparsity)
    expected = [z / p.size for z, p in zip(zeros_of_a_common_cut(parts, sparsity), parts, strict=True)]
    np.testing.assert_allclose(result, expected, atol=1e-12)


@settings(max_examples=150)
@given(
    parts=part_lists(),
    sparsity=st.floats(0, 0.95),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    scales=st.lists(st.sampled_from([0.01, 1.0, 100.0]), min_size=6, max_size=6),
)
def test_global_keeps_its_bounds_and_still_reaches_the_target(parts, sparsity, bounds, scales):
    import dataclasses

    low, high = bounds
    parts = [dataclasses.replace(p, scores=p.scores * s) for p, s in zip(parts, scales, strict=False)]
    result = kbs.Global(min_sparsity=low, max_sparsity=high)(parts, sparsity)
    assert (result >= min(low, sparsity) - 1e-9).all()
    assert (result <= max(high, sparsity) + 1e-9).all()
    largest = max(p.elements.max() for p in parts)
    off = abs(total(parts, result) - sparsity) * sum(p.size for p in parts)
    assert off <= largest, f"{off} elements off, blocks have up to {largest}"


def test_a_layer_with_small_weights_is_pruned_more():
    parts = [part(32, 32, "small", scale=0.1), part(32, 32, "large")]
    small, large = kbs.Global(max_sparsity=0.95)(parts, 0.5)
    assert small == pytest.approx(0.95, abs=0.02)
    assert large == pytest.approx(0.05, abs=0.02)


def test_per_layer_type_ranks_each_kind_by_itself():
    parts = [
        part(32, 32, "a", kind="recurrent"),
        part(32, 32, "b", kind="recurrent", scale=0.01),
        part(32, 32, "c", kind="dense", scale=1e-4),
    ]
    result = distributions.get("per_layer_type")(parts, 0.5)
    assert result[2] == pytest.approx(0.5, abs=0.01)
    assert result[1] > 0.9 > 0.1 > result[0]
    everything = distributions.get("global")(parts, 0.5)
    assert everything[2] == pytest.approx(0.99, abs=0.02), "by one ranking the small dense layer goes first"


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_bounds_that_cannot_be(low, high):
    with pytest.raises(ValueError, match=f"min_sparsity={low}, max_sparsity={high}"):
        kbs.Global(min_sparsity=low, max_sparsity=high)


# ---- densities of gates, sparsities of layers


def gru_parts(layer: str = "gru") -> list[Part]:
    return [part(32, 32, layer, gate) for gate in "zrh"]


def test_gate_densities_are_relative_and_leave_the_total():
    # LPCNet: update .05, reset .05, state .2, so 0.1 in the mean
    result = kbs.Uniform(gate_density={"z": 1, "r": 1, "h": 4})(gru_parts(), 0.9)
    np.testing.assert_allclose(1 - result, [0.05, 0.05, 0.2])


def test_a_gate_that_would_be_more_than_dense_gives_to_the_others():
    result = kbs.Uniform(gate_density={"h": 10})(gru_parts(), 0.5)
    np.testing.assert_allclose(1 - result, [0.25, 0.25, 1.0])


def test_gate_densities_do_not_touch_weights_without_such_gates():
    parts = [*gru_parts(), part(32, 32, "dense", kind="dense")]
    assert kbs.Uniform(gate_density={"h": 4})(parts, 0.9)[3] == pytest.approx(0.9)


@fast
@given(sparsity=st.floats(0, 0.99), h=st.floats(0.01, 50))
def test_gate_densities_never_change_a_weights_sparsity(sparsity, h):
    parts = [*gru_parts("one"), *gru_parts("two")]
    for distribution in (kbs.Uniform(gate_density={"h": h}), kbs.ERK(gate_density={"h": h})):
        result = distribution(parts, sparsity)
        assert ((result >= -1e-9) & (result <= 1)).all()
        plain = type(distribution)()(parts, sparsity)
        assert total(parts[:3], result[:3]) == pytest.approx(total(parts[:3], plain[:3]), abs=1e-9)


def test_layer_overrides_go_as_far_as_the_schedule_is():
    parts = [part(32, 32, "encoder"), part(32, 32, "decoder")]
    uniform = kbs.Uniform(layer_sparsity={"decoder": 0.6})
    np.testing.assert_allclose(uniform(parts, 0.9, 0.9), [0.9, 0.6])
    np.testing.assert_allclose(uniform(parts, 0.45, 0.9), [0.45, 0.3])


def test_the_first_matching_override_counts_and_may_name_a_weight():
    parts = [part(32, 32, "decoder"), part(32, 32, "decoder_2")]
    uniform = kbs.Uniform(layer_sparsity={"^decoder/kernel": 0.2, "decoder": 0.4})
    np.testing.assert_allclose(uniform(parts, 0.9, 0.9), [0.2, 0.4])


def test_an_override_of_zero_leaves_a_layer_dense():
    parts = [part(32, 32, "a"), part(32, 32, "b")]
    np.testing.assert_allclose(kbs.Uniform(layer_sparsity={"b": 0.0})(parts, 0.9, 0.9), [0.9, 0.0])


@pytest.mark.parametrize("distribution", [kbs.ERK, kbs.Global])
def test_the_others_share_what_overrides_leave(distribution):
    parts = [part(32, 32, "a"), part(64, 32, "b"), part(32, 32, "c")]
    result = distribution(layer_sparsity={"c": 0.1})(parts, 0.8, 0.8)
    assert result[2] == pytest.approx(0.1)
    assert total(parts[:2], result[:2]) == pytest.approx(0.8, abs=0.01)


def test_overrides_need_to_know_the_final_sparsity():
    with pytest.raises(ValueError, match="`final_sparsity`"):
        kbs.Uniform(layer_sparsity={"gru": 0.5})(gru_parts(), 0.9)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "much"])
def test_densities_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"'h': {value!r}"):
        kbs.Uniform(gate_density={"h": value})


@pytest.mark.parametrize("value", [1, 1.5, -0.1, float("nan"), "much"])
def test_layer_sparsities_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"'gru': {value!r}"):
        kbs.Uniform(layer_sparsity={"gru": value})


# ---- by name, by config, by the user


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", kbs.Uniform()),
        ("erk", kbs.ERK()),
        ("global", kbs.Global()),
        ("per_layer_type", kbs.Global(by_kind=True)),
    ],
)
def test_names_stand_for_objects(name, expected):
    assert distributions.get(name) == expected
    assert distributions.get(expected) is expected


@pytest.mark.parametrize("value", ["unifrom", None, 3])
def test_unknown_distributions_are_an_error_that_lists_the_known(value):
    with pytest.raises(ValueError, match=r"'uniform', 'erk', 'global', 'per_layer_type'.*Received: distribution="):
        distributions.get(value)


@pytest.mark.parametrize(
    "distribution",
    [
        kbs.Uniform(gate_density={"h": 4}),
        kbs.ERK(layer_sparsity={"a": 0.5}),
        kbs.Global(min_sparsity=0.1, max_sparsity=0.8, by_kind=True),
    ],
)
def test_distributions_come_back_from_their_config(distribution):
    config = keras.saving.serialize_keras_object(distribution)
    assert keras.saving.deserialize_keras_object(config) == distribution


def test_a_distribution_of_the_users_own():
    class FirstOnly(kbs.Distribution):
        def spread(self, parts, sparsity):
            return np.array([sparsity] + [0.0] * (len(parts) - 1))

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16), keras.layers.Dense(16)])
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, frequency=1)
    kbs.prune_low_magnitude_block(model, schedule, (4, 4), distribution=FirstOnly())
    kbs.Pruner(model).step()
    assert [float((layer.kernel.numpy() == 0).mean()) for layer in model.layers] == [0.5, 0.0]
    with pytest.raises(NotImplementedError, match=r"Distribution must implement spread"):
        kbs.Distribution()(gru_parts(), 0.5)
