"""One block-sparse product against other libraries, and against what the machine can do, all in turns in one process.

python -m benchmarks.kernels                    # prints, and writes docs/benchmarks/kernels.md and its pictures
python -m benchmarks.kernels --quick            # a smoke run that writes nothing
python -m benchmarks.kernels --opus ../opus     # with the products of the Opus codec, from its sources
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks import _peers  # first: it sets thread counts, which libraries read as they load
from benchmarks._opus import Opus
from benchmarks._products import (
    BATCHES,
    BLOCKS,
    COLS,
    PEER_BATCHES,
    ROWS,
    SPARSITIES,
    SPARSITY,
    TOLERANCE,
    Bench,
    Case,
    block_text,
)
from benchmarks._report import Bar, Table, bars_table, console, last_cache_bytes, machine, page, time_text, write
from benchmarks._timing import Work, in_turns

# isort: split
import numpy as np

import keras_blocksparse as kbs
from keras_blocksparse.sparse import BlockSparseMatrix, get_isa, set_num_threads

# ---- bars -----------------------------------------------------------------------------------------------------------


def pair(name: str, first: float, other: str, second: float) -> str:
    """Both times of a ratio."""
    return f"{name} {time_text(first)}, {other} {time_text(second)}"


def against(work: str, text: str, bound: float, mine: float, best: tuple[str, float] | None) -> Bar:
    """A bar on how many times faster ours is than a peer."""
    if best is None:
        return Bar(work, text, bound, None)
    return Bar(work, text, bound, best[1] / mine, pair("ours", mine, *best))


def bars(bench: Bench) -> list[Bar]:
    """Those of the project that are about single products."""
    one, rows = Case("ours"), []
    work = "fp32, 16x16, batch 1"
    rows.append(against(work, "{} the best block-sparse peer", 5, bench[one], bench.best(["block-sparse"], 1)))
    rows.append(
        Bar(work, "{} of the read bandwidth", 0.9, bench.of_read(one),
            pair("ours", bench[one], "read", bench[Case("read")]), unit="%")
    )  # fmt: skip
    opus = bench.seconds.get(Case("opus"))
    rows.append(against(work, "{} opus sparse_sgemv8x4", 1.5, bench[one], ("opus", opus) if opus else None))
    for block in ((4, 4), (8, 4), (32, 32)):
        case = Case("ours", block=block)
        detail = pair("ours", bench[case], "16x16", bench[one])
        rows.append(Bar(f"fp32, {block_text(block)}, batch 1", "{} the 16x16 time", 1.3, bench[case] / bench[one],
                        detail, at_most=True))  # fmt: skip
    for block, bound in (((16, 16), 0.85), ((4, 4), 0.55)):
        for batch in (8, 32):
            case, work = Case("ours", batch, block), f"fp32, {block_text(block)}, batch {batch}"
            flops = bench.flops(case)
            detail = f"ours {time_text(bench[case])}, {flops / 1e9:.0f} of {bench.peak / 1e9:.0f} GFLOP/s"
            rows.append(Bar(work, "{} of the FMA peak", bound, flops / bench.peak, detail, unit="%"))
            if block == (16, 16):
                rows.append(against(work, "{} the best dense", 8, bench[case], bench.best(["dense"], batch)))
    for block in ((16, 16), (4, 8), (8, 4)):
        case, work = Case("ours", block=block, dtype="int8"), f"int8, {block_text(block)}, batch 1"
        fp32 = Case("ours", block=block)
        rows.append(against(work, "{} our fp32", 3, bench[case], ("fp32", bench[fp32])))
        # Opus's blocks are 4 inputs x 8 outputs: what it calls 8x4. Our 8x4 is compared with those, too.
        theirs = Case("opus", block=(16, 16) if block == (16, 16) else (4, 8), dtype="int8")
        opus = bench.seconds.get(theirs)
        rows.append(against(work, "{} opus sparse_cgemv8x4", 1, bench[case], ("opus", opus) if opus else None))
    for fitting in (False, True):
        found, read = line(bench, fitting), line(bench, fitting, "read")
        work = f"fp32, 16x16, batch 1, {found.sparsities[0]:.0%} to {found.sparsities[-1]:.0%} zero"
        if fitting:
            work += f", what fits into the last cache of {last_cache_bytes() / 2**20:.0f} MiB"
        detail = f"largest distance from the line {found.worst:.0%}; a read of as many bytes: R2 {read.r2:.3f}"
        rows.append(Bar(work, "a straight line in kept blocks, R2 {}", 0.99, found.r2, detail, unit=""))
    return rows


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds as a straight line in kept blocks."""

    sparsities: list[float]
    none: float  #: of no blocks
    each: float  #: of one more
    r2: float
    worst: float  #: the largest relative distance of a time from the line


