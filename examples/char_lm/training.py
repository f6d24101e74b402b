"""One training from beginning to end: data, network, fit, score, files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from examples.char_lm import data, network
from examples.common import fitting
from examples.common.files import write_json


@dataclass(frozen=True, kw_only=True)
class Settings(fitting.Settings):
    """What a training is asked to be. See `python -m examples.char_lm --help`."""

    text: str | None
    characters: int | None
    embedding: int
    length: int


def train(settings: Settings, output: Path, cache: Path, console: Console) -> tuple[keras.Model, dict[str, Any]]:
    """Trains and scores a network, and writes `model.keras` and `result.json`.

    Args:
        settings: what to do.
        output: folder to write to, and where an unfinished training is kept.
        cache: folder for downloaded data.
        console: where progress is shown.

    Returns:
        The model, stripped, and what `result.json` holds.
    """
    corpus = data.load(Path(settings.text) if settings.text else None, settings.characters, cache)
    console.print(
        f"{len(corpus.train):,} characters to train on, {len(corpus.dev):,} in dev, {len(corpus.test):,} in test;"
        f" {len(corpus.alphabet)} different ones."
    )
    keras.utils.set_random_seed(settings.seed)
    model = network.build(
        len(corpus.alphabet), settings.cell, settings.units, settings.layers, settings.embedding, settings.dropout
    )
    steps = data.windows_in(corpus.train, settings.length) // settings.batch

    teacher = fitting.teacher_of(model, settings.cell, settings, passes=1)  # others in every epoch

    def batches(first_epoch: int) -> Any:
        found = data.training_batches(corpus.train, settings.batch, settings.length, settings.seed, first_epoch)
        return found if teacher is None else found.map(lambda x, y: (x, (y, teacher(x))))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    course = fitting.fit(model, loss, batches, steps, settings.cell, settings, output, console)
    model = model.plain()
    texts = {"dev": corpus.dev, "test": corpus.test}
    result = {
        "task": "char_lm",
        "settings": dataclasses.asdict(settings),
        "scores": {split: network.bits_per_character(model, texts[split]) for split in settings.scored()},
        "unit": "bits per character",
        **fitting.weights_of(model, settings.cell),
        "course": dataclasses.asdict(course),
        "versions": fitting.versions(),
    }
    model.save(output / "model.keras")
    write_json(output / "result.json", result)
    fitting.forget(output)
    return model, result
