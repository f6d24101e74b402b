"""Batches of utterances of like length, as a tf.data pipeline that can begin with any epoch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from examples.speech_ctc.features import MELS, Features

#: Number of the blank, and of what fills up shorter labels.
BLANK = 0
SILENCE = -1.0
#: Widest masks of SpecAugment: mel bins, frames, and how many of each.
FREQUENCIES, TIMES, MASKS = 12, 25, 2


def alphabet_of(features: Features) -> str:
    """The characters of the training texts, in the order of their numbers from 1."""
    return "".join(sorted(set("".join(features.text[n] for n in features.numbers("train")))))


def label(text: str, alphabet: str) -> np.ndarray:
    """A text's numbers, `int32[characters]`; what the alphabet does not have is left out."""
    numbers = {character: n for n, character in enumerate(alphabet, 1)}
    return np.array([numbers[c] for c in text if c in numbers], np.int32)


def plan(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch: utterances of like length together, in random order; from short to long in epoch 0.

    The same for the same seed and epoch. What does not fill a batch waits for another epoch.

    Args:
        lengths: `int[utterances]`.
        batch: utterances in a batch.
        seed: with the epoch, gives the order.
        epoch: from 0.
    """
    random = np.random.default_rng([seed, epoch])
    count = len(lengths) // batch
    drawn = random.permutation(len(lengths))[: count * batch]
    # Lengths are blurred, or the same utterances would meet in every epoch.
    blurred = lengths[drawn] * random.uniform(0.9, 1.1, len(drawn))
    batches = np.split(drawn[np.argsort(blurred, kind="stable")], count)
    return batches if epoch == 0 else [batches[n] for n in random.permutation(count)]


def training_batches(
    features: Features, alphabet: str, batch: int, seed: int, first_epoch: int = 0, augment: bool = True
) -> tf.data.Dataset:
    """Batches `(frames, labels)` without end, `float32[batch, time, 64]` and `int32[batch, characters]`.

    Args:
        features: what to train on.
        alphabet: see `alphabet_of`.
        batch: utterances in a batch.
        seed: gives the order.
        first_epoch: the epoch to begin with.
        augment: whether frames get SpecAugment's masks (Park et al. 2019); needs tensorflow-io.
    """
    numbers = features.numbers("train")
    if batch > len(numbers):
        raise SystemExit(f"--batch {batch} is more than the {len(numbers)} utterances to train on.")

    def utterances() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for epoch in itertools.count(first_epoch):
            for chosen in plan(features.length[numbers], batch, seed, epoch):
                for n in numbers[chosen]:
                    yield features.of(n), label(features.text[n], alphabet)

    spec = (tf.TensorSpec([None, MELS], tf.float32), tf.TensorSpec([None], tf.int32))
    dataset = tf.data.Dataset.from_generator(utterances, output_signature=spec)
    if augment:
        dataset = dataset.map(_spec_augment())
    dataset = dataset.padded_batch(batch, padding_values=(SILENCE, BLANK), drop_remainder=True)
    return dataset.prefetch(4)


def scored_batches(
    features: Features, split: str, batch: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Batches `(frames, lengths, texts)` of a whole split, from short to long."""
    numbers = features.numbers(split)
    numbers = numbers[np.argsort(features.length[numbers], kind="stable")]
    for start in range(0, len(numbers), batch):
        chosen = numbers[start : start + batch]
        frames = np.full((len(chosen), features.length[chosen].max(), MELS), SILENCE, np.float32)
        for row, n in zip(frames, chosen, strict=True):
            row[: features.length[n]] = features.of(n)
        yield frames, features.length[chosen], [features.text[n] for n in chosen]


def _spec_augment() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its native ops do not load beside today's TensorFlow; these are not
            import tensorflow_io as tfio
    except ImportError as error:
        raise SystemExit(
            'SpecAugment is done by tensorflow-io: pip install "keras_blocksparse[audio]", or give --no-augment.'
        ) from error

    def augment(frames: Any, labels: Any) -> Any:
        for _ in range(MASKS):
            frames = tfio.audio.freq_mask(frames, FREQUENCIES)
            # Half of the utterance at most.
            widest = tf.minimum(TIMES, tf.shape(frames)[0] // 2)
            frames = tfio.audio.time_mask(frames, tf.maximum(widest, 1))
        return frames, labels

    return augment
