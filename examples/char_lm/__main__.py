"""Train a character language model, dense or block-sparse, and write its score, its file for devices and its masks.

The text is the King James Bible, or any other by --text. Chapters are split at random into train, dev and test;
settings are chosen on dev, which is what is scored unless --evaluate test is given.
"""

import argparse
from pathlib import Path

from rich.console import Console

from examples.common import compression, finish
from examples.common.arguments import positive, share
from examples.common.packages import CACHE
from examples.common.quiet import quiet

SMOKE = {"characters": 20_000, "units": 64, "epochs": 3, "batch": 16, "length": 50, "block_size": [4, 4], "updates": 20}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.char_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=("smoke",), help="smoke: little of everything, in a minute")
    add("--text", metavar="FILE", help="UTF-8 text file (default: the King James Bible)")
    add("--characters", type=positive, default=400_000, help="to train on, roughly (default: %(default)s)")
    add("--all", action="store_const", dest="characters", const=None, help="train on all of the text")
    add("--cell", choices=("gru", "lstm"), default="gru", help="(default: %(default)s)")
    add("--units", type=positive, default=384, help="of each recurrent layer (default: %(default)s)")
    add("--layers", type=positive, default=1, help="recurrent layers (default: %(default)s)")
    add("--embedding", type=positive, default=64, help="numbers that stand for a character (default: %(default)s)")
    add("--dropout", type=share, default=0.0, help="of the recurrent layers' outputs (default: %(default)s)")
    add("--epochs", type=positive, default=12, help="(default: %(default)s)")
    add("--batch", type=positive, default=32, help="windows in a batch (default: %(default)s)")
    add("--length", type=positive, default=100, help="characters in a window (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="of AdamW, at its highest (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    compression.add_arguments(parser)
    finish.add_arguments(parser, output="char_lm_output")
    add("--cache", type=Path, default=CACHE, help="folder for downloaded data (default: %(default)s)")
    chosen, _ = parser.parse_known_args(argv)
    if chosen.preset == "smoke":
        parser.set_defaults(**SMOKE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the whole way."""
    args = parse_args(argv)
    how = compression.from_arguments(args)
    console = Console()
    with quiet():  # after the arguments are read, so that --help need not wait for TensorFlow
        finish.set_threads(args.threads)
        from examples.char_lm import training

    settings = training.Settings(
        text=args.text, characters=args.characters, cell=args.cell, units=args.units, layers=args.layers,
        embedding=args.embedding, dropout=args.dropout, epochs=args.epochs, batch=args.batch, length=args.length,
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, seed=args.seed, native_loop=args.native_loop,
        evaluate=args.evaluate, compression=how,
    )  # fmt: skip
    model, result = training.train(settings, args.output, args.cache, console)
    finish.report(model, result, args.output, console, export=args.export, timesteps=args.length)


if __name__ == "__main__":
    main()
