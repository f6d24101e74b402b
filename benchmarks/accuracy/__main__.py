"""The paper's tables on tasks anyone can run.

run does the trainings of grid.toml that have no result yet, each on a core of its own, and adds a line for each to
results.jsonl. It can be stopped at any time, and goes on where it was. device measures what trained networks are on a
device, needs a quiet machine, and keeps pictures of masks. tables writes docs/results from both.
"""

import argparse
import os
import tomllib
from pathlib import Path

from benchmarks._report import Table, console
from benchmarks.accuracy import grid, results

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "list", "device", "tables"), help="list: what is done and what not")
    parser.add_argument("--only", metavar="REGEX", help="runs with such names; names are network/row/seed")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results"), help="of tables and pictures (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Do what is asked."""
    args = parse_args(argv)
    runs = grid.pick(grid.load(), args.only)
    if args.command == "run":
        from benchmarks.accuracy.running import Runner

        Runner(runs, args.workers).go()
    elif args.command == "list":
        done = results.of_runs(runs, results.load())
        table = Table("Runs", ("run", "dev", "test", "zero", "minutes"))
        for run in runs:
            found = done.get(run.name)
            figures = (
                ["-"] * 4
                if found is None
                else [
                    f"{found['scores']['dev']:.4f}", f"{found['scores']['test']:.4f}", f"{found['sparsity']:.1%}",
                    f"{found['course']['seconds'] / 60:.1f}",
                ]
            )  # fmt: skip
            table.rows.append([run.name, *figures])
        table.show()
        console.print(f"{len(done)} of {len(runs)} are done.")
    elif args.command == "device":
        from benchmarks.accuracy import device

        device.measure(runs, grid.load())
        device.keep_masks(runs, tomllib.loads(grid.GRID.read_text())["pictures"]["masks"], args.output)
    else:
        from benchmarks.accuracy import tables

        tables.write_pages(grid.load(), args.output)


if __name__ == "__main__":
    main()
