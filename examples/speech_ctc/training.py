"""One training from beginning to end: corpus, features, network, fit, score, files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from examples.common import fitting
from examples.common.files import replace, write_json
from examples.speech_ctc import corpora, network, pipeline, synthesis
from examples.speech_ctc.features import extract


@dataclass(frozen=True, kw_only=True)
class Settings(fitting.Settings):
    """What a training is asked to be. See `python -m examples.speech_ctc --help`."""

    data: str
    phrases: int
    max_seconds: float
    channels: int
    augment: bool
    beam: int | None


def train(settings: Settings, output: Path, cache: Path, console: Console) -> tuple[keras.Model, dict[str, Any]]:
    """Trains and scores a network, and writes `model.keras`, `result.json` and `texts.tsv`.

    Args:
        settings: what to do.
        output: folder to write to, and where an unfinished training is kept.
        cache: folder for data that is made or computed once.
        console: where progress is shown.

    Returns:
        The model, stripped, and what `result.json` holds.
    """
    data = settings.data
    if data == "kjv":
        few = settings.phrases < 400  # a trial: as little of the other splits
        recipe = synthesis.Recipe(train=settings.phrases, **({"dev": 40, "test": 40} if few else {}))
        data = f"manifest:{synthesis.make(recipe, cache, console)}"
    features = extract(corpora.load(data), cache, console, settings.max_seconds)
    alphabet = pipeline.alphabet_of(features)
    hours = {split: round(features.hours(split), 2) for split in corpora.SPLITS}
    count = len(features.numbers("train"))
    console.print(
        f"{hours['train']} hours in {count:,} utterances to train on, {hours['dev']} in dev,"
        f" {hours['test']} in test; {len(alphabet)} characters."
    )
    keras.utils.set_random_seed(settings.seed)
    model = network.build(
        len(alphabet), settings.cell, settings.units, settings.layers, settings.channels, settings.dropout
    )
    steps = count // settings.batch
    filters = f"{settings.cell}_"
    teacher = fitting.teacher_of(model, filters, settings, passes=4)
    lessons = None if teacher is None else pipeline.lessons(teacher, features, output / "unfinished", console)

    def batches(first_epoch: int) -> Any:
        return pipeline.training_batches(
            features, alphabet, settings.batch, settings.seed, first_epoch, settings.augment, lessons
        )

    course = fitting.fit(model, network.CTC(), batches, steps, filters, settings, output, console)
    model = model.plain()
    scores = {}
    for split in settings.scored():
        scores[split], texts = network.character_error_rate(model, features, split, alphabet, settings.beam)
    result = {
        "task": "speech_ctc",
        "settings": dataclasses.asdict(settings),
        "scores": scores,
        "unit": "character error rate",
        **fitting.weights_of(model, filters),
        "hours": hours,
        "skipped": len(features.skipped),
        "alphabet": alphabet,
        "course": dataclasses.asdict(course),
        "versions": fitting.versions(),
    }
    model.save(output / "model.keras")
    replace(output / "texts.tsv", "".join(f"{said}\t{heard}\n" for said, heard in texts).encode())
    write_json(output / "result.json", result)
    fitting.forget(output)
    for said, heard in texts[:: max(1, len(texts) // 3)][:3]:
        console.print(f"  said   {said}\n  heard  {heard}", highlight=False, markup=False)
    return model, result
