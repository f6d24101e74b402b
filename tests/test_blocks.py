"""Block grids, scores and masks against loops over blocks in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from _helpers import BLOCK_SIZES, cut, split_gates
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keras_blocksparse import BlockGrid
from keras_blocksparse.blocks import (
    SCORES,
    check_block_size,
    check_neighborhood,
    check_score,
    infer_block_size,
    keep_blocks,
)

SCORE_ORACLES = {
    "max": lambda block: np.abs(block).max(),
    "mean": lambda block: np.abs(block).mean(),
    "l2": lambda block: math.sqrt(np.square(block).mean()),
}

DTYPES = ["float32", "float64"]

fast = settings(max_examples=60)


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    """A grid over a weight whose gates are at least one block large, edges ragged or not."""
    block = draw(st.one_of(st.sampled_from(BLOCK_SIZES), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    gates = draw(st.sampled_from([1, 3, 4]))
    rows = block[0] + draw(st.integers(0, 40))
    cols = block[1] + draw(st.integers(0, 40))
    return BlockGrid((rows, gates * cols), block, gates)


def weight_of(grid: BlockGrid, seed: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=grid.shape).astype(dtype)


@fast
@given(
    grid=grids(), seed=st.integers(0, 99), name=st.sampled_from(SCORES), dtype=st.sampled_from(["float32", "float64"])
)
def test_scores_are_those_of_a_loop_over_blocks(grid, seed, name, dtype):
    weight = weight_of(grid, seed, dtype)
    expected = [
        [SCORE_ORACLES[name](block.astype(np.float64)) for block in cut(gate, grid.block_size)]
        for gate in split_gates(weight, grid.gates)
    ]
    scores = grid.scores(weight, name)
    assert scores.shape == grid.grid_shape
    np.testing.assert_allclose(scores.reshape(grid.gates, -1), expected, rtol=1e-5 if dtype == "float32" else 1e-12)


@fast
@given(grid=grids(), seed=st.integers(0, 99))
def test_a_callable_score_sees_every_block_filled_up_with_zeros(grid, seed):
    weight = weight_of(grid, seed)
    seen = []

    def energy(blocks: np.ndarray) -> np.ndarray:
        seen.append(blocks.shape)
        return np.square(blocks).sum(axis=(1, 2))

    expected = [[(b**2).sum() for b in cut(gate, grid.block_size)] for gate in split_gates(weight, grid.gates)]
    np.testing.assert_allclose(grid.scores(weight, energy).reshape(grid.gates, -1), expected)
    assert all(shape[1:] == grid.block_size for shape in seen)


@fast
@given(
    grid=grids(), seed=st.integers(0, 99), name=st.sampled_from(SCORES), times=st.tuples(*[st.integers(1, 5)] * 2),
    dtype=st.sampled_from(["float32", "float64"]),
)  # fmt: skip
def test_with_a_neighborhood_a_block_has_the_geometric_mean_of_its_score_and_the_larger_one_s(
    grid, seed, name, times, dtype
):
    weight = weight_of(grid, seed, dtype)
    (height, width), oracle = grid.block_size, SCORE_ORACLES[name]
    tall, wide = height * times[0], width * times[1]
    expected = np.empty(grid.grid_shape)
    for gate, row, col in np.ndindex(*grid.grid_shape):
        matrix = split_gates(weight.astype(np.float64), grid.gates)[gate]
        top, left = row * height, col * width
        above, beside = top // tall * tall, left // wide * wide
        own = oracle(matrix[top : top + height, left : left + width])
        expected[gate, row, col] = np.sqrt(own * oracle(matrix[above : above + tall, beside : beside + wide]))
    scores = grid.scores(weight, name, neighborhood=(tall, wide))
    np.testing.assert_allclose(scores, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


def test_scores_of_tiny_weights_do_not_vanish_with_a_neighborhood():
    scores = BlockGrid((8, 8), (4, 4)).scores(np.full((8, 8), 1e-30, np.float32), "max", neighborhood=(8, 8))
    np.testing.assert_allclose(scores, 1e-30, rtol=1e-5)


@pytest.mark.parametrize(
    ("neighborhood", "error", "message"),
    [
        ((16, 6), ValueError, r"multiples of the block's.*neighborhood=\(16, 6\), block_size=\(4, 4\)"),
        (16, ValueError, r"`neighborhood` must be a pair.*neighborhood=16"),
        ((0, 4), ValueError, r"Both sides of `neighborhood`.*neighborhood=\(0, 4\)"),
        ((8.0, 8), TypeError, r"`neighborhood` must hold two integers"),
    ],
)
def test_neighborhoods_that_make_no_sense_are_an_error(neighborhood, error, message):
    with pytest.raises(error, match=message):
        check_neighborhood(neighborhood, (4, 4))


def test_a_score_below_zero_has_no_geometric_mean():
    with pytest.raises(ValueError, match="must not be below 0"):
        BlockGrid((8, 8), (4, 4)).scores(-np.ones((8, 8)), lambda b: b.mean((1, 2)), neighborhood=(8, 8))


def test_a_callable_score_of_the_wrong_shape_is_an_error():
    grid = BlockGrid((8, 8), (4, 4))
    with pytest.raises(ValueError, match=r"must return shape \(4,\).*shape=\(4, 4, 4\)"):
        grid.scores(np.ones((8, 8)), lambda blocks: blocks)


@fast
@given(grid=grids())
def test_elements_are_counted_as_they_really_are(grid):
    matrix = np.zeros((grid.rows, grid.cols))
    expected = [block.size for block in cut(matrix, grid.block_size)]
    assert grid.elements.ravel().tolist() == expected
    assert grid.elements.sum() == grid.rows * grid.cols
    assert grid.gates * grid.elements.size == math.prod(grid.grid_shape)
    assert grid.heights.sum() == grid.rows
    assert grid.widths.sum() == grid.cols


@fast
@given(grid=grids(), seed=st.integers(0, 99))
def test_expand_and_nonzero_blocks_undo_each_other(grid, seed):
    blocks = np.random.default_rng(seed).random(grid.grid_shape) < 0.5
    mask = grid.expand(blocks)
    assert mask.shape == grid.shape
    np.testing.assert_array_equal(grid.nonzero_blocks(mask), blocks)
    # A block straddles no gate: cutting each gate by itself finds every block of one kind only.
    for gate, kept in zip(split_gates(mask, grid.gates), blocks, strict=True):
        for block, is_kept in zip(cut(gate, grid.block_size), kept.ravel(), strict=True):
            assert (block == is_kept).all()


@fast
@given(grid=grids())
def test_diagonal_blocks_are_those_an_identity_touches(grid):
    identity = np.eye(grid.rows, grid.cols)
    expected = [block.any() for block in cut(identity, grid.block_size)]
    assert grid.diagonal_blocks().ravel().tolist() == expected


def best_within_half_a_block(sizes: np.ndarray, zeroed: float, target: float) -> bool:
    return abs(zeroed - target) <= sizes.max() / 2 + 1e-9


@settings(max_examples=150)
@given(grid=grids(), seed=st.integers(0, 99), sparsity=st.floats(0, 0.999))
def test_masks_zero_the_lowest_blocks_and_come_within_half_a_block(grid, seed, sparsity):
    for scores in grid.scores(weight_of(grid, seed)):
        keep = keep_blocks(scores, grid.elements, sparsity)
        assert keep.shape == scores.shape
        assert keep.any(), "at least one block stays"
        if (~keep).any():
            assert scores[~keep].max() <= scores[keep].min()
        zeroed = grid.elements[~keep].sum()
        others = grid.elements.sum() - grid.elements[np.unravel_index(np.argmax(scores), scores.shape)]
        assert best_within_half_a_block(grid.elements, zeroed, sparsity * grid.elements.sum()) or zeroed == others


@fast
@given(grid=grids(), seed=st.integers(0, 99), low=st.floats(0, 0.99), high=st.floats(0, 0.99))
def test_a_higher_sparsity_zeroes_more_of_the_same(grid, seed, low, high):
    low, high = sorted((low, high))
    scores = grid.scores(weight_of(grid, seed))[0]
    assert (keep_blocks(scores, grid.elements, high) <= keep_blocks(scores, grid.elements, low)).all()


@fast
@given(grid=grids(), seed=st.integers(0, 99), sparsity=st.floats(0, 0.99))
def test_blocks_that_always_stay_do_and_the_sparsity_is_what_it_was(grid, seed, sparsity):
    scores, diagonal = grid.scores(weight_of(grid, seed))[0], grid.diagonal_blocks()
    keep = keep_blocks(scores, grid.elements, sparsity, diagonal)
    assert keep[diagonal].all()
    target, possible = sparsity * grid.elements.sum(), grid.elements[~diagonal].sum()
    zeroed = grid.elements[~keep].sum()
    assert best_within_half_a_block(grid.elements, zeroed, target) or (zeroed == possible and zeroed < target)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.9999])
def test_equal_scores_still_give_the_asked_sparsity(sparsity):
    keep = keep_blocks(np.ones((10, 10)), np.full((10, 10), 16), sparsity)
    assert (~keep).sum() == min(round(sparsity * 100), 99)


def test_an_extreme_sparsity_leaves_one_connection():
    weight = np.linspace(1.0, 100.0, 100).reshape(10, 10)
    grid = BlockGrid(weight.shape, (1, 1))
    keep = keep_blocks(grid.scores(weight)[0], grid.elements, 0.9999)
    assert np.argwhere(keep).tolist() == [[9, 9]]


@pytest.mark.parametrize(("score", "off"), [("max", 0.0), ("mean", 0.1), ("l2", 0.1)])
def test_two_by_two_blocks_of_a_small_matrix(score, off):
    values = np.array([[0.1, 0.2], [0.3, 0.4]])
    weight = np.kron(values, [[1, 0], [0, -1]]) + off * np.kron(values, [[0, 1], [1, 0]])
    grid = BlockGrid((4, 4), (2, 2))
    keep = keep_blocks(grid.scores(weight, score)[0], grid.elements, 0.5)
    np.testing.assert_array_equal(grid.expand(keep[None]), np.repeat([[False], [False], [True], [True]], 4, axis=1))


def test_max_and_mean_rank_differently():
    spike, plain = np.diag([4.0, 0, 0, 0]), np.full((4, 4), 2.0)
    weight = np.hstack([spike, plain])
    grid = BlockGrid((4, 8), (4, 4))
    kept = {name: keep_blocks(grid.scores(weight, name)[0], grid.elements, 0.5).ravel().tolist() for name in SCORES}
    assert kept == {"max": [True, False], "mean": [False, True], "l2": [False, True]}


def test_nan_scores_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        keep_blocks(np.array([[1.0, np.nan]]), np.array([[4, 4]]), 0.5)


@pytest.mark.parametrize(
    ("shape", "row_axes", "rows", "cols"),
    [((3, 3, 8, 16), None, 72, 16), ((5, 8, 12), None, 40, 12), ((8, 2, 6), 1, 8, 12), ((2, 6, 8), 2, 12, 8)],
)
def test_weights_of_more_axes_are_read_as_matrices(shape, row_axes, rows, cols):
    weight = np.random.default_rng(0).normal(size=shape)
    grid = BlockGrid(shape, (4, 4), row_axes=row_axes)
    assert (grid.rows, grid.cols) == (rows, cols)
    expected = [np.sqrt((block**2).mean()) for block in cut(weight.reshape(rows, cols), (4, 4))]
    np.testing.assert_allclose(grid.scores(weight).ravel(), expected)
    assert grid.expand(np.ones(grid.grid_shape, bool)).shape == shape


@pytest.mark.parametrize(
    ("shape", "block", "gates", "words"),
    [
        ((8, 24), (16, 4), 3, r"block is larger than one gate.*8 x 8.*block_size=\(16, 4\).*shape=\(8, 24\)"),
        ((64, 24), (4, 16), 3, r"larger than one gate of the weight, 64 x 8.*\(4, 16\)"),
        ((8, 8), (9, 1), 1, r"larger than the weight, 8 x 8.*block_size=\(9, 1\)"),
        ((8, 25), (4, 4), 3, "3 gates do not divide the 25 columns"),
        ((8,), (4, 4), 1, r"at least two axes.*shape=\(8,\)"),
        ((0, 8), (4, 4), 1, r"empty.*shape=\(0, 8\)"),
    ],
)
def test_grids_that_cannot_be(shape, block, gates, words):
    with pytest.raises(ValueError, match=words):
        BlockGrid(shape, block, gates)


def test_a_weight_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(8, 8\).*shape=\(8, 4\)"):
        BlockGrid((8, 8), (4, 4)).scores(np.ones((8, 4)))


@pytest.mark.parametrize(
    ("block", "error", "words"),
    [
        ((-4, 4), ValueError, r"at least 1.*block_size=\(-4, 4\)"),
        ((4, 0), ValueError, r"at least 1.*block_size=\(4, 0\)"),
        ((4.0, 4), TypeError, r"two integers.*block_size=\(4.0, 4\)"),
        ((4, 2.5), TypeError, r"two integers.*2.5"),
        ((True, 4), TypeError, r"two integers.*True"),
        (("4", "4"), TypeError, r"two integers.*'4'"),
        (16, ValueError, "pair.*block_size=16"),
        ("44", ValueError, "pair.*block_size='44'"),
        ((4, 4, 4), ValueError, r"pair.*block_size=\(4, 4, 4\)"),
        (None, ValueError, "pair.*block_size=None"),
    ],
)
def test_block_sizes_that_cannot_be(block, error, words):
    with pytest.raises(error, match=words):
        check_block_size(block)


def test_block_sizes_may_be_lists_and_numpy_integers():
    assert check_block_size([np.int64(4), 8]) == (4, 8)


@pytest.mark.parametrize("score", ["MAX", "median", None, 3])
def test_unknown_scores_are_an_error(score):
    with pytest.raises(ValueError, match=f"score={score!r}"):
        check_score(score)


@pytest.mark.parametrize("block", [b for b in BLOCK_SIZES if b != (1, 1)])
@pytest.mark.parametrize("gates", [1, 3])
def test_the_block_shape_is_read_off_a_pruned_matrix(block, gates):
    random = np.random.default_rng(3)
    grid = BlockGrid((96, gates * 96), block, gates)
    keep = random.random(grid.grid_shape) < 0.4
    weight = random.normal(size=grid.shape) * grid.expand(keep)
    assert infer_block_size(weight, gates) == block


def test_single_zeros_are_blocks_of_one():
    weight = np.random.default_rng(0).normal(size=(64, 64))
    weight[np.random.default_rng(1).random((64, 64)) < 0.5] = 0
    assert infer_block_size(weight) == (1, 1)
    assert infer_block_size(np.ones((64, 64))) == (1, 1)


@fast
@given(grid=grids(), seed=st.integers(0, 9))
def test_an_inferred_block_shape_explains_nearly_all_zeros(grid, seed):
    random = np.random.default_rng(seed)
    weight = random.normal(size=grid.shape) * grid.expand(random.random(grid.grid_shape) < 0.5)
    zeros = int((weight == 0).sum())
    assume(zeros)
    found = infer_block_size(weight, grid.gates)
    explained = sum(b.size for gate in split_gates(weight, grid.gates) for b in cut(gate, found) if not b.any())
    assert explained >= 0.99 * zeros
