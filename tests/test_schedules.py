"""Schedules against the formulas of their papers, written out literally."""

from __future__ import annotations

import dataclasses
import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from keras_blocksparse.schedules import FOREVER

fast = settings(max_examples=80)


def all_kinds(**steps: int) -> list[kbs.PruningSchedule]:
    steps = {"begin_step": 10, "end_step": 50, "frequency": 10, **steps}
    return [
        kbs.ConstantSparsity(target_sparsity=0.5, **steps),
        kbs.PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, **steps),
        kbs.ThresholdRamp(q=0.1, ramp_step=min(max(steps["begin_step"], 20), steps["end_step"]), **steps),
    ]


# ---- when


@pytest.mark.parametrize("schedule", all_kinds())
def test_updates_lie_between_begin_and_end(schedule):
    assert [step for step in range(100) if schedule(step)[0]] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("schedule", all_kinds(end_step=47))
def test_an_end_off_the_frequency_grid_is_an_update(schedule):
    assert [step for step in range(100) if schedule(step)[0]] == [10, 20, 30, 40, 47]


@given(begin=st.integers(0, 50), length=st.integers(1, 200), frequency=st.integers(1, 300))
@fast
def test_the_first_and_the_last_update_always_happen(begin, length, frequency):
    for schedule in all_kinds(begin_step=begin, end_step=begin + length, frequency=frequency):
        updates = [step for step in range(begin + length + frequency + 1) if schedule(step)[0]]
        assert updates[0] == begin
        assert updates[-1] == begin + length
        assert all(b - a <= frequency for a, b in itertools.pairwise(updates))


def test_without_an_end_updates_go_on_for_ever():
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=5, frequency=10)
    assert schedule.end_step == FOREVER == -1
    assert schedule(10**9 + 5) == (True, 0.5)
    assert not schedule(10**9)[0]


def test_begin_equal_to_end_is_one_shot_to_the_final_sparsity():
    schedule = kbs.PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.9, begin_step=7, end_step=7)
    assert [step for step in range(20) if schedule(step)[0]] == [7]
    assert schedule(7) == (True, 0.9)
    assert schedule(0)[1] == schedule(100)[1] == 0.9


# ---- how far


@given(
    begin=st.integers(0, 1000), length=st.integers(1, 5000), initial=st.floats(0, 0.99), final=st.floats(0, 0.99),
    power=st.floats(0.5, 6), at=st.floats(0, 1),
)  # fmt: skip
@fast
def test_polynomial_decay_is_zhu_and_guptas_equation(begin, length, initial, final, power, at):
    step = begin + int(at * length)
    schedule = kbs.PolynomialDecay(
        initial_sparsity=initial, final_sparsity=final, begin_step=begin, end_step=begin + length, power=power
    )
    expected = final + (initial - final) * (1 - np.float64(step - begin) / length) ** power
    np.testing.assert_allclose(schedule(step)[1], expected, atol=1e-12)
    assert schedule(begin)[1] == pytest.approx(initial)
    assert schedule(begin + length)[1] == pytest.approx(final)


def test_polynomial_decay_at_steps_worked_out_by_hand():
    # s_f = 0.8, s_i = 0.5, p = 3, 10 steps; at 11, 15, 20: 0.8 - 0.3 * (.9**3, .5**3, 0)
    schedule = kbs.PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.8, begin_step=10, end_step=20, power=3)
    assert [schedule(step)[1] for step in (11, 15, 20)] == pytest.approx([0.5813, 0.7625, 0.8])


def test_outside_the_schedule_its_nearest_end_is_given():
    schedule = kbs.PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=10, end_step=50)
    assert schedule(0) == (False, pytest.approx(0.2))
    assert schedule(10**6) == (False, pytest.approx(0.8))


def test_constant_sparsity_is_constant():
    schedule = kbs.ConstantSparsity(target_sparsity=0.7)
    assert {schedule(step)[1] for step in range(500)} == {0.7}
    assert schedule.final_sparsity == 0.7


