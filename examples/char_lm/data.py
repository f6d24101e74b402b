"""Text as characters: chapters split at random into train, dev and test, cut into windows for training and scoring."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from examples.common import bible
from examples.common.packages import CACHE

DEV, TEST = 0.03, 0.03
#: Characters that a network reads before its guesses are scored.
CONTEXT = 50


@dataclass(frozen=True)
class Corpus:
    """A text as numbers of characters.

    Attributes:
        alphabet: the characters, in the order of their numbers.
        train: `int32[characters]`.
        dev: `int32[characters]`, to choose by.
        test: `int32[characters]`, to report once.
    """

    alphabet: str
    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray


def load(text: Path | None = None, characters: int | None = None, cache: Path = CACHE) -> Corpus:
    """The corpus of a text file, or of the King James Bible.

    Chapters (of a file: parts between blank lines) go to train, dev or test at random, always in the same way.

    Args:
        text: UTF-8 text file; the King James Bible if `None`.
        characters: how many characters to train on, roughly: that many whole chapters, taken at random. All if `None`.
        cache: folder for the downloaded Bible.

    Raises:
        SystemExit: the file cannot be read, or is too short to be split.
    """
    chapters = bible.chapters(bible.load(cache)) if text is None else parts_of(text)
    split = bible.split(len(chapters), {"dev": DEV, "test": TEST})
    if characters is not None:
        shuffled = np.random.default_rng(1).permutation(split["train"])
        total = np.cumsum([len(chapters[n]) for n in shuffled])
        split["train"] = np.sort(shuffled[: int(np.searchsorted(total, characters)) + 1])
    texts = {name: "".join(chapters[n] for n in numbers) for name, numbers in split.items()}
    for name, part in texts.items():
        if len(part) < 4 * CONTEXT:
            raise SystemExit(
                f"The text is too short: {len(part)} characters for {name}, at least {4 * CONTEXT} are needed."
            )
    alphabet = "".join(sorted(set("".join(chapters))))
    number = {character: n for n, character in enumerate(alphabet)}
    return Corpus(alphabet, **{name: np.array([number[c] for c in part], np.int32) for name, part in texts.items()})


def parts_of(text: Path) -> list[str]:
    """The parts of a text file that stand between blank lines; of one without blank lines, its lines."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{text} cannot be read as UTF-8 text: {error}") from error
    parts = [part + "\n" for part in re.split(r"\n\s*\n", content) if part.strip()]
    if len(parts) < 100:
        parts = [line + "\n" for line in content.splitlines() if line.strip()]
    if len(parts) < 100:
        raise SystemExit(f"{text} has {len(parts)} parts or lines; at least 100 are needed to split it at random.")
    return parts


def windows_in(text: np.ndarray, length: int) -> int:
    """How many windows an epoch has."""
    return (len(text) - 1) // length - 1


def epoch_of(text: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The first characters of an epoch's windows, in random order, the same for the same seed and epoch."""
    random = np.random.default_rng([seed, epoch])
    return random.integers(length) + length * random.permutation(windows_in(text, length))


def training_batches(text: np.ndarray, batch: int, length: int, seed: int, first_epoch: int = 0) -> tf.data.Dataset:
    """Batches `(characters, next characters)` without end, both `int32[batch, length]`.

    What does not fill a batch waits for another epoch.

    Args:
        text: `int32[characters]`.
        batch: windows in a batch.
        length: characters of a window that are guessed.
        seed: with the epoch, gives the order.
        first_epoch: the epoch to begin with.

    Raises:
        SystemExit: the text is too short for a batch.
    """
    if windows_in(text, length) < batch:
        raise SystemExit(f"Expected a text of at least {(batch + 2) * length} characters. Received: {len(text)}")

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for epoch in itertools.count(first_epoch):
            starts = epoch_of(text, length, seed, epoch)
            for first in range(0, len(starts) - batch + 1, batch):
                windows = text[starts[first : first + batch, None] + np.arange(length + 1)]
                yield windows[:, :-1], windows[:, 1:]

    spec = tf.TensorSpec([batch, length], tf.int32)
    return tf.data.Dataset.from_generator(batches, output_signature=(spec, spec)).prefetch(4)


def scored_windows(text: np.ndarray, length: int = 250, batch: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of windows in which every character but the first `CONTEXT` is scored with at least that much before it.

    Yields:
        The windows, `int32[batch, CONTEXT + length - 1]`, and the last `length` characters to guess of each,
        `int32[batch, length]`. What does not fill a window at the end of the text is left out.
    """
    starts = np.arange(0, len(text) - CONTEXT - length, length)
    for first in range(0, len(starts), batch):
        windows = text[starts[first : first + batch, None] + np.arange(CONTEXT + length)]
        yield windows[:, :-1], windows[:, CONTEXT:]
