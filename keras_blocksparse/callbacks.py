"""Keras callbacks that drive pruning inside fit(), and record it."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import keras

from keras_blocksparse.constraints import pruning_of
from keras_blocksparse.plots import mask_image
from keras_blocksparse.prunable import PrunableWeight
from keras_blocksparse.pruning import Pruner, constraints_of, pruned_or_prunable_weights
from keras_blocksparse.regularizers import DrivenGroupLasso, GroupLassoRegularizer
from keras_blocksparse.report import measure
from keras_blocksparse.schedules import ThresholdRamp
from keras_blocksparse.variables import updates_of


class UpdatePruningStep(keras.callbacks.Callback):
    """Moves the masks of a model under pruning while `fit()` trains it.

    The masks for a step are moved just before the batch that leads to it, so that other callbacks, wherever they stand
    in the list, see weights that are sparse as of that step. The step is `optimizer.iterations`, which Keras saves and
    restores: an interrupted training goes on where it was. The sparsity is added to the epoch's logs as "sparsity".

    Warns when the schedule cannot fire, or cannot end, in the training that `fit()` was asked for.

    Example:

    >>> model.fit(x, y, epochs=20, callbacks=[kbs.UpdatePruningStep()])

    Raises:
        ValueError: at the start of training, if nothing in the model is under pruning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pruner: Pruner | None = None
        self._batches = 0
        self._first_epoch: int | None = None
        self._warned = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds what to prune, before the training step is compiled."""
        self._batches, self._warned, self._first_epoch = 0, False, None
        self.pruner = None
        if self.model.built:
            self.pruner = Pruner(self.model)
            self._renew_compiled_step()
        else:
            self._take_over_after_first_step()
            for constraint in constraints_of(self.model):
                constraint.driven = True  # by this callback, from the first step on

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Learns with which epoch `fit()` begins, by its argument or by a backup."""
        if self._first_epoch is None:
            self._first_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Moves the masks for the step that this batch leads to."""
        if self.pruner is None:
            return
        if self._batches == 0:
            # Only now: a callback later in the list may have restored a backup.
            self.pruner.resume()
            self._check_schedules(self.pruner.iterations)
        elif self._batches == 1:
            self.pruner.refresh()
            self._renew_compiled_step()
        self._batches += 1
        batches = getattr(self.model, "steps_per_execution", 1)
        if self.params.get("steps"):
            batches = min(batches, self.params["steps"] - batch)  # the last execution of an epoch may be shorter
        self.pruner.advance(self.pruner.iterations + batches)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the sparsity to the logs."""
        if self.pruner is not None and logs is not None:
            logs["sparsity"] = self.pruner.masked_sparsity()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Masks what was written to the weights at the very end, and says if the schedule did not get to its end."""
        if self.pruner is None:
            return
        self.pruner.apply_masks()
        done = self.pruner.iterations
        for settings in self.pruner.settings:
            end = settings.end_step
            if end is not None and done < end and not self._warned:
                warnings.warn(
                    f"Training stopped at step {done}, before the pruning schedule's end_step={end}: the weights are "
                    f"{self.pruner.sparsity():.1%} zero",
                    stacklevel=2,
                )

    def _take_over_after_first_step(self) -> None:
        """Keras builds such a model in its first step; after it, callbacks earlier in the list must see zeros too."""
        first_step, start = self.model.train_function, updates_of(self.model.optimizer)

        def step_and_take_over(iterator: Any) -> Any:
            logs = first_step(iterator)
            self.model.train_function = first_step
            self.pruner = Pruner(self.model)
            self._renew_compiled_step()
            self._check_schedules(start)
            self.pruner.resume(start)
            self.pruner.advance(self.pruner.iterations)
            self._batches = 2
            return logs

        self.model.train_function = step_and_take_over

    def _renew_compiled_step(self) -> None:
        assert self.pruner is not None
        if self.pruner.needs_new_step:
            self.pruner.needs_new_step = False
            self.model.make_train_function(force=True)

    def _check_schedules(self, done: int) -> None:
        """Warns if the training that was asked for, after `done` steps, does not cover the schedule."""
        assert self.pruner is not None
        steps = self.params.get("steps")
        epochs = self.params.get("epochs", 1) - (self._first_epoch or 0)
        for settings in self.pruner.settings:
            begin, end = getattr(settings.schedule, "begin_step", 0), settings.end_step
            if settings.schedule is None:
                continue
            if end is not None and done > end:
                if self.pruner.masked_sparsity() == 0:
                    self._warn(
                        f"never fires: its end_step={end} lies before this training, which starts at step {done}"
                    )
                continue
            if not steps:
                continue
            accumulation = getattr(self.pruner.optimizer, "gradient_accumulation_steps", None) or 1
            last = done + epochs * steps // accumulation
            training = f"this training, {epochs} epochs of {steps} batches, ends at step {last}"
            if accumulation > 1:
                training += f" (one step for {accumulation} batches)"
            if begin > last:
                self._warn(f"never fires: begin_step={begin}, but {training}")
            elif end is not None and end > last:
                self._warn(f"does not get to its end: end_step={end}, but {training}")

    def _warn(self, problem: str) -> None:
        self._warned = True
        warnings.warn(f"The pruning schedule {problem}", stacklevel=2)


class PruningSummaries(keras.callbacks.Callback):
    """Writes how pruning goes to TensorBoard: sparsities, thresholds, lambdas and pictures of the masks.

    For each weight under pruning it writes `sparsity/<weight>/<gate>`, and `sparsity/total`; `threshold/<weight>` under
    a `ThresholdRamp`; `lambda/<weight>` with group lasso; and `masks/<weight>`, where zero blocks are white and gates
    lie side by side. The steps are those of the schedule, `optimizer.iterations`. All of it is read off the model, so
    the callback stands anywhere in the list, and works beside a `Pruner` of your own too.

    Needs tensorboard: `pip install "keras_blocksparse[tensorboard]"`.

    Example:

    >>> model.fit(x, y, callbacks=[kbs.UpdatePruningStep(), kbs.PruningSummaries("logs")])

    Args:
        log_dir: directory of the event files.
        update_freq: "epoch", or after how many steps to write.
        images: whether to write pictures of the masks.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: `log_dir` cannot be written, or `update_freq` is neither "epoch" nor a positive integer.
        TypeError: `log_dir` is not a path.
    """

    def __init__(self, log_dir: str | os.PathLike[str], update_freq: str | int = "epoch", images: bool = True) -> None:
        super().__init__()
        try:
            import tensorboard.summary  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'PruningSummaries needs tensorboard: pip install "keras_blocksparse[tensorboard]"'
            ) from error
        if not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be a str or os.PathLike. Received: log_dir={log_dir!r}")
        number = isinstance(update_freq, int) and not isinstance(update_freq, bool) and update_freq > 0
        if update_freq != "epoch" and not number:
            raise ValueError(
                f'`update_freq` must be "epoch" or a positive integer. Received: update_freq={update_freq!r}'
            )
        try:
            os.makedirs(log_dir, exist_ok=True)
        except OSError as error:
            raise ValueError(f"`log_dir` cannot be made: {error.strerror}. Received: log_dir={log_dir!r}") from error
        self.log_dir = os.fspath(log_dir)
        self.update_freq = update_freq
        self.images = images
        self._writer: Any = None
        self._seen = 0  # latest step looked at
        self._written = -1  # latest step written

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the event file."""
        import tensorflow as tf

        self._writer = tf.summary.create_file_writer(self.log_dir)
        self._seen, self._written = self._step(), -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes if a multiple of `update_freq` was reached or passed: one call may stand for several steps."""
        if isinstance(self.update_freq, int):
            step = self._step()
            if step // self.update_freq > self._seen // self.update_freq:
                self._write(step)
            self._seen = step

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes at the end of an epoch."""
        if self.update_freq == "epoch":
            self._write(self._step())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes how it ended, and closes the event file."""
        self._write(self._step())
        self._writer.close()

    def _step(self) -> int:
        return updates_of(self.model.optimizer)

    def _write(self, step: int) -> None:
        if step == self._written:
            return
        import tensorflow as tf

        self._written = step
        kept = parameters = 0
        with self._writer.as_default(step):
            for layer, spec, variable in pruned_or_prunable_weights(self.model):
                weight = measure(layer, spec, variable)
                for row in weight.rows:
                    tf.summary.scalar("/".join(filter(None, ("sparsity", weight.path, row.gate))), row.sparsity)
                    kept, parameters = kept + row.kept_parameters, parameters + row.parameters
                threshold, strength = _threshold(spec, variable, step), _lambda(variable)
                if threshold is not None:
                    tf.summary.scalar(f"threshold/{weight.path}", threshold)
                if strength is not None:
                    tf.summary.scalar(f"lambda/{weight.path}", strength)
                if self.images and weight.grid:
                    tf.summary.image(f"masks/{weight.path}", mask_image(weight)[None])
            tf.summary.scalar("sparsity/total", 1 - kept / parameters)
        self._writer.flush()


def _threshold(spec: PrunableWeight, variable: Any, step: int) -> float | None:
    """The threshold that a weight met last, by `step`; `None` without a `ThresholdRamp`, or before it begins."""
    constraint = pruning_of(variable)
    if constraint is None or not isinstance(constraint.settings.schedule, ThresholdRamp):
        return None
    settings, ramp = constraint.settings, constraint.settings.schedule
    due = settings.latest_update(ramp.begin_step - 1, min(step, ramp.end_step))
    return None if due is None else ramp.threshold(due, spec.kind, math.prod(settings.block_size))


def _lambda(variable: Any) -> float | None:
    """The strength of a weight's group lasso now; `None` if it has none."""
    regularizer = variable.regularizer
    known = isinstance(regularizer, (DrivenGroupLasso, GroupLassoRegularizer))
    return regularizer.strength if known else None