def test_a_step_may_be_a_keras_variable_or_a_numpy_integer():
    schedule = kbs.PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=100)
    optimizer = keras.optimizers.SGD()
    assert schedule(np.int64(100)) == schedule(100)
    assert schedule(keras.ops.convert_to_numpy(optimizer.iterations)) == schedule(0)


# ---- the paper's threshold


def paper_threshold(
    itr: int, q: float, start: int, ramp: int, end: int, freq: int, ratio: float, n_block: int
) -> float:
    """Algorithm 1 with Eq. 1 (for phi = 1.5 theta, in the paper's form) and Eq. 2, transcribed."""
    if ratio == 1.5:
        theta_w = 2 * q * freq / (2 * (ramp - start) + 3 * (end - ramp))
    else:
        theta_w = q * freq / ((ramp - start) + ratio * (end - ramp))
    theta = theta_w * n_block ** (1 / 4)
    phi = ratio * theta
    if itr < ramp:
        return theta * (itr - start + 1) / freq
    return (theta * (ramp - start + 1) + phi * (itr - ramp + 1)) / freq


@given(
    q=st.floats(1e-3, 2), start=st.integers(0, 50), first=st.integers(1, 100), second=st.integers(1, 100),
    freq=st.integers(1, 100), at=st.floats(0, 1), ratio=st.sampled_from([1.2, 1.5, 2.0]),
    block=st.sampled_from([1, 16, 24, 256]),
)  # fmt: skip
@fast
def test_the_threshold_is_that_of_algorithm_1(q, start, first, second, freq, at, ratio, block):
    ramp, end = start + first, start + first + second
    step = start + round(at * (first + second))
    schedule = kbs.ThresholdRamp(q=q, begin_step=start, ramp_step=ramp, end_step=end, frequency=freq, slope_ratio=ratio)
    expected = paper_threshold(step, q, start, ramp, end, freq, ratio, block)
    np.testing.assert_allclose(schedule.threshold(step, "recurrent", block), expected, rtol=1e-9)


def test_the_threshold_of_single_weights_ends_at_q():
    schedule = kbs.ThresholdRamp(q=0.25, begin_step=2700, ramp_step=13500, end_step=27000, frequency=100)
    # Two "+ 1" of Algorithm 1 remain over: (theta + phi) / freq, far below a percent of q.
    assert schedule.threshold(27000, "recurrent", 1) == pytest.approx(0.25, rel=1e-3)
    assert schedule.threshold(27000, "recurrent", 16) == pytest.approx(0.5, rel=1e-3)
    assert schedule.threshold(27000, "recurrent", 256) == pytest.approx(1.0, rel=1e-3)


