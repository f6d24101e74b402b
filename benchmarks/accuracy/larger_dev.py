"""Scores trained speech networks on more held-out speech than their dev: more phrases of the same verses, spoken anew.

Settings are chosen by it where dev, a third of an hour, cannot tell networks apart. Test is not touched. It takes about
a minute a network, and ten for the speech, once.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from rich.console import Console

from benchmarks._report import console
from benchmarks.accuracy.running import MODEL, WORK
from examples.common.arguments import positive

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
#: Three hours.
PHRASES = 3600


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.larger_dev",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help=f"what trainings wrote (default: those of the grid, in {WORK})")
    add("--phrases", type=positive, default=PHRASES, help="3 seconds each (default: %(default)s)")
    add("--cache", type=Path, default=Path(".cache"), help="folder for the speech (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Score what is asked, and print each score when it is there.

    Raises:
        SystemExit: there is nothing to score, or a folder holds no trained speech network.
    """
    args = parse_args(argv)
    folders = args.folders or sorted(path.parent for path in WORK.glob(f"speech-*/*/*/{MODEL}"))
    if not folders:
        raise SystemExit(f"There is no trained speech network in {WORK}: python -m benchmarks.accuracy run")
    alphabets = {folder: _alphabet(folder) for folder in folders}

    import keras

    from examples.speech_ctc import corpora, network, synthesis
    from examples.speech_ctc.features import extract

    recipe = synthesis.Recipe(train=4, dev=args.phrases, test=4)  # of the others a few, which there must be
    shown = Console()
    data = f"manifest:{synthesis.make(recipe, args.cache, shown)}"
    features = extract(corpora.load(data), args.cache, shown)
    console.print(f"{features.hours('dev'):.2f} hours of dev.")
    for folder, alphabet in alphabets.items():
        model = keras.saving.load_model(folder / MODEL, compile=False)
        score, _ = network.character_error_rate(model, features, "dev", alphabet)
        console.print(f"{folder}: character error rate {score:.4f}", soft_wrap=True)


def _alphabet(folder: Path) -> str:
    try:
        result = json.loads((folder / "result.json").read_text())
        if result["task"] != "speech_ctc" or not (folder / MODEL).exists():
            raise KeyError("task")
        return result["alphabet"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{folder} is not what a training of examples.speech_ctc wrote: it takes {MODEL} and result.json."
        ) from error


if __name__ == "__main__":
    main()
