"""Group lasso against sums over blocks in float64, and its gradient against finite differences."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from _helpers import BLOCK_SIZES, cut, split_gates
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse as kbs
from keras_blocksparse.regularizers import DrivenGroupLasso


def penalty(weight: np.ndarray, block: tuple[int, int], gates: int = 1, row_axes: int | None = None) -> float:
    """Eq. 3's sum of block norms."""
    matrices = split_gates(weight.astype(np.float64), gates, row_axes)
    return sum(np.linalg.norm(b) for matrix in matrices for b in cut(matrix, block))


@settings(max_examples=40)
@given(
    block=st.sampled_from(BLOCK_SIZES), gates=st.sampled_from([1, 3, 4]), more_rows=st.integers(0, 20),
    more_cols=st.integers(0, 20), strength=st.floats(0, 10), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_penalty_is_the_sum_of_block_norms(block, gates, more_rows, more_cols, strength, seed):
    shape = (block[0] + more_rows, gates * (block[1] + more_cols))
    weight = np.random.default_rng(seed).normal(size=shape).astype("float32")
    value = kbs.GroupLassoRegularizer(strength, block, gates)(keras.ops.convert_to_tensor(weight))
    np.testing.assert_allclose(float(value), strength * penalty(weight, block, gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "row_axes"), [((3, 3, 4, 8), None), ((8, 2, 6), 1), ((2, 4, 8), 2)])
def test_the_penalty_of_weights_of_more_axes(shape, row_axes):
    weight = np.random.default_rng(0).normal(size=shape).astype("float32")
    value = kbs.GroupLassoRegularizer(1.0, (4, 4), row_axes=row_axes)(weight)
    np.testing.assert_allclose(float(value), penalty(weight, (4, 4), row_axes=row_axes), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_penalty_is_summed_in_float32(dtype):
    # 4096 blocks of norm 4 sum to 16384, and its squares pass float16's largest number on the way.
    weight = tf.ones((256, 256), dtype)
    value = kbs.GroupLassoRegularizer(1.0, (4, 4))(weight)
    assert value.dtype == "float32"
    assert float(value) == pytest.approx(4 * 64 * 64)


def gradient(regularizer: keras.regularizers.Regularizer, weight: np.ndarray) -> np.ndarray:
    variable = tf.Variable(weight)
    with tf.GradientTape() as tape:
        loss = regularizer(variable)
    return tape.gradient(loss, variable).numpy()


@settings(max_examples=20)
@given(seed=st.integers(0, 99), block=st.sampled_from([(1, 1), (4, 4), (3, 2), (8, 4)]))
def test_the_gradient_is_each_block_over_its_norm(seed, block):
    random = np.random.default_rng(seed)
    weight = random.normal(size=(10, 9)).astype("float32")
    expected = np.zeros_like(weight)
    for view, out in zip(cut(weight, block), cut(expected, block), strict=True):
        if random.random() < 0.4:
            view[:] = 0
        elif np.linalg.norm(view) > 0:
            out[:] = view / np.linalg.norm(view)
    np.testing.assert_allclose(gradient(kbs.GroupLassoRegularizer(1.0, block), weight), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_gradient_at_zero_blocks_is_exactly_zero(dtype):
    values = gradient(kbs.GroupLassoRegularizer(0.5, (4, 4), gates=3), np.zeros((8, 24), dtype))
    assert values.dtype == dtype
    assert not values.any()
    assert np.isfinite(values).all()


def test_without_gates_a_block_may_straddle_and_with_them_not():
    weight = np.arange(4 * 12, dtype="float32").reshape(4, 12)
    plain, gated = (float(kbs.GroupLassoRegularizer(1.0, (4, 3), gates)(weight)) for gates in (1, 3))
    np.testing.assert_allclose(plain, penalty(weight, (4, 3), 1), rtol=1e-6)
    np.testing.assert_allclose(gated, penalty(weight, (4, 3), 3), rtol=1e-6)
    assert plain != pytest.approx(gated)


def test_it_works_alone_as_a_kernel_regularizer_and_shrinks_blocks_together():
    x = np.random.default_rng(0).normal(size=(1024, 16)).astype("float32")
    y = x[:, :4] @ np.ones((4, 8), "float32")  # the lower 12 inputs say nothing
    layer = keras.layers.Dense(8, kernel_regularizer=kbs.GroupLassoRegularizer(0.3, (4, 4)))
    model = keras.Sequential([keras.Input((16,)), layer])
    model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(x, y, epochs=150, batch_size=1024, verbose=0)
    norms = np.array([np.linalg.norm(block) for block in cut(layer.kernel.numpy(), (4, 4))]).reshape(4, 2)
    assert norms[1:].max() < 0.05 * norms[0].min()


def test_a_weight_smaller_than_a_block_is_left_alone_with_a_warning():
    with pytest.warns(UserWarning, match=r"leaves a weight alone.*3 x 3.*block_size=\(4, 4\)"):
        value = kbs.GroupLassoRegularizer(1.0, (4, 4))(np.ones((3, 3), "float32"))
    assert float(value) == 0


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_strengths_that_cannot_be(strength):
    with pytest.raises(ValueError, match=f"strength={strength!r}"):
        kbs.GroupLassoRegularizer(strength)


def test_block_sizes_that_cannot_be():
    with pytest.raises(ValueError, match=r"block_size=\(0, 4\)"):
        kbs.GroupLassoRegularizer(0.1, (0, 4))
    with pytest.raises(TypeError, match=r"block_size=\(4.0, 4\)"):
        kbs.GroupLassoRegularizer(0.1, (4.0, 4))


def test_it_comes_back_from_its_config():
    original = kbs.GroupLassoRegularizer(0.25, (8, 4), gates=3, row_axes=1, off_at_end=False)
    restored = keras.regularizers.get(keras.regularizers.serialize(original))
    assert restored.get_config() == original.get_config()
    weight = np.random.default_rng(0).normal(size=(16, 24)).astype("float32")
    assert float(restored(weight)) == float(original(weight))


def test_a_driven_group_lasso_adds_to_the_users_regularizer_and_can_be_switched_off():
    weight = np.random.default_rng(0).normal(size=(16, 24)).astype("float32")
    own, lasso = 0.5 * np.square(weight.astype(float)).sum(), 0.25 * penalty(weight, (8, 8))
    both = DrivenGroupLasso(kbs.GroupLassoRegularizer(0.25, (8, 8)), keras.regularizers.L2(0.5))
    for regularizer in (both, keras.regularizers.get(keras.regularizers.serialize(both))):
        variable = keras.Variable(weight)
        np.testing.assert_allclose(float(regularizer(variable)), own + lasso, rtol=1e-5)
        compiled = tf.function(regularizer)
        assert regularizer.drive(variable)
        assert not regularizer.drive(variable), "once is enough"
        for on, strength in ((False, 0.0), (True, 0.25)):
            regularizer.switch(on)
            assert regularizer.strength == strength
            np.testing.assert_allclose(float(regularizer(variable)), own + on * lasso, rtol=1e-5)
            np.testing.assert_allclose(float(compiled(variable)), own + on * lasso, rtol=1e-5)


def test_a_driven_group_lasso_alone():
    weight = np.ones((8, 8), "float32")
    alone = DrivenGroupLasso(kbs.GroupLassoRegularizer(0.5, (4, 4)))
    assert float(alone(weight)) == pytest.approx(0.5 * 4 * 4)
    assert float(keras.regularizers.get(keras.regularizers.serialize(alone))(weight)) == pytest.approx(8)