def test_the_threshold_rises_and_is_frozen_after_the_end():
    schedule = kbs.ThresholdRamp(q=0.1, begin_step=10, ramp_step=30, end_step=60, frequency=5)
    values = [schedule.threshold(step, "dense", 16) for step in range(10, 61)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert schedule.threshold(1000, "dense", 16) == values[-1]


def test_a_block_exponent_of_zero_gives_every_block_the_same_threshold():
    schedule = kbs.ThresholdRamp(q=0.1, begin_step=0, ramp_step=10, end_step=20, block_exponent=0)
    assert schedule.threshold(20, "dense", 1) == schedule.threshold(20, "dense", 256)


def test_q_for_each_layer_kind():
    schedule = kbs.ThresholdRamp(q={"recurrent": 0.2, "dense": 0.1}, begin_step=0, ramp_step=10, end_step=20)
    assert schedule.threshold(20, "recurrent", 16) == pytest.approx(2 * schedule.threshold(20, "dense", 16))
    with pytest.raises(ValueError, match="no entry for layers of kind 'embedding'"):
        schedule.threshold(20, "embedding", 16)


def test_from_epochs_takes_the_papers_heuristics():
    schedule = kbs.ThresholdRamp.from_epochs(0.1, epochs=20, steps_per_epoch=2700)
    assert (schedule.begin_step, schedule.ramp_step, schedule.end_step) == (2700, 4 * 2700, 8 * 2700)
    assert kbs.ThresholdRamp.from_epochs(0.1, epochs=20, steps_per_epoch=2700, end_step=50000).end_step == 50000


def test_a_decay_from_epochs_ends_early():
    schedule = kbs.PolynomialDecay.from_epochs(0.8, epochs=20, steps_per_epoch=2700)
    assert (schedule.begin_step, schedule.end_step, schedule.frequency) == (540, 10800, 102)
    assert schedule(10800) == (True, 0.8)
    later = kbs.PolynomialDecay.from_epochs(epochs=20, steps_per_epoch=2700, begin_step=0, end_step=50000, power=1.0)
    assert (later.final_sparsity, later.begin_step, later.end_step, later.power) == (0.9, 0, 50000, 1.0)


@given(epochs=st.integers(1, 40), steps=st.integers(1, 40))
@fast
def test_from_epochs_makes_a_schedule_however_short_the_training(epochs, steps):
    schedule = kbs.ThresholdRamp.from_epochs(0.1, epochs=epochs, steps_per_epoch=steps)
    assert schedule.begin_step <= schedule.ramp_step <= schedule.end_step <= max(epochs * steps, 1)
    decay = kbs.PolynomialDecay.from_epochs(0.9, epochs=epochs, steps_per_epoch=steps)
    assert decay.end_step <= epochs * steps
    assert decay(decay.end_step) == (True, 0.9)


def built_model() -> keras.Model:
    return keras.Sequential([keras.Input((None, 8)), keras.layers.GRU(12), keras.layers.Dense(5)])


def test_from_dense_reads_the_quantile_of_each_layer_kind():
    model = built_model()
    schedule = kbs.ThresholdRamp.from_dense(model, sparsity=0.9, epochs=10, steps_per_epoch=100)
    cell = model.layers[0].cell
    recurrent = np.concatenate([np.abs(w.numpy()).ravel() for w in (cell.kernel, cell.recurrent_kernel)])
    assert schedule.q["recurrent"] == pytest.approx(np.quantile(recurrent, 0.9), rel=1e-6)
    assert schedule.q["dense"] == pytest.approx(np.quantile(np.abs(model.layers[1].kernel.numpy()), 0.9), rel=1e-6)
    assert (schedule.begin_step, schedule.end_step) == (100, 400)


def test_from_dense_takes_steps_and_filters_too():
    schedule = kbs.ThresholdRamp.from_dense(
        built_model(), sparsity=0.5, filters="gru", begin_step=1, ramp_step=5, end_step=9
    )
    assert set(schedule.q) == {"recurrent"}
    assert (schedule.begin_step, schedule.ramp_step, schedule.end_step) == (1, 5, 9)


def test_from_dense_says_what_is_missing():
    with pytest.raises(ValueError, match="epochs=3, steps_per_epoch=None"):
        kbs.ThresholdRamp.from_dense(built_model(), epochs=3)
    with pytest.raises(ValueError, match=r"\(0, 1\).*sparsity=1.5"):
        kbs.ThresholdRamp.from_dense(built_model(), sparsity=1.5, epochs=3, steps_per_epoch=9)
    with pytest.raises(ValueError, match="build and train it first"):
        kbs.ThresholdRamp.from_dense(keras.Sequential([keras.layers.Dense(3)]), epochs=3, steps_per_epoch=9)


# ---- what cannot be


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        ({"begin_step": -1}, ValueError, "begin_step=-1"),
        ({"begin_step": 1.5}, TypeError, "begin_step=1.5"),
        ({"begin_step": True}, TypeError, "begin_step=True"),
        ({"end_step": -2}, ValueError, "end_step=-2"),
        ({"end_step": "50"}, TypeError, "end_step='50'"),
        ({"begin_step": 60}, ValueError, "begin_step=60, end_step=50"),
        ({"frequency": 0}, ValueError, "frequency=0"),
        ({"frequency": -5}, ValueError, "frequency=-5"),
        ({"frequency": 2.0}, TypeError, "frequency=2.0"),
    ],
)
@pytest.mark.parametrize("kind", [kbs.ConstantSparsity, kbs.PolynomialDecay])
def test_steps_that_cannot_be(kind, steps, error, words):
    with pytest.raises(error, match=words):
        kind(**{"begin_step": 10, "end_step": 50, "frequency": 10, **steps})


