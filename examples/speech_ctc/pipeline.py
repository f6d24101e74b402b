"""Batches of utterances of like length, as a tf.data pipeline that can begin with any epoch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress

from examples.common.student import Teacher
from examples.speech_ctc.features import MELS, SUBSAMPLING, Features

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


def lessons(teacher: Teacher, features: Features, folder: Path, console: Console) -> dict[int, list[np.ndarray]]:
    """What a teacher says of the utterances to train on, as they are without masks, computed once.

    Args:
        teacher: its networks' inputs are frames.
        features: what to train on.
        folder: where it is kept while it is needed, so that it need not fit into memory.
        console: where progress is shown.

    Returns:
        For each utterance and each number of frames that it can begin late, the logits,
        `float16[ceil((late + frames) / 4), 1 + alphabet]`.
    """
    numbers = features.numbers("train")
    lengths = np.array([[_outputs(features.length[n], late) for late in range(SUBSAMPLING)] for n in numbers])
    folder.mkdir(parents=True, exist_ok=True)
    shape = (int(lengths.sum()), teacher.models[0].output_shape[-1])
    every = np.lib.format.open_memmap(folder / "lessons.npy", "w+", np.float16, shape)
    parts = iter(np.split(every, np.cumsum(lengths)[:-1]))
    found = {n: [next(parts) for _ in range(SUBSAMPLING)] for n in numbers}
    ask = tf.function(teacher, reduce_retracing=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Listening to the teacher", total=len(numbers) * SUBSAMPLING)
        for late in range(SUBSAMPLING):
            for chosen, frames in _padded(features, numbers, 32, late):
                for n, logits in zip(chosen, ask(tf.constant(frames)).numpy(), strict=True):
                    found[n][late][:] = logits[: len(found[n][late])]
                progress.advance(task, len(chosen))
    return found


def training_batches(
    features: Features,
    alphabet: str,
    batch: int,
    seed: int,
    first_epoch: int = 0,
    augment: bool = True,
    lessons: dict[int, list[np.ndarray]] | None = None,
) -> tf.data.Dataset:
    """Batches `(frames, labels)` without end, `float32[batch, time, 64]` and `int32[batch, characters]`.

    An utterance begins 0 to 3 frames late, at random: an output is then made of other frames, and what is heard differs
    from epoch to epoch. With `lessons` batches are `(frames, (labels, logits))`, the latter
    `float16[batch, ceil(time / 4), 1 + alphabet]`, 0 after an utterance's end.

    Args:
        features: what to train on.
        alphabet: see `alphabet_of`.
        batch: utterances in a batch.
        seed: gives the order.
        first_epoch: the epoch to begin with.
        augment: whether frames get SpecAugment's masks (Park et al. 2019); needs tensorflow-io.
        lessons: see there.
    """
    numbers = features.numbers("train")
    if batch > len(numbers):
        raise SystemExit(f"--batch {batch} is more than the {len(numbers)} utterances to train on.")

    def utterances() -> Iterator[tuple[np.ndarray, Any]]:
        for epoch in itertools.count(first_epoch):
            random = np.random.default_rng([seed, epoch, 1])
            for chosen in plan(features.length[numbers], batch, seed, epoch):
                for n in numbers[chosen]:
                    late = int(random.integers(SUBSAMPLING))
                    frames = _silence(1, SUBSAMPLING * _outputs(features.length[n], late))[0]
                    frames[late : late + features.length[n]] = features.of(n)
                    written = label(features.text[n], alphabet)
                    yield frames, written if lessons is None else (written, lessons[n][late])

    spec: Any = tf.TensorSpec([None], tf.int32)
    padding: Any = BLANK
    if lessons is not None:
        spec = spec, tf.TensorSpec([None, 1 + len(alphabet)], tf.float16)
        padding = padding, np.float16(0)
    frames = tf.TensorSpec([None, MELS], tf.float32)
    dataset = tf.data.Dataset.from_generator(utterances, output_signature=(frames, spec))
    if augment:
        mask = _spec_augment()
        dataset = dataset.map(lambda x, y: (mask(x), y))
    dataset = dataset.padded_batch(batch, padding_values=(SILENCE, padding), drop_remainder=True)
    return dataset.prefetch(4)


def _outputs(frames: int, late: int) -> int:
    return -(-(late + int(frames)) // SUBSAMPLING)


def _silence(count: int, frames: int) -> np.ndarray:
    return np.full((count, frames, MELS), SILENCE, np.float32)


def _padded(
    features: Features, numbers: np.ndarray, batch: int, late: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches `(utterances, frames)`, from short to long, padded to whole outputs.

    Convolutions with strides begin elsewhere if something is left over, so that outputs would depend on the batch.
    """
    numbers = numbers[np.argsort(features.length[numbers], kind="stable")]
    for start in range(0, len(numbers), batch):
        chosen = numbers[start : start + batch]
        frames = _silence(len(chosen), SUBSAMPLING * _outputs(features.length[chosen].max(), late))
        for row, n in zip(frames, chosen, strict=True):
            row[late : late + features.length[n]] = features.of(n)
        yield chosen, frames


def scored_batches(
    features: Features, split: str, batch: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Batches `(frames, lengths, texts)` of a whole split, from short to long."""
    for chosen, frames in _padded(features, features.numbers(split), batch):
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

    def mask(frames: Any) -> Any:
        for _ in range(MASKS):
            frames = tfio.audio.freq_mask(frames, FREQUENCIES)
            # Half of the utterance at most.
            widest = tf.minimum(TIMES, tf.shape(frames)[0] // 2)
            frames = tfio.audio.time_mask(frames, tf.maximum(widest, 1))
        return frames

    return mask
