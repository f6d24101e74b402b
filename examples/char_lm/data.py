"""Text as characters: chapters split at random into train, dev and test, cut into windows for training and scoring."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

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


class Windows(keras.utils.PyDataset):
    """Windows of a text in random order, from another first character in each epoch.

    Args:
        text: `int32[characters]`.
        batch: windows in a batch; what does not fill a batch waits for another epoch.
        length: characters of a window that are guessed.
        seed: with the epoch, gives the order.
    """

    def __init__(self, text: np.ndarray, batch: int, length: int, seed: int) -> None:
        super().__init__()
        self.text, self.batch, self.length, self.seed = text, batch, length, seed
        self.count = (len(text) - 1) // length - 1
        if self.count < batch:
            raise ValueError(f"Expected a text of at least {(batch + 2) * length} characters. Received: {len(text)}")
        self.epoch = 0
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Takes the order of `epoch`: the same one whenever it is asked for, so that training can be resumed."""
        random = np.random.default_rng([self.seed, epoch])
        self.epoch = epoch
        self.starts = random.integers(self.length) + self.length * random.permutation(self.count)

    def __len__(self) -> int:
        return self.count // self.batch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.starts[index * self.batch : (index + 1) * self.batch]
        windows = self.text[starts[:, None] + np.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def on_epoch_end(self) -> None:
        """Keras calls this."""
        self.start_epoch(self.epoch + 1)


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
