"""Training that shows how far it is, can be killed and goes on, and writes down what happened."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import keras_blocksparse as kbs
from examples.common.files import write_json
from examples.common.native import NativeLoop, native_loop, stay_on_native_loop
from examples.common.settings import Settings
from examples.common.student import Student, Teacher
from keras_blocksparse.variables import updates_of


@dataclass
class Course:
    """What happened, epoch by epoch.

    Attributes:
        losses: mean training loss, with the group lasso's.
        zeros: share of zeros in the layers that are or could be pruned.
        seconds: wall time, over all parts of a training that was resumed.
        cpu_seconds: processor time of the process.
    """

    losses: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def optimizer(settings: Settings, steps: int) -> keras.optimizers.Optimizer:
    """AdamW, clipped by norm; the learning rate rises for 5 % of the steps and falls to 0 by a cosine."""
    warmup = max(1, steps // 20)
    rates = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate / 10, max(1, steps - warmup), warmup_target=settings.learning_rate, warmup_steps=warmup
    )
    return keras.optimizers.AdamW(rates, weight_decay=settings.weight_decay, clipnorm=1.0)


def fit(
    model: Student,
    loss: keras.losses.Loss,
    data: Callable[[int], Any],
    steps_per_epoch: int,
    filters: str,
    settings: Settings,
    folder: Path,
    console: Console,
) -> Course:
    """Trains a model, from where an earlier call with the same settings was stopped, and strips it.

    Call `forget` when all that is made of the model is written: until then, nothing has to be trained again.

    Args:
        model: built.
        loss: to train by.
        data: gives what `model.fit` takes, for a training that begins with the epoch given (counted from 0).
        steps_per_epoch: updates in an epoch.
        filters: regex of the layers to prune.
        settings: what the training is asked to be. A state that was left by others is refused.
        folder: where the state of an unfinished training is kept.
        console: where progress is shown.

    Raises:
        SystemExit: `folder` holds the state of a training with other settings, or a file to begin with is of another
            network; or the loss became NaN or infinite.
    """
    epochs, compression, label = settings.epochs, settings.compression, settings.label
    model.compile(optimizer(settings, epochs * max(1, steps_per_epoch)), loss)
    layers = pruned_layers(model, filters)
    if settings.start_from is not None:
        _start_from(model, settings.start_from)
    if compression is not None:
        compression.prune(model, filters, epochs, steps_per_epoch)
    state = _State(folder / "unfinished", dataclasses.asdict(settings))
    course = state.restore(model)
    if first := len(course.losses):
        console.print(f"{label}: going on after epoch {first}")
    callbacks: list[keras.callbacks.Callback] = [
        _StopAtNaN(),
        _Notes(course, pruned_layers(model, filters), state),
        _Bar(console, label, epochs, first, steps_per_epoch),
    ]
    if compression is not None:
        callbacks.insert(0, kbs.UpdatePruningStep())
    with native_loop(layers if settings.native_loop else []) as loops:
        if loops and compression is not None:
            callbacks.append(_LeaveOutZeros(loops))
        model.fit(
            data(first), initial_epoch=first, epochs=epochs, steps_per_epoch=steps_per_epoch, shuffle=False, verbose=0,
            callbacks=callbacks,
        )  # fmt: skip
    if compression is not None:
        if compression.schedule == "cut":
            kbs.Pruner(model).prune_now(compression.sparsity)
        kbs.strip_pruning(model)
    return course


def teacher_of(model: Student, filters: str, settings: Settings, passes: int) -> Teacher | None:
    """The trained networks to learn from, if `settings` name any; `model` then expects their logits as targets, too.

    Args:
        model: built.
        filters: regex of the layers that compute on the native loop if `settings` say so.
        settings: what the training is asked to be.
        passes: how often each teacher is asked if its dropout is to be on.

    Raises:
        SystemExit: a teacher is of another task, or has no dropout that could be on.
    """
    if settings.teacher is None:
        return None
    models = tuple(_teacher(model, filters, path, settings) for path in settings.teacher)
    model.share = settings.teacher_share
    return Teacher(models, passes if settings.teacher_dropout else 0)


def _teacher(model: Student, filters: str, path: str, settings: Settings) -> keras.Model:
    teacher = keras.saving.load_model(path, compile=False)
    if teacher.output_shape != model.output_shape or teacher.input_shape != model.input_shape:
        raise SystemExit(
            f"--teacher: {path} is of another task: it maps {teacher.input_shape} to {teacher.output_shape}, expected"
            f" {model.input_shape} to {model.output_shape}."
        )
    dropout = [layer for layer in teacher.layers if isinstance(layer, keras.layers.Dropout) and layer.rate]
    if settings.teacher_dropout and not dropout:
        raise SystemExit(f"--teacher-dropout: {path} was trained without dropout.")
    if any(row.becomes for row in kbs.conversion_report(teacher).layers):
        teacher = kbs.to_block_sparse(teacher, verbose=False)  # asked for every batch: not to compute with its zeros
    elif settings.native_loop:
        stay_on_native_loop(pruned_layers(teacher, filters))
    teacher.trainable = False
    return teacher


def _start_from(model: keras.Model, path: str) -> None:
    weights = keras.saving.load_model(path, compile=False).get_weights()
    shapes, own = [w.shape for w in weights], [tuple(w.shape) for w in model.weights]
    if shapes != own:
        raise SystemExit(f"--start-from: {path} is of another network: its weights are {shapes}, expected {own}")
    model.set_weights(weights)


def forget(folder: Path) -> None:
    """Deletes the state of a training whose results are written."""
    shutil.rmtree(folder / "unfinished")


def pruned_layers(model: keras.Model, filters: str) -> list[keras.layers.Layer]:
    """The layers that `filters` picks."""
    from keras_blocksparse.prunable import find_prunable_layers

    return [found.layer for found in find_prunable_layers(model, filters)]


def weights_of(model: keras.Model, filters: str) -> dict[str, Any]:
    """Counts that a table needs, JSON-able."""
    layers = pruned_layers(model, filters)
    weights = [w for layer in layers for w in layer.trainable_weights if len(w.shape) > 1]
    zeros = sum(int(np.count_nonzero(np.asarray(w) == 0)) for w in weights)
    return {
        "parameters": model.count_params(),
        "kept_parameters": model.count_params() - zeros,
        "sparsity": kbs.sparsity(layers),
        "sparsity_by_weight": {w.path: float(np.mean(np.asarray(w) == 0)) for w in weights},
    }


def versions() -> dict[str, str]:
    """What computed."""
    import tensorflow as tf

    return {"keras_blocksparse": kbs.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}


class _State:
    """The state of an unfinished training: at any moment that of one whole epoch, whenever the process is killed."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))

    def restore(self, model: keras.Model) -> Course:
        """Gives the model what was saved last, if anything was, and the course so far."""
        try:
            saved = json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return Course()
        if missing := sorted({"settings", "course", "generators"} - saved.keys()):
            raise SystemExit(
                f"{self.folder} holds an unfinished training of another version of this program: its state has no"
                f" {', '.join(missing)}, so it cannot go on as it was. Delete the folder to begin"
                " again, or give another --output."
            )
        if saved["settings"] != self.settings:
            names = sorted({*saved["settings"], *self.settings})
            changed = [name for name in names if saved["settings"].get(name) != self.settings.get(name)]
            raise SystemExit(
                f"{self.folder} holds an unfinished training with other settings ({', '.join(changed)} differ). Give"
                " the same ones to go on, another --output, or delete the folder."
            )
        course = Course(**saved["course"])
        model.optimizer.build(model.trainable_variables)
        model.load_weights(self._weights(course))
        for generator, state in zip(_generators(model), saved["generators"], strict=True):
            generator.assign(state)
        return course

    def save(self, model: keras.Model, course: Course) -> None:
        """Saves weights, optimizer and what dropout draws next; the older ones go when it is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        older = list(self.folder.glob("*.weights.h5"))
        model.save_weights(self._weights(course))
        generators = [keras.ops.convert_to_numpy(generator).tolist() for generator in _generators(model)]
        facts = {"settings": self.settings, "course": dataclasses.asdict(course), "generators": generators}
        write_json(self.folder / "state.json", facts)
        for path in older:
            if path != self._weights(course):
                path.unlink()

    def _weights(self, course: Course) -> Path:
        return self.folder / f"{len(course.losses)}.weights.h5"


def _generators(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's random generators, which Keras leaves out of a file of weights."""
    return [variable for variable in model.non_trainable_variables if variable.name == "seed_generator_state"]


