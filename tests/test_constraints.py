"""The constraint by itself: what it does to a weight, to values that are not numbers, and to its config."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from _helpers import BLOCK_SIZES, cut, split_gates
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from keras_blocksparse.constraints import PruningSettings, pruning_of

BLOCK = (4, 4)
EXTRA = st.integers(0, 9)
SCHEDULE = kbs.ConstantSparsity(target_sparsity=0.5)


def bound(weight: np.ndarray, block: tuple[int, int] = BLOCK, gates: int = 1, **options) -> tuple:
    """A driven constraint on a variable."""
    variable = keras.Variable(weight, trainable=True)
    inner = options.pop("constraint", None)
    constraint = kbs.BlockPruning(PruningSettings(SCHEDULE, block, **options), gates, constraint=inner)
    constraint.bind(variable)
    constraint.driven = True
    return constraint, variable


def random_weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@settings(max_examples=40)
@given(
    block=st.sampled_from(BLOCK_SIZES), gates=st.sampled_from([1, 3, 4]), more=st.tuples(EXTRA, EXTRA),
    share=st.floats(0.1, 0.9), seed=st.integers(0, 99), revival=st.booleans(),
)  # fmt: skip
def test_the_mask_is_read_off_the_zero_blocks_and_holds(block, gates, more, share, seed, revival):
    random = np.random.default_rng(seed)
    shape = (block[0] + more[0], gates * (2 * block[1] + more[1]))
    weight = random.normal(size=shape).astype("float32")
    for gate in split_gates(weight, gates):
        for part in cut(gate, block):
            if random.random() < share:
                part[:] = 0  # np.split and slices are views
    zero = weight == 0
    if zero.all():
        return  # an initializer's zeros, as those of an identity
    if np.count_nonzero(np.diff(np.argwhere(~zero))) == 0 and len(weight) > 1:
        return
    constraint, variable = bound(weight, block, gates, revival=revival)
    update = random.normal(size=shape).astype("float32")
    variable.assign(update)
    variable.assign(constraint(variable))
    np.testing.assert_array_equal(variable.numpy(), np.where(zero, 0, update))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_weights_dtype_is_kept(dtype):
    variable = keras.Variable(random_weight(8, 8), dtype=dtype)
    constraint = kbs.BlockPruning(PruningSettings(SCHEDULE, BLOCK))
    constraint.bind(variable)
    constraint.driven = True
    kept = np.ones((1, 2, 2), bool)
    kept[0, 0, 1] = False
    constraint.keep(kept)
    assert constraint(variable).dtype == dtype
    values = keras.ops.convert_to_numpy(variable).astype("float32")
    assert not values[:4, 4:].any()
    assert np.count_nonzero(values) == 48


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_nan_is_zero_too(bad):
    weight = random_weight(8, 8)
    weight[:4, :4] = 0
    constraint, variable = bound(weight, revival=False)
    weight[0, 0] = bad
    variable.assign(weight)
    values = np.array(constraint(variable))
    assert not values[:4, :4].any()
    assert np.isfinite(values).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_an_error_with_their_path(bad):
    weight = random_weight(8, 8)
    weight[3, 3] = bad
    with pytest.raises(ValueError, match=r"holds NaN or infinity.*cannot be ranked"):
        bound(weight)


def test_revival_ranks_a_masked_block_by_its_last_update():
    weight = np.kron(np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones((4, 4))).astype("float32")
    constraint, variable = bound(weight)
    constraint.keep(np.array([[[False, True], [True, True]]]))
    updated = variable.numpy() + np.kron(np.array([[9.0, 0], [0, 0]]), np.ones((4, 4))).astype("float32")
    variable.assign(updated)
    variable.assign(constraint(variable))
    assert not variable.numpy()[:4, :4].any(), "masked until the next update of the mask"
    np.testing.assert_array_equal(constraint.scores(), [[[9, 2], [3, 4]]])
    constraint.keep(np.array([[[True, False], [True, True]]]))
    assert (variable.numpy()[:4, :4] == 9).all(), "it comes back as its last update left it"
    assert not variable.numpy()[:4, 4:].any()


def test_without_revival_a_masked_block_ranks_below_all():
    weight = np.kron(np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones((4, 4))).astype("float32")
    constraint, variable = bound(weight, revival=False)
    constraint.keep(np.array([[[False, True], [True, True]]]))
    variable.assign(variable.numpy() + 9)
    variable.assign(constraint(variable))
    scores = constraint.scores()
    assert scores[0, 0, 0] == -np.inf
    assert (scores.ravel()[1:] > 10).all()


def test_the_users_constraint_comes_first_and_both_hold():
    constraint, variable = bound(random_weight(8, 8), constraint=keras.constraints.NonNeg())
    kept = np.ones((1, 2, 2), bool)
    kept[0, 1, 1] = False
    constraint.keep(kept)
    variable.assign(random_weight(8, 8, seed=1))
    values = np.array(constraint(variable))
    assert (values >= 0).all()
    assert not values[4:, 4:].any()
    assert values[:4, :4].any()


def test_one_that_nothing_has_bound_binds_itself_in_a_compiled_step():
    weight = random_weight(8, 8)
    weight[:4] = 0
    variable = keras.Variable(weight)
    constraint = kbs.BlockPruning(PruningSettings(SCHEDULE, BLOCK))

    @tf.function
    def step():
        variable.assign(variable + 1.0)
        variable.assign(constraint(variable))

    with pytest.warns(UserWarning, match=r"nothing moves its mask.*UpdatePruningStep"):
        step()
    assert not variable.numpy()[:4].any()
    assert variable.numpy()[4:].all()


def test_a_block_too_large_leaves_the_weight_alone_with_a_warning():
    variable = keras.Variable(random_weight(3, 3))
    constraint = kbs.BlockPruning(PruningSettings(SCHEDULE, BLOCK))
    with pytest.warns(UserWarning, match=r"is not pruned.*3 x 3.*block_size=\(4, 4\)"):
        constraint.bind(variable)
    np.testing.assert_array_equal(np.array(constraint(variable)), variable.numpy())


def test_it_comes_back_from_its_config_through_json():
    distribution = kbs.Uniform(gate_density={"h": 4})
    pruning = PruningSettings(SCHEDULE, (8, 4), "l2", distribution, True, False, neighborhood=(16, 8))
    original = kbs.BlockPruning(pruning, 3, 1, True, keras.constraints.MaxNorm(1.5))
    config = json.loads(json.dumps(keras.constraints.serialize(original)))
    restored = keras.constraints.get(config)
    assert isinstance(restored, kbs.BlockPruning)
    assert restored.settings == pruning
    assert (restored.gates, restored.row_axes, restored.diagonal) == (3, 1, True)
    assert restored.constraint.max_value == 1.5


def test_settings_of_before_there_were_neighborhoods_come_back_without():
    config = PruningSettings(SCHEDULE, BLOCK).get_config()
    del config["neighborhood"]
    assert PruningSettings.from_config(config) == PruningSettings(SCHEDULE, BLOCK)


def test_pruning_of_knows_ours_from_others():
    constraint, variable = bound(random_weight(8, 8))
    assert pruning_of(variable) is None
    variable.constraint = constraint
    assert pruning_of(variable) is constraint
    variable.constraint = keras.constraints.NonNeg()
    assert pruning_of(variable) is None


def fires(schedule, after: int, until: int) -> int | None:
    return PruningSettings(schedule).latest_update(after, until)


def test_the_latest_update_of_a_stretch_of_steps():
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=10, end_step=25, frequency=10)
    assert [fires(schedule, step - 1, step) for step in (9, 10, 11, 20, 25, 30)] == [None, 10, None, 20, 25, None]
    assert fires(schedule, 0, 100) == 25
    assert fires(schedule, 20, 24) is None
    assert fires(schedule, 25, 100) is None


@settings(max_examples=100)
@given(
    begin=st.integers(0, 20), length=st.integers(0, 30), frequency=st.integers(1, 12), after=st.integers(-1, 60),
    span=st.integers(1, 40),
)  # fmt: skip
def test_no_update_is_missed_however_steps_are_bundled(begin, length, frequency, after, span):
    schedule = kbs.ConstantSparsity(target_sparsity=0.5, begin_step=begin, end_step=begin + length, frequency=frequency)
    due = [step for step in range(after + 1, after + span + 1) if schedule.should_prune(step)]
    assert fires(schedule, after, after + span) == (due[-1] if due else None)


def test_a_callable_that_returns_tensors_is_a_schedule():
    assert fires(lambda step: (tf.constant(step == 7), tf.constant(0.5)), 0, 9) == 7


def test_an_end_that_a_foreign_schedule_never_fires_at_counts():
    class TfmotLike:
        begin_step, end_step = 0, 25

        def __call__(self, step):
            return step % 10 == 0 and step <= 25, 0.5

    assert fires(TfmotLike(), 20, 30) == 25


@pytest.mark.parametrize("schedule", [0.9, "polynomial", object(), {"a": 1}])
def test_schedules_that_cannot_be(schedule):
    with pytest.raises(TypeError, match="`pruning_schedule` must be"):
        PruningSettings(schedule)