def line(bench: Bench, fitting: bool = False, who: str = "ours") -> Line:
    """Least squares over all sparsities, or over those whose weights leave some room in the last cache."""
    sparsities, blocks, times = [], [], []
    for sparsity in SPARSITIES:
        matrix = bench.matrices[Case("ours", sparsity=sparsity)]
        if not fitting or matrix.nbytes <= 0.8 * last_cache_bytes():
            sparsities.append(sparsity)
            blocks.append(matrix.blocks)
            times.append(bench[Case(who, sparsity=sparsity)])
    each, none = np.polyfit(blocks, times, 1)
    fitted = none + each * np.array(blocks)
    r2 = 1 - np.square(times - fitted).sum() / np.square(times - np.mean(times)).sum()
    return Line(sparsities, float(none), float(each), float(r2), float(np.abs(fitted / times - 1).max()))


def op_call_seconds(rounds: int) -> dict[str, float] | None:
    """What one more product of a matrix of one block costs in a tf.function: a chain of many against a chain of one."""
    if not hasattr(kbs, "block_sparse_matmul"):
        print("left out: the cost of a call in a tf.function, since this version has no block_sparse_matmul")
        return None
    tf, more = _peers.tensorflow(), 200
    w = 0.1 * np.random.default_rng(3).standard_normal((16, 16)).astype(np.float32)
    matrix, dense, x = BlockSparseMatrix.from_dense(w, (16, 16)), tf.constant(w), tf.ones((1, 16))

    def chain(multiply: Callable[[object], object], length: int) -> Work:
        def run(y: object) -> object:
            for _ in range(length):
                y = multiply(y)
            return y

        compiled = tf.function(run).get_concrete_function(tf.TensorSpec((1, 16)))
        return lambda: compiled(x)

    kinds = {"ours": lambda y: kbs.block_sparse_matmul(y, matrix), "tf.matmul": lambda y: tf.matmul(y, dense)}
    works = {(name, n): chain(call, n) for name, call in kinds.items() for n in (1, more + 1)}
    seconds = in_turns(works, rounds, "calls in a tf.function")
    return {name: (seconds[name, more + 1] - seconds[name, 1]) / more for name in kinds}


def op_bar(calls: dict[str, float] | None) -> Bar:
    """The one about the cost of a call."""
    detail = "" if calls is None else f"tf.matmul of the same {calls['tf.matmul'] * 1e6:.2f} us"
    cost = None if calls is None else calls["ours"] * 1e6
    return Bar("one matmul call in a tf.function", "fixed cost {}", 5, cost, detail, at_most=True, unit="us")


# ---- tables ---------------------------------------------------------------------------------------------------------


def peers_table(bench: Bench) -> Table:
    """Everybody at 16x16."""
    table = Table(
        f"16x16 blocks, {SPARSITY:.0%} zero, against other libraries",
        ("", "", *(f"batch {batch}" for batch in PEER_BATCHES)),
        note="In brackets: how many times longer than ours in float32.",
    )
    mine = [bench[Case("ours", batch)] for batch in PEER_BATCHES]
    for dtype in TOLERANCE:
        times = [bench[Case("ours", batch, dtype=dtype)] for batch in PEER_BATCHES]
        table.rows.append((f"ours, {dtype}", "block-sparse", *map(ratio_text, times, mine)))
    others = [(peer.name, peer.kind, "float32") for peer in bench.peers]
    if bench.opus:
        others = [("opus", "block-sparse", "float32"), ("opus", "block-sparse", "int8"), *others]
    for name, kind, dtype in others:
        cases = [Case(name, batch, dtype=dtype) for batch in PEER_BATCHES]
        times = [bench.seconds.get(case) for case in cases]
        if any(times):
            shown = "opus sparse_sgemv8x4" if name == "opus" and dtype == "float32" else name
            shown = "opus sparse_cgemv8x4, int8" if dtype == "int8" else shown
            table.rows.append((shown, kind, *map(ratio_text, times, mine)))
    return table