class _StopAtNaN(keras.callbacks.Callback):
    """Ends the program before what is broken is saved; older Keras has no `raise_error` of `TerminateOnNaN`."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        loss = (logs or {})["loss"]
        if not np.isfinite(loss):
            raise SystemExit(
                f"The loss became {loss} in update {batch + 1} of this epoch: nothing more can be learned. Try a lower"
                " --learning-rate; an unfinished training goes on from the epoch before."
            )


class _Notes(keras.callbacks.Callback):
    """Notes the course, and saves it with the weights after every epoch."""

    def __init__(self, course: Course, layers: list[keras.layers.Layer], state: _State) -> None:
        super().__init__()
        self.course, self.layers, self.state = course, layers, state
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        self.course.losses.append(float((logs or {})["loss"]))
        self.course.zeros.append(kbs.sparsity(self.layers))
        wall, cpu = time.perf_counter(), time.process_time()
        self.course.seconds += wall - self._wall
        self.course.cpu_seconds += cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        self.state.save(self.model, self.course)


class _LeaveOutZeros(keras.callbacks.Callback):
    """Lets the native loop leave out what is pruned, from the first epoch in which no mask moves."""

    def __init__(self, loops: list[NativeLoop]) -> None:
        super().__init__()
        self.loops: list[NativeLoop] = loops

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        ends = [pruning.settings.end_step for loop in self.loops for pruning in loop.prunings().values()]
        if not self.loops or any(end is None or updates_of(self.model.optimizer) < end for end in ends):
            return
        for loop in self.loops:
            loop.leave_out_zeros()
        self.loops = []
        self.model.make_train_function(force=True)


class _Bar(keras.callbacks.Callback):
    """A progress bar on a terminal, a line for each epoch elsewhere."""

    def __init__(self, console: Console, label: str, epochs: int, first: int, steps: int) -> None:
        super().__init__()
        self.console, self.label, self.epochs, self.first, self.steps = console, label, epochs, first, steps
        self.progress: Progress | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.progress.start()
            self.task = self.progress.add_task(
                self.label, total=self.epochs * self.steps, completed=self.first * self.steps, facts=""
            )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        if self.progress is not None:
            self.progress.update(self.task, advance=1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        facts = f"epoch {epoch + 1}/{self.epochs}, loss {(logs or {})['loss']:.4f}"
        if self.progress is not None:
            self.progress.update(self.task, facts=facts)
        else:
            self.console.print(f"{self.label}: {facts}", soft_wrap=True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this."""
        if self.progress is not None:
            self.progress.stop()