@pytest.mark.parametrize("value", [1.0, 1, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None])
def test_sparsities_that_cannot_be(value):
    with pytest.raises(ValueError, match=r"`target_sparsity` must be in \[0, 1\)"):
        kbs.ConstantSparsity(target_sparsity=value)
    with pytest.raises(ValueError, match="final_sparsity"):
        kbs.PolynomialDecay(final_sparsity=value, end_step=10)
    with pytest.raises(ValueError, match="initial_sparsity"):
        kbs.PolynomialDecay(initial_sparsity=value, end_step=10)


def test_a_decay_and_a_ramp_need_an_end():
    with pytest.raises(ValueError, match="end_step=-1"):
        kbs.PolynomialDecay(final_sparsity=0.9)
    with pytest.raises(ValueError, match="end_step=-1"):
        kbs.ThresholdRamp(q=0.1)


@pytest.mark.parametrize("power", [0, -1, float("nan"), "3"])
def test_powers_that_cannot_be(power):
    with pytest.raises(ValueError, match=f"power={power!r}"):
        kbs.PolynomialDecay(final_sparsity=0.9, end_step=10, power=power)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": 0}, "q=0"),
        ({"q": -1.0}, "q=-1.0"),
        ({"q": float("nan")}, "q=nan"),
        ({"q": {}}, "q={}"),
        ({"q": {"dense": 0}}, "q={'dense': 0}"),
        ({"q": "0.1"}, "q='0.1'"),
        ({"ramp_step": 5}, "begin_step=10, ramp_step=5, end_step=50"),
        ({"ramp_step": 60}, "ramp_step=60"),
        ({"end_step": 10, "ramp_step": 10}, "begin_step=10, ramp_step=10, end_step=10"),
        ({"slope_ratio": 0}, "slope_ratio=0"),
        ({"slope_ratio": float("nan")}, "slope_ratio=nan"),
        ({"block_exponent": -0.5}, "-0.5"),
        ({"max_sparsity": 1.0}, "max_sparsity=1.0"),
    ],
)
def test_ramps_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        kbs.ThresholdRamp(**{"q": 0.1, "begin_step": 10, "ramp_step": 20, "end_step": 50, **change})


def test_schedules_are_given_by_name_only():
    # tfmot's order of arguments differs between its two schedules; names cannot be mixed up.
    with pytest.raises(TypeError):
        kbs.PolynomialDecay(0.0, 0.9, 0, 100)


def test_a_schedule_that_implements_nothing_says_so():
    with pytest.raises(NotImplementedError, match=r"PruningSchedule must implement target\(step\)"):
        kbs.PruningSchedule()(0)


# ---- configs


@pytest.mark.parametrize("schedule", all_kinds())
def test_schedules_come_back_from_their_config(schedule):
    assert type(schedule).from_config(schedule.get_config()) == schedule
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert restored == schedule
    assert [restored(step) for step in range(60)] == [schedule(step) for step in range(60)]


def test_a_ramp_with_q_for_each_kind_comes_back():
    schedule = kbs.ThresholdRamp(q={"recurrent": 0.2, "dense": 0.1}, begin_step=0, ramp_step=10, end_step=20)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert restored.threshold(20, "recurrent", 4) == schedule.threshold(20, "recurrent", 4)


def test_schedules_are_values():
    first, second = (kbs.ConstantSparsity(target_sparsity=0.5) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.target_sparsity = 0.9
