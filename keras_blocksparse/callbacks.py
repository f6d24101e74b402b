"""Keras callbacks that drive pruning inside fit(), and record it."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from keras_blocksparse.pruning import Pruner, waiting_constraints
from keras_blocksparse.variables import to_numpy


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
        self._warned = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds what to prune, before the training step is compiled."""
        self._batches, self._warned = 0, False
        self.pruner = None
        if self.model.built:
            self.pruner = Pruner(self.model)
            self._renew_compiled_step()
        else:
            self._take_over_after_first_step()
            for constraint in waiting_constraints(self.model):
                constraint.driven = True  # by this callback, from the first step on

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
        first_step, start = self.model.train_function, int(to_numpy(self.model.optimizer.iterations))

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
        epochs = self.params.get("epochs", 1) - (getattr(self.model, "_initial_epoch", None) or 0)
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
