"""Log-mel features of a whole corpus, computed once and kept on disk: training reads them through memory maps.

The corpus is worked through in shards. A shard is a `.npy` file of float16 frames and a `.json` file that says which
utterance lies where; one that is there is not computed again, so a pass over 1,000 hours can be killed and goes on.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress

from examples.common.files import write_json
from examples.speech_ctc.corpora import Corpus, Utterance

RATE, MELS = 16_000, 64
#: Frames are 25 ms long, one each 10 ms.
LENGTH, STRIDE = 400, 160
#: Quieter than the loudest by so much is silence: 12 nats.
RANGE = 52.0
SHARD = 2000
#: Frames for each output of a network.
SUBSAMPLING = 4


@dataclass(frozen=True)
class Features:
    """Features of a corpus.

    Attributes:
        frames: one memory map `float16[frames, 64]` for each shard, from -1 (silence) to 1.
        shard: `int32[utterances]`, which shard each utterance is in.
        start: `int64[utterances]`, its first frame there.
        length: `int32[utterances]`, how many it has.
        text: what is said in each.
        split: "train", "dev" or "test" for each.
        skipped: files that could not be used, and why.
    """

    frames: list[np.ndarray]
    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray
    text: list[str]
    split: np.ndarray
    skipped: list[dict[str, str]]

    def of(self, utterance: int) -> np.ndarray:
        """One utterance's frames, `float32[frames, 64]`."""
        start = self.start[utterance]
        part = self.frames[self.shard[utterance]][start : start + self.length[utterance]]
        return np.asarray(part, np.float32)

    def numbers(self, split: str) -> np.ndarray:
        """The utterances of a split."""
        return np.flatnonzero(self.split == split)

    def hours(self, split: str) -> float:
        """How long a split lasts."""
        return float(self.length[self.split == split].sum()) * STRIDE / RATE / 3600


def extract(corpus: Corpus, cache: Path, console: Console, max_seconds: float = 20.0) -> Features:
    """The features of a corpus: from `cache`, or computed into it.

    Args:
        corpus: what to read. Any format and rate that soundfile reads; channels are mixed to one.
        cache: folder for the features of all corpora.
        console: where progress and what was skipped is shown.
        max_seconds: longer utterances are skipped.

    Raises:
        SystemExit: nothing could be read for one of train, dev and test.
    """
    folder = cache / f"features-{_fingerprint(corpus, max_seconds)}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [corpus.utterances[n : n + SHARD] for n in range(0, len(corpus.utterances), SHARD)]
    todo = [n for n in range(len(parts)) if not (folder / f"{n:05}.json").exists()]
    if todo:
        spectrum = _spectrogram()
        with (
            Progress(console=console, disable=not console.is_terminal) as progress,
            concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool,
        ):
            task = progress.add_task("Log-mel features", total=sum(len(parts[n]) for n in todo))
            for n in todo:
                audio = pool.map(functools.partial(_read_or_why, max_seconds=max_seconds), parts[n])
                _write_shard(folder, n, parts[n], audio, spectrum, lambda: progress.advance(task))
    features = _open(folder, len(parts), corpus.skipped)
    if features.skipped:
        listed = write_json(folder / "skipped.json", features.skipped)
        console.print(f"{len(features.skipped):,} utterances are skipped; {listed} names them all:")
        for problem in features.skipped[:5]:
            console.print(f"  {problem['where']}: {problem['why']}", soft_wrap=True)
    for split in ("train", "dev", "test"):
        if not len(features.numbers(split)):
            raise SystemExit(f"Nothing is left for {split}: {len(features.skipped):,} utterances had to be skipped.")
    return features


def read_audio(path: Path, max_seconds: float) -> np.ndarray:
    """An audio file as `float32[samples]` at 16 kHz.

    Raises:
        ValueError: it cannot be used; says why.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(path) as file:
            if file.frames > max_seconds * file.samplerate:
                raise ValueError(f"{file.frames / file.samplerate:.1f} s long, more than {max_seconds:g}")
            audio, rate = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error
    if rate != RATE:
        audio = soxr.resample(audio, rate, RATE)
    if len(audio) < LENGTH:
        raise ValueError(f"only {len(audio) / RATE * 1000:.0f} ms long")
    if not np.isfinite(audio).all() or not audio.any():
        raise ValueError("holds NaN, infinity or silence only")
    return np.asarray(audio, np.float32)


def _spectrogram() -> Any:
    import tensorflow as tf

    layer = keras.layers.MelSpectrogram(
        fft_length=512, sequence_stride=STRIDE, sequence_length=LENGTH, sampling_rate=RATE, num_mel_bins=MELS,
        min_freq=20.0, max_freq=RATE / 2, top_db=RANGE,
    )  # fmt: skip

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def spectrum(audio: Any) -> Any:
        # Each utterance by itself: its loudest point is 1, and `RANGE` dB below it is -1.
        decibels = layer(audio / tf.reduce_max(tf.abs(audio)))
        return tf.cast(tf.transpose(decibels - tf.reduce_max(decibels)) * (2 / RANGE) + 1, tf.float16)

    return spectrum


def _read_or_why(utterance: Utterance, max_seconds: float) -> np.ndarray | ValueError:
    try:
        return read_audio(utterance.audio, max_seconds)
    except ValueError as error:
        return error


def _write_shard(
    folder: Path, number: int, utterances: list[Utterance], audio: Iterable[np.ndarray | ValueError], spectrum: Any,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    frames, rows, skipped, total = [], [], [], 0
    for utterance, samples in zip(utterances, audio, strict=True):
        advance()
        if isinstance(samples, ValueError):
            skipped.append({"where": str(utterance.audio), "why": str(samples)})
            continue
        found = spectrum(samples).numpy()
        text = utterance.text
        # CTC needs an output for each character, and one more between two that are the same.
        if len(found) // SUBSAMPLING < len(text) + sum(a == b for a, b in itertools.pairwise(text)):
            why = f"{len(text)} characters in {len(samples) / RATE:.1f} s are more than CTC can write"
            skipped.append({"where": str(utterance.audio), "why": why})
            continue
        frames.append(found)
        rows.append([total, len(found), utterance.text, utterance.split])
        total += len(found)
    path = folder / f".{os.getpid()}.npy"
    np.save(path, np.concatenate(frames) if frames else np.zeros((0, MELS), np.float16))
    path.replace(folder / f"{number:05}.npy")
    write_json(folder / f"{number:05}.json", {"utterances": rows, "skipped": skipped})


def _open(folder: Path, shards: int, skipped: list[dict[str, str]]) -> Features:
    frames, rows, skipped = [], [], list(skipped)
    for n in range(shards):
        found = json.loads((folder / f"{n:05}.json").read_text())
        frames.append(np.load(folder / f"{n:05}.npy", mmap_mode="r"))
        rows += [(n, *row) for row in found["utterances"]]
        skipped += found["skipped"]
    shard, start, length, text, split = zip(*rows, strict=True) if rows else ([],) * 5
    return Features(
        frames, np.array(shard, np.int32), np.array(start, np.int64), np.array(length, np.int32), list(text),
        np.array(split, str), skipped,
    )  # fmt: skip


def _fingerprint(corpus: Corpus, max_seconds: float) -> str:
    digest = hashlib.sha256(repr((RATE, MELS, LENGTH, STRIDE, RANGE, SHARD, max_seconds)).encode())
    for utterance in corpus.utterances:
        stat = utterance.audio.stat()
        digest.update(repr((str(utterance.audio), utterance.text, utterance.split, stat.st_size)).encode())
        digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:16]
