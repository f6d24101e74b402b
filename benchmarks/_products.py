"""The products that kernels.py times: every case prepared, its result checked, all timed in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from benchmarks import _peers  # first: it sets thread counts, which libraries read as they load
from benchmarks._opus import Opus
from benchmarks._timing import Limits, Work, in_turns

# isort: split
import numpy as np

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, _native

ROWS, COLS, SPARSITY = 2560, 7680, 0.9
BLOCKS = ((16, 16), (4, 4), (8, 4), (4, 8), (8, 8), (32, 32))
BATCHES, PEER_BATCHES = (1, 2, 4, 8, 16, 32), (1, 8, 32)
SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
# How far a product may be from the exact one, as a share of its largest value.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is timed. `who` is "ours", a peer, or "read" (of as many bytes as ours) or "multiply-add"."""

    who: str
    batch: int = 1
    block: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    sparsity: float = SPARSITY


def pruned(block_size: tuple[int, int], sparsity: float = SPARSITY) -> np.ndarray:
    """A matrix whose blocks are zero at random, the same for every peer."""
    rng = np.random.default_rng(7)
    grid = BlockGrid((ROWS, COLS), block_size)
    keep = rng.permutation(grid.grid_shape[1] * grid.grid_shape[2]).reshape(grid.grid_shape)
    return (rng.standard_normal((ROWS, COLS)) * grid.expand(keep >= sparsity * keep.size)).astype(np.float32)


def ours(matrix: BlockSparseMatrix, x: np.ndarray) -> Work:
    """One product by libkbs, without numpy's part in it."""
    y = np.empty((len(x), matrix.shape[1]), np.float32)
    function = _native.library().kbs_matmul
    pointers = x.ctypes.data_as(_native.FloatPointer), y.ctypes.data_as(_native.FloatPointer)
    arguments = matrix._handle, None, pointers[0], matrix.shape[0], len(x), None, 0, pointers[1], matrix.shape[1]

    def call() -> np.ndarray:
        function(*arguments)
        return y

    call.keep = matrix, x  # type: ignore[attr-defined]
    return call


class Bench:
    """Prepares every case, checks its result, and times all of them in turns."""

    def __init__(self, opus: Opus | None) -> None:
        self.limits, self.opus = Limits(), opus
        self.peers = _peers.installed(_peers.MATMUL)
        self.works: dict[Case, Work] = {}
        self.matrices: dict[Case, BlockSparseMatrix] = {}  # by the case of batch 1
        self.seconds: dict[Case, float] = {}
        rng = np.random.default_rng(1)
        self.x = {batch: rng.uniform(-1, 1, (batch, ROWS)).astype(np.float32) for batch in BATCHES}

    def add(self, case: Case, prepare: Callable[[], Work], w: np.ndarray) -> None:
        """Adds one if it works; says so if not."""
        try:
            work = prepare()
            got = np.asarray(work()) + getattr(work, "offset", 0)
            _peers.check(case.who, got, self.x[case.batch] @ w, TOLERANCE[case.dtype])
        except Exception as error:
            _peers.left_out(f"{case.who}, {block_text(case.block)}, batch {case.batch}", error)
        else:
            self.works[case] = work

    def add_ours(self, w: np.ndarray, case: Case, batches: Iterable[int]) -> None:
        """Our product at some batches, and a read of as many bytes."""
        matrix = BlockSparseMatrix.from_dense(w, case.block, dtype=case.dtype)
        self.matrices[case] = matrix
        self.works[dataclasses.replace(case, who="read")] = self.limits.read(matrix.nbytes)
        for batch in batches:
            self.add(dataclasses.replace(case, batch=batch), lambda batch=batch: ours(matrix, self.x[batch]), w)

    def add_peers(self, w: np.ndarray, case: Case, batches: Iterable[int], kinds: Iterable[str]) -> None:
        """The peers of some kinds."""
        for batch in batches:
            for peer in (peer for peer in self.peers if peer.kind in kinds):
                one = dataclasses.replace(case, who=peer.name, batch=batch)
                self.add(one, lambda peer=peer, batch=batch: peer.prepare(w, self.x[batch], case.block), w)

    def prepare(self) -> None:
        """All cases."""
        self.works[Case("multiply-add")] = self.limits.multiply_add()
        for block in BLOCKS:
            w, at_block = pruned(block), Case("ours", block=block)
            for dtype in TOLERANCE:
                self.add_ours(w, Case("ours", block=block, dtype=dtype), BATCHES)
            if block == (16, 16):
                self.add_peers(w, at_block, PEER_BATCHES, ("dense", "sparse", "block-sparse"))
            else:
                self.add_peers(w, at_block, [1], ("block-sparse",))
            if self.opus and block in ((16, 16), (4, 8)):
                self.add(Case("opus", block=block), lambda w=w: self.opus.float32(w, self.x[1]), w)
                self.add(Case("opus", block=block, dtype="int8"), lambda w=w: self.opus.int8(w, self.x[1]), w)
        for sparsity in SPARSITIES:
            if sparsity != SPARSITY:
                w, case = pruned((16, 16), sparsity), Case("ours", sparsity=sparsity)
                self.add_ours(w, case, [1])
                self.add_peers(w, case, [1], ("block-sparse",))

    def run(self, rounds: int) -> None:
        """Times everything that was prepared."""
        self.seconds = in_turns(self.works, rounds, "products")

    def __getitem__(self, case: Case) -> float:
        return self.seconds[case]

    def best(self, kinds: Iterable[str], batch: int) -> tuple[str, float] | None:
        """The quickest peer of some kinds."""
        found = [
            (self.seconds[case], peer.name)
            for peer in self.peers
            if peer.kind in kinds and (case := Case(peer.name, batch)) in self.seconds
        ]
        return (min(found)[1], min(found)[0]) if found else None

    def of_read(self, case: Case) -> float:
        """The read's time as a share of ours."""
        return self[dataclasses.replace(case, who="read", batch=1)] / self[case]

    def flops(self, case: Case) -> float:
        """Multiply-adds of the kept blocks a second, times two."""
        density = self.matrices[dataclasses.replace(case, batch=1)].density
        return 2 * density * ROWS * COLS * case.batch / self[case]

    @property
    def peak(self) -> float:
        """Of one core, measured."""
        return Limits.FLOPS / self[Case("multiply-add")]


def block_text(block: tuple[int, int]) -> str:
    """Inputs x outputs."""
    return f"{block[0]}x{block[1]}"
