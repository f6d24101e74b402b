"""A speech corpus that is made: verses of the King James Bible, spoken by espeak-ng in rooms with noise.

Everything is drawn from a seed, so that the same corpus is made on every machine. It is written as FLAC files and a
manifest, and read like anybody's own speech. Verses are train, dev or test; of the voices in dev and test, about half
are heard in training.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from examples.common import bible
from examples.common.files import write_json

RATE = 16_000
#: Without those that have breath in them (f2, f3, f5, Alicia), which sound different in each process.
VOICES = (
    "en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en+f1", "en-us+steph", "en-gb-x-rp+belinda", "en-us-nyc", "en+m1",
    "en-us+m3", "en-gb-scotland+m7", "en-us+klatt2",
)  # fmt: skip
NEW_VOICES = ("en-029", "en-gb-x-gbclan", "en+f4", "en-us+m4", "en+Annie", "en-us+Alex")


@dataclass(frozen=True)
class Recipe:
    """What the corpus is to be.

    Attributes:
        train: phrases to train on; one lasts about 3 seconds.
        dev: phrases to choose by.
        test: phrases to report on.
        shortest: characters of the shortest phrase.
        longest: characters of the longest.
        noise: signal-to-noise ratio, from and to, in dB.
        reverberation: seconds until the room's echo has fallen by 60 dB, from and to.
        seed: gives everything that is random.
    """

    train: int = 1800
    dev: int = 400
    test: int = 800
    shortest: int = 16
    longest: int = 60
    noise: tuple[float, float] = (5.0, 25.0)
    reverberation: tuple[float, float] = (0.1, 0.5)
    seed: int = 0


class Espeak:
    """The espeak-ng library that the package `espeakng-loader` carries.

    One for each process: it is not thread-safe, and how something sounds depends a little on all that was said before.
    """

    _RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
    _SYNCHRONOUS, _UTF8 = 2, 1

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise SystemExit(
                'The speech is made by espeak-ng: pip install "keras_blocksparse[examples]", or pip install'
                " espeakng-loader. Your own speech needs neither: --data manifest:FILE or librispeech:DIR"
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        path = Path(espeakng_loader.get_data_path())
        self._variants = path / "voices" / "!v"
        self.rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, str(path).encode(), 0)
        if self.rate <= 0:
            raise SystemExit(f"espeak-ng does not start with its data in {path} (error {self.rate}).")
        self._heard: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._hear)  # kept: C holds no reference to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int = 175, pitch: int = 50, liveliness: int = 50) -> np.ndarray:
        """Speaks a text.

        Args:
            text: what to say.
            voice: such as "en-us+f3".
            speed: words in a minute, 80 to 450.
            pitch: 0 to 100.
            liveliness: range of the pitch, 0 to 100.

        Returns:
            `float32[samples]` at `self.rate`, in [-1, 1].

        Raises:
            ValueError: espeak-ng has no such voice, or says nothing.
        """
        _, _, variant = voice.partition("+")
        # The library speaks without a variant that it does not know.
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((self._RATE, speed), (self._PITCH, pitch), (self._RANGE, liveliness)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._heard.clear()
        said = text.encode()
        self._library.espeak_Synth(said, len(said) + 1, 0, 0, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        speech = np.concatenate([np.zeros(0, np.short), *self._heard])
        if not speech.any():
            raise ValueError(f"espeak-ng said nothing. Received: {text!r}")
        return speech.astype(np.float32) / 32768


def in_a_room(speech: np.ndarray, echo: float, rate: int, random: np.random.Generator) -> np.ndarray:
    """Speech with the decaying noise of a room's echo, `echo` seconds for 60 dB; as long as before."""
    times = np.arange(int(echo * rate)) / rate
    response = random.normal(size=len(times)) * np.exp(-np.log(1000) * times / echo)
    response *= random.uniform(0.3, 1.0) / np.sqrt((response**2).sum())
    response[0] = 1.0
    size = 1 << (len(speech) + len(response) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)[: len(speech)]


