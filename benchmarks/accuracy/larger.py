"""Scores trained speech networks on more held-out speech: phrases of the verses of dev or of test, spoken anew.

Settings are chosen on the larger dev where dev, a third of an hour, cannot tell networks apart. The larger test is for
reports only. Both take about a minute a network, and ten for the speech, once. At the end stands what each row of the
grid loses against the dense networks of the same seeds, with the standard error that chance in the phrases gives it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks._report import console
from benchmarks.accuracy.running import MODEL, WORK
from benchmarks.accuracy.summary import Figure
from examples.common.arguments import positive

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
#: Three hours.
PHRASES = 3600


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.larger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folders", nargs="*", type=Path, help=f"what trainings wrote (default: those of the grid, in {WORK})")
    add("--split", choices=("dev", "test"), default="dev", help="whose verses (default: %(default)s)")
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

    few = dict.fromkeys(("train", "dev", "test"), 4)  # there must be some of each
    recipe = synthesis.Recipe(**few | {args.split: args.phrases})
    shown = Console()
    data = f"manifest:{synthesis.make(recipe, args.cache, shown)}"
    features = extract(corpora.load(data), args.cache, shown)
    console.print(f"{features.hours(args.split):.2f} hours of {args.split}.")
    wrong = {}
    for folder, alphabet in alphabets.items():
        model = keras.saving.load_model(folder / MODEL, compile=False)
        score, pairs = network.character_error_rate(model, features, args.split, alphabet)
        console.print(f"{folder}: character error rate {score:.4f}", soft_wrap=True)
        said, heard = map(list, zip(*pairs, strict=True))
        wrong[folder] = network.errors(heard, said)
    for row, (relative, seeds) in against_dense(wrong).items():
        console.print(f"{row}: {relative.percent()} against dense, by {seeds} seed(s)", soft_wrap=True)


def against_dense(wrong: dict[Path, np.ndarray]) -> dict[Path, tuple[Figure, int]]:
    """What rows of the grid, `<network>/<row>/<seed>`, lose against `<network>/dense`: the paper's relative figure.

    Of the seeds that both have, taken together. The standard error is that of a ratio of two sums over one sample
    (Cochran, "Sampling Techniques", section 6.3): of the phrases, not of the seeds.

    Args:
        wrong: errors in each phrase, `int[phrases]`, by the folders of trainings.

    Returns:
        The figure of each row that has a seed in common with the dense one, and how many it has.
    """
    found = {}
    for row in dict.fromkeys(folder.parent for folder in wrong):
        dense = row.parent / "dense"
        seeds = [f.name for f in wrong if f.parent == row and dense / f.name in wrong]
        if row == dense or not seeds:
            continue
        ours, theirs = (sum(wrong[path / seed] for seed in seeds) for path in (row, dense))
        ratio = ours.sum() / theirs.sum()
        error = np.std(ours - ratio * theirs) * np.sqrt(len(ours)) / theirs.sum()
        found[row] = Figure(float(1 - ratio), float(error)), len(seeds)
    return found


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
