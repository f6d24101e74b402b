"""Train a dense and a 90 % block-sparse GRU on recorded vowels, export both, and say what sparsity cost and gave.

The settings below were chosen with `--evaluate held-out`, which trains on two thirds of the train set and scores the
rest. The test set is scored once, at the end, by the default.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.common.arguments import positive
from examples.common.packages import CACHE
from examples.common.quiet import quiet
from examples.japanese_vowels.data import Utterances, held_out, load


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.japanese_vowels",
        description="Nine speakers told apart from recorded vowels: a dense GRU against the same net block-sparse.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=positive, default=3, help="networks of each kind to train")
    add("--epochs", type=positive, default=60, help="epochs, the same for both kinds")
    add("--units", type=positive, default=256, help="units of the GRU")
    add("--block-size", type=positive, nargs=2, default=[16, 16], metavar=("ROWS", "COLS"), help="inputs, outputs")
    add("--learning-rate", type=float, default=1e-3, help="of Adam, falling to 0 by a cosine")
    add("--sparsity", type=float, default=0.9, help="share of zeros when the schedule ends")
    add("--group-lasso", type=float, default=3e-3, help="lambda while the schedule runs; 0 for none")
    add("--begin", type=float, default=0.1, help="share of the training after which pruning begins")
    add("--end", type=float, default=0.5, help="share of the training at which pruning ends")
    add(
        "--evaluate", choices=("test", "held-out"), default="test", help="held-out: a third of the train set, to choose"
    )
    add("--quick", action="store_true", help="2 seeds, 10 epochs, 64 units: does it run at all?")
    add("--output", type=Path, default=Path("demo_output"), help="folder for the table, the files and the pictures")
    add("--cache", type=Path, default=CACHE, help="folder for the downloaded recordings")
    args = parser.parse_args(argv)
    if not 0 <= args.begin < args.end <= 1:
        parser.error(f"expected 0 <= begin < end <= 1. Received: --begin {args.begin} --end {args.end}")
    if args.quick:
        args.seeds, args.epochs, args.units = 2, 10, 64
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the whole way: load, train, strip, export, compare, write."""
    args = parse_args(argv)
    start = time.perf_counter()
    console = Console()
    with quiet():  # after the arguments are read, so that --help need not wait for TensorFlow
        from examples.japanese_vowels import results, training

    train_set, test_set = load(args.cache)

    def data_of(seed: int) -> tuple[Utterances, Utterances]:
        return held_out(train_set, share=1 / 3, seed=seed) if args.evaluate == "held-out" else (train_set, test_set)

    fitted, scored = (len(part) for part in data_of(0))
    frames, cepstra = train_set.x.shape[1:]
    console.print(
        f"JapaneseVowels: {fitted} utterances to train on, {scored} to score; 9 speakers, up to {frames} frames of"
        f" {cepstra} cepstra."
    )
    recipe = training.Recipe(
        epochs=args.epochs,
        units=args.units,
        learning_rate=args.learning_rate,
        block_size=(args.block_size[0], args.block_size[1]),
        sparsity=args.sparsity,
        group_lasso=args.group_lasso,
        begin=args.begin,
        end=args.end,
    )

    runs: list[training.Run] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  loss {task.fields[loss]}  zeros {task.fields[zeros]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        for seed in range(args.seeds):
            for kind in training.KINDS:
                task = progress.add_task(f"{kind:>6}, seed {seed}", total=args.epochs, loss="-", zeros="-")

                def show(loss: float, zeros: float, task=task) -> None:
                    progress.update(task, advance=1, loss=f"{loss:.4f}", zeros=f"{zeros:4.0%}")

                runs.append(training.train(kind, seed, *data_of(seed), recipe, show))
                progress.stop_task(task)

    with console.status("Exporting, and running the files with and without our delegate"):
        files = results.export(runs, data_of(0)[1], args.output)
        pictures = results.draw(runs, files, args.output)
    outcome = results.Outcome(recipe, runs, files, args.evaluate, scored, seconds=time.perf_counter() - start)
    console.print(outcome.table())
    written = [*outcome.write(args.output), *pictures]
    console.print(f"Written in {outcome.seconds:.0f} s: " + ", ".join(map(str, written)), soft_wrap=True)


if __name__ == "__main__":
    main()