def with_noise(speech: np.ndarray, decibels: float, colour: float, random: np.random.Generator) -> np.ndarray:
    """Speech with noise whose spectrum falls as 1 / frequency ** colour, `decibels` below the speech."""
    spectrum = np.fft.rfft(random.normal(size=len(speech)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (colour / 2)
    noise = np.fft.irfft(spectrum, len(speech))
    return speech + noise * (np.std(speech) / np.std(noise) * 10 ** (-decibels / 20))


def phrases(verses: list[bible.Verse], shortest: int, longest: int) -> list[str]:
    """What is read in one breath: verses cut at their marks, joined as long as they stay short."""
    found = []
    for verse in verses:
        phrase = ""
        for piece in re.split(r"(?<=[,;:.?!])\s+", verse.text):
            if phrase and len(phrase) + 1 + len(piece) > longest:
                found.append(phrase)
                phrase = ""
            phrase = f"{phrase} {piece}".strip()
        found.append(phrase)
    return [phrase for phrase in found if shortest <= len(phrase) <= longest]


def make(recipe: Recipe, cache: Path, console: Console) -> Path:
    """The corpus's manifest: from `cache` if the corpus is there and unchanged, else made into it.

    Raises:
        SystemExit: the corpus in `cache` has another checksum than when it was made.
    """
    import soundfile

    name = hashlib.sha256(json.dumps([asdict(recipe), VOICES, NEW_VOICES]).encode()).hexdigest()[:12]
    folder = cache / f"kjv-speech-{name}"
    if folder.exists():
        if checksum(folder) != json.loads((folder / "corpus.json").read_text())["sha256"]:
            raise SystemExit(f"The speech in {folder} is not what was made. Delete the folder and run again.")
        return folder / "manifest.jsonl"
    temporary = cache / f".{os.getpid()}.{folder.name}"
    total = recipe.train + recipe.dev + recipe.test
    lines = []
    for path, text, split, voice, audio in track(
        _utterances(recipe, cache), "Speaking verses", total=total, console=console, disable=not console.is_terminal
    ):
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(temporary / path, audio, RATE)
        lines.append(
            {"audio_filepath": path, "text": text, "duration": len(audio) / RATE, "split": split, "voice": voice}
        )
    (temporary / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(temporary / "corpus.json", {"recipe": asdict(recipe), "sha256": checksum(temporary)})
    try:
        temporary.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(temporary)
    return folder / "manifest.jsonl"


def checksum(folder: Path) -> str:
    """sha256 over the manifest and the audio files, in the manifest's order."""
    manifest = (folder / "manifest.jsonl").read_bytes()
    digest = hashlib.sha256(manifest)
    for line in manifest.splitlines():
        try:
            digest.update((folder / json.loads(line)["audio_filepath"]).read_bytes())
        except FileNotFoundError:
            digest.update(b"missing")
    return digest.hexdigest()


def _utterances(recipe: Recipe, cache: Path) -> Iterator[tuple[str, str, str, str, np.ndarray]]:
    """File name, text, split, voice and 16 kHz audio of every utterance."""
    import soxr

    verses = bible.load(cache)
    parts = bible.split(len(verses), {"dev": 0.1, "test": 0.1}, recipe.seed)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as fresh:  # so that it is the same speech each time
        for split, count in (("train", recipe.train), ("dev", recipe.dev), ("test", recipe.test)):
            said = phrases([verses[n] for n in parts[split]], recipe.shortest, recipe.longest)
            random = np.random.default_rng([recipe.seed, len(split)])
            if count > len(said):
                raise SystemExit(f"There are {len(said):,} phrases for {split}. Received: {count:,}")
            for number, chosen in enumerate(random.choice(len(said), count, replace=False)):
                new = split != "train" and random.random() < 0.5
                voice = str(random.choice(NEW_VOICES if new else VOICES))
                speed, pitch, liveliness = (int(random.integers(*span)) for span in ((100, 176), (25, 76), (20, 81)))
                rate, speech = fresh.submit(_say, said[chosen], voice, speed, pitch, liveliness).result()
                speech = in_a_room(speech, random.uniform(*recipe.reverberation), rate, random)
                speech = with_noise(speech, random.uniform(*recipe.noise), random.uniform(0, 2), random)
                speech = soxr.resample(speech, rate, RATE)
                speech *= random.uniform(0.1, 0.9) / np.abs(speech).max()
                yield f"{split}/{number:05}.flac", said[chosen], split, voice, speech.astype(np.float32)


@functools.cache
def _espeak() -> Espeak:
    return Espeak()


def _say(*what: Any) -> tuple[int, np.ndarray]:
    return _espeak().rate, _espeak().say(*what)
