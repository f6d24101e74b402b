"""Threads of ours, threads of the caller, and forks."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from keras_blocksparse.sparse import BlockSparseMatrix, get_num_threads, set_num_threads
from tests.native.reference import matmul_transposed, pruned, sampled_product


@pytest.fixture
def large():
    """Large enough that a product is worth two threads."""
    rng = np.random.default_rng(0)
    matrix = BlockSparseMatrix.from_dense(pruned(rng, 1500, 3000, (16, 16), density=0.4), (16, 16))
    yield matrix, rng.standard_normal((70, 1500)).astype(np.float32)
    set_num_threads(0)


@pytest.mark.parametrize("batch", [1, 8, 40, 70])
def test_the_number_of_threads_changes_no_result(large, batch):
    matrix, x = large
    dy = np.random.default_rng(1).standard_normal((batch, 3000)).astype(np.float32)
    results = []
    for threads in (1, 2, 64):
        set_num_threads(threads)
        x_part = x[:batch]
        results.append((matrix.matmul(x_part), matmul_transposed(matrix, dy), sampled_product(matrix, x_part, dy)))
    for result in results[1:]:
        for ours, one in zip(result, results[0], strict=True):
            np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-3)


def test_there_are_never_more_threads_than_cores():
    try:
        set_num_threads(1000)
        most = get_num_threads()
        set_num_threads(0)
        assert get_num_threads() == most
        set_num_threads(1)
        assert get_num_threads() == 1
        with pytest.raises(ValueError, match="negative"):
            set_num_threads(-1)
    finally:
        set_num_threads(0)


def test_many_callers_at_once(large):
    matrix, x = large
    set_num_threads(0)
    expected = {batch: matrix.matmul(x[:batch]) for batch in (1, 8, 40)}
    wrong = []

    def caller(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            batch = int(rng.choice([1, 8, 40]))
            if np.abs(matrix.matmul(x[:batch]) - expected[batch]).max() > 1e-3:
                wrong.append(batch)

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


def test_a_child_after_fork_computes_too():
    """The child has none of its parent's threads: it must make its own, or hang."""
    code = """
import os, sys
import numpy as np
from keras_blocksparse.sparse import BlockSparseMatrix, set_num_threads
set_num_threads(0)
matrix = BlockSparseMatrix.from_dense(np.ones((1500, 3000)), (16, 16))
x = np.ones((8, 1500), np.float32)
for _ in range(3):
    assert (matrix.matmul(x) == 1500).all()
for _ in range(3):
    child = os.fork()
    if child == 0:
        ok = all((matrix.matmul(x) == 1500).all() for _ in range(3))
        os._exit(0 if ok else 1)
    assert (matrix.matmul(x) == 1500).all()
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "done\n", done.stderr
