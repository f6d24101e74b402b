"""Sparse tensors of any form, unpacked: against a literal reading of the format, and what contradicts itself."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_blocksparse.lite.encode import Level, decode


@st.composite
def tensors(draw):
    """A dense tensor and a form: a traversal order, blocks, and which levels are compressed."""
    rank = draw(st.integers(1, 3))
    blocks = draw(st.lists(st.sampled_from(range(rank)), unique=True, max_size=rank))
    sizes = {dim: draw(st.integers(1, 3)) for dim in blocks}
    shape = tuple(draw(st.integers(1, 4)) * sizes.get(dim, 1) for dim in range(rank))
    # Blocks lie inside, in any order, as TFLite writes them.
    order = [*draw(st.permutations(range(rank))), *draw(st.permutations(range(rank, rank + len(blocks))))]
    compressed = [draw(st.booleans()) and dim < rank for dim in order]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = rng.integers(-5, 6, shape) * (rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    return dense.astype(np.float32), order, blocks, sizes, compressed


def encode(dense, order, blocks, sizes, compressed):
    """Element by element: walks the levels, and leaves out what is zero where a level is compressed."""
    rank = dense.ndim
    limits = [dense.shape[d] // sizes.get(d, 1) for d in range(rank)] + [sizes[d] for d in blocks]
    levels = [([0], []) for _ in order]
    values = []

    def element(path):
        at = [path[d] * sizes[d] + path[rank + blocks.index(d)] if d in blocks else path[d] for d in range(rank)]
        return dense[tuple(at)]

    def any_below(path):
        free = [d for d in range(len(limits)) if d not in path]
        return any(
            element({**path, **dict(zip(free, rest, strict=True))})
            for rest in itertools.product(*(range(limits[d]) for d in free))
        )

    def walk(depth, path):
        if depth == len(order):
            values.append(element(path))
            return
        for i in range(limits[order[depth]]):
            here = {**path, order[depth]: i}
            if compressed[depth]:
                if not any_below(here):
                    continue
                levels[depth][1].append(i)
            walk(depth + 1, here)
        if compressed[depth]:
            levels[depth][0].append(len(levels[depth][1]))

    walk(0, {})
    made = [
        Level(segments=np.array(s, np.int64), indices=np.array(i, np.int64)) if c else Level(size=limits[d])
        for (s, i), c, d in zip(levels, compressed, order, strict=True)
    ]
    return np.array(values, np.float32), made


@given(tensors())
def test_any_form_is_unpacked(case):
    dense, order, blocks, sizes, compressed = case
    values, levels = encode(dense, order, blocks, sizes, compressed)
    np.testing.assert_array_equal(decode(values, dense.shape, order, blocks, levels), dense)


def csr(segments, indices):
    return Level(segments=np.array(segments, np.int64), indices=np.array(indices, np.int64))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"order": [0, 0, 2]}, "levels do not belong"),
        ({"order": [0, 1]}, "levels do not belong"),
        ({"block_map": [7]}, "blocks do not belong"),
        ({"shape": (4, 7)}, "do not divide"),
        ({"shape": (1 << 20, 1 << 20)}, "takes more than"),
        ({"shape": (-4, 8)}, "takes more than"),
        ({"levels": [Level(3), csr([0, 1, 1, 2, 2], [0, 1]), Level(4)]}, "a level of 3"),
        ({"levels": [Level(4), csr([0, 1, 1, 2], [0, 1]), Level(4)]}, "segments do not enclose"),
        ({"levels": [Level(4), csr([0, 2, 1, 2, 2], [0, 1]), Level(4)]}, "segments do not enclose"),
        ({"levels": [Level(4), csr([0, 1, 1, 2, 2], [0, 2]), Level(4)]}, "an index lies outside"),
        ({"levels": [Level(4), csr([0, 1, 1, 2, 2], [-1, 1]), Level(4)]}, "an index lies outside"),
        ({"levels": [Level(4), csr([0, 1, 1, 2, 2], [0, 1]), Level(0)]}, "do not divide"),
        ({"values": np.ones(7, np.float32)}, "8 elements are described, and 7 are there"),
    ],
)
def test_lies_are_told(change, why):
    right = {
        "values": np.arange(8, dtype=np.float32),
        "shape": (4, 8),
        "order": [0, 1, 2],
        "block_map": [1],
        "levels": [Level(4), csr([0, 1, 1, 2, 2], [0, 1]), Level(4)],
    }
    assert decode(**right).shape == (4, 8)
    with pytest.raises(ValueError, match=why):
        decode(**{**right, **change})