def ratio_text(seconds: float | None, mine: float) -> str:
    """A time and its ratio to ours."""
    return "-" if seconds is None else f"{time_text(seconds)} ({seconds / mine:.3g}x)"


def limits_table(bench: Bench) -> Table:
    """Ours at all dtypes, blocks and batches."""
    table = Table(
        "Against what the machine can do",
        ("dtype, block", "MB", "GB/s", "of read", *(f"batch {batch}" for batch in BATCHES)),
        note="GB/s, of read: at batch 1; the latter is the time to read a buffer of the same size, as a share of ours. "
        "For each batch the time, and in brackets the kept blocks' multiply-adds a second as a share of the FMA peak "
        f"of one core in float32, {bench.peak / 1e9:.0f} GFLOP/s.",
    )
    for dtype in TOLERANCE:
        for block in BLOCKS:
            case = Case("ours", block=block, dtype=dtype)
            nbytes = bench.matrices[case].nbytes
            cases = [dataclasses.replace(case, batch=batch) for batch in BATCHES]
            cells = [f"{time_text(bench[c])} ({bench.flops(c) / bench.peak:.0%})" for c in cases]
            name, speed = f"{dtype}, {block_text(block)}", nbytes / bench[case] / 1e9
            table.rows.append((name, f"{nbytes / 1e6:.1f}", f"{speed:.0f}", f"{bench.of_read(case):.0%}", *cells))
    return table


def sparsity_table(bench: Bench) -> Table:
    """Ours and the block-sparse peers, 50 % to 98 %."""
    peers = [peer.name for peer in bench.peers if peer.kind == "block-sparse"]
    fit = line(bench, fitting=True)
    table = Table(
        "Time against sparsity, 16x16, batch 1, float32",
        ("zero", "kept blocks", "MB", "ours", "of read", "the line", *peers),
        note=f"The line: {fit.none * 1e6:.1f} us and {fit.each * 1e9:.2f} ns for each block, fitted where the weights "
        f"fit into the last cache, {last_cache_bytes() / 2**20:.0f} MiB; there R2 is {fit.r2:.4f}, and the largest "
        f"distance from it {fit.worst:.0%}.",
    )
    for sparsity in SPARSITIES:
        case = Case("ours", sparsity=sparsity)
        matrix, mine = bench.matrices[case], bench[case]
        cells = [ratio_text(bench.seconds.get(dataclasses.replace(case, who=name)), mine) for name in peers]
        table.rows.append(
            (f"{sparsity:.0%}", f"{matrix.blocks}", f"{matrix.nbytes / 1e6:.1f}", time_text(mine),
             f"{bench.of_read(case):.0%}", time_text(fit.none + fit.each * matrix.blocks), *cells)
        )  # fmt: skip
    return table


def main() -> None:
    """Measures, prints, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, and nothing written without --output")
    parser.add_argument("--rounds", type=int, help="turns of each piece of work (default: 25, or 3 with --quick)")
    parser.add_argument("--opus", type=Path, metavar="DIR", help="a checkout of the Opus codec's sources")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: docs/benchmarks)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 25)
    output = options.output or (None if options.quick else Path("docs/benchmarks"))

    set_num_threads(1)
    bench = Bench(Opus(options.opus) if options.opus else None)
    facts = machine(get_isa(), _peers.versions(bench.peers))
    bench.prepare()
    bench.run(rounds)
    calls = op_call_seconds(rounds)

    lead = (
        f"y = x W with W of {ROWS} x {COLS}, {SPARSITY:.0%} zero in random blocks (inputs x outputs) unless said; one "
        f"thread; medians over {rounds} turns of up to 20 calls each."
    )
    tables = [
        bars_table([*bars(bench), op_bar(calls)]),
        peers_table(bench),
        limits_table(bench),
        sparsity_table(bench),
    ]
    console.print(f"{facts}\n{lead}\n")
    for table in tables:
        table.show()
    if output:
        from benchmarks._pictures import kernel_pictures

        command = "python -m benchmarks.kernels" + " --quick" * options.quick + " --opus DIR" * bool(options.opus)
        pictures = kernel_pictures(bench, output)
        write(output / "kernels.md", page("Products", command, lead, facts, tables, pictures))


if __name__ == "__main__":
    main()
