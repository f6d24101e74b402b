"""Train a network to write what is said, dense or block-sparse, and write its score, its file for devices, its masks.

The speech is made by espeak-ng from the King James Bible, or is your own: --data manifest:FILE or librispeech:DIR.
Settings are chosen on dev, which is what is scored unless --evaluate test is given.
"""

import argparse

from rich.console import Console

from examples.common import finish, settings
from examples.common.arguments import positive
from examples.common.quiet import quiet

SMOKE = {
    "phrases": 96, "units": 48, "layers": 2, "channels": 32, "epochs": 2, "batch": 8, "block_size": [4, 4],
    "updates": 10,
}  # fmt: skip
DATA = """\
kjv: verses of the King James Bible, spoken by espeak-ng, with noise and echo (default).
manifest:FILE: JSON lines with audio_filepath, text and, if you like, split (NeMo's manifests); three files, for
train, dev and test, are manifest:FILE,FILE,FILE. librispeech:DIR: speaker/chapter/*.flac with *.trans.txt.
FLAC, WAV, Ogg and MP3 of any sampling rate"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.speech_ctc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=("smoke",), help="smoke: little of everything, in a minute")
    add("--data", default="kjv", help=DATA)
    add("--phrases", type=positive, default=1800, help="of kjv to train on, 3 seconds each (default: %(default)s)")
    add("--max-seconds", type=float, default=20.0, help="longer utterances are skipped (default: %(default)s)")
    add("--channels", type=positive, default=128, help="of the convolutions (default: %(default)s)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="SpecAugment (default: %(default)s)")
    add("--beam", type=positive, help="score by a beam search of this width (default: the best path)")
    settings.add_arguments(
        parser, cells=("gru", "rnn"), units=256, layers=3, dropout=0.1, epochs=15, batch=16, learning_rate=2e-3,
        output="speech_ctc_output",
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
        from examples.speech_ctc import training

    asked = training.Settings.from_arguments(args)
    model, result = training.train(asked, args.output, args.cache, console)
    finish.report(model, result, args.output, console, export=args.export, timesteps=400)


if __name__ == "__main__":
    main()
