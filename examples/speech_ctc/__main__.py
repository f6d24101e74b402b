"""Train a network to write what is said, dense or block-sparse, and write its score, its file for devices, its masks.

The speech is made by espeak-ng from the King James Bible, or is your own: --data manifest:FILE or librispeech:DIR.
Settings are chosen on dev, which is what is scored unless --evaluate test is given.
"""

import argparse
from pathlib import Path

from rich.console import Console

from examples.common import compression, finish
from examples.common.arguments import positive, share
from examples.common.packages import CACHE
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
    add(
        "--cell", choices=("gru", "rnn"), default="gru", help="forward GRU, or bidirectional RNN (default: %(default)s)"
    )
    add("--units", type=positive, default=256, help="of each recurrent layer (default: %(default)s)")
    add("--layers", type=positive, default=3, help="recurrent layers (default: %(default)s)")
    add("--channels", type=positive, default=128, help="of the convolutions (default: %(default)s)")
    add("--dropout", type=share, default=0.1, help="of the recurrent layers' outputs (default: %(default)s)")
    add("--epochs", type=positive, default=15, help="(default: %(default)s)")
    add("--batch", type=positive, default=16, help="utterances in a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="of AdamW, at its highest (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="SpecAugment (default: %(default)s)")
    add("--beam", type=positive, help="score by a beam search of this width (default: the best path)")
    compression.add_arguments(parser)
    finish.add_arguments(parser, output="speech_ctc_output")
    add("--cache", type=Path, default=CACHE, help="folder for data and features (default: %(default)s)")
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
        from examples.speech_ctc import training

    settings = training.Settings(
        data=args.data, phrases=args.phrases, max_seconds=args.max_seconds, cell=args.cell, units=args.units,
        layers=args.layers, channels=args.channels, dropout=args.dropout, epochs=args.epochs, batch=args.batch,
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, augment=args.augment, beam=args.beam,
        seed=args.seed, native_loop=args.native_loop, evaluate=args.evaluate, compression=how,
    )  # fmt: skip
    model, result = training.train(settings, args.output, args.cache, console)
    finish.report(model, result, args.output, console, export=args.export, timesteps=400)


if __name__ == "__main__":
    main()
