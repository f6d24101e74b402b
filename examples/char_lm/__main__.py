"""Train a character language model, dense or block-sparse, and write its score, its file for devices and its masks.

The text is the King James Bible, or any other by --text. Chapters are split at random into train, dev and test;
settings are chosen on dev, which is what is scored unless --evaluate test is given.
"""

import argparse

from rich.console import Console

from examples.common import finish, settings
from examples.common.arguments import positive
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
    add("--embedding", type=positive, default=64, help="numbers that stand for a character (default: %(default)s)")
    add("--length", type=positive, default=100, help="characters in a window (default: %(default)s)")
    settings.add_arguments(
        parser, cells=("gru", "lstm"), units=384, layers=1, dropout=0.0, epochs=12, batch=32, learning_rate=3e-3,
        output="char_lm_output",
    )  # fmt: skip
    chosen, _ = parser.parse_known_args(argv)
    if chosen.preset == "smoke":
        parser.set_defaults(**SMOKE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the whole way."""
    args = parse_args(argv)
    console = Console()
    with quiet():  # after the arguments are read, so that --help need not wait for TensorFlow
        finish.set_threads(args.threads)
        from examples.char_lm import training

    asked = training.Settings.from_arguments(args)
    model, result = training.train(asked, args.output, args.cache, console)
    finish.report(model, result, args.output, console, export=args.export, timesteps=args.length)


if __name__ == "__main__":
    main()
