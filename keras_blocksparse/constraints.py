"""The Keras constraint that keeps a weight block-sparse.

Keras applies `variable.constraint` inside the compiled training step, right after each update. That one hook is what
makes a weight sparse after *every* batch, in fit(), in custom loops, under jit and under distribution strategies, with
no wrapper in the model's graph. The constraint is part of its layer's config, so that pruning survives wherever Keras
copies a layer through its config, and a saved model that was not stripped goes on pruning.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blocksparse import blocks, distributions
from keras_blocksparse.schedules import PACKAGE
from keras_blocksparse.serialization import LostObject, deserialize, serialize
from keras_blocksparse.variables import creation_scope, has_value, is_variable, to_numpy, untracked_variable


@dataclasses.dataclass(frozen=True)
class PruningSettings:
    """What one call of `prune_low_magnitude_block` asked for.

    Weights that have equal settings are pruned as one group: a global ranking, for example, goes over all of them.
    """

    schedule: Any
    block_size: blocks.BlockSize = (16, 16)
    score: blocks.Score = "l2"
    distribution: distributions.Distribution = dataclasses.field(default_factory=distributions.Uniform)
    keep_diagonal: bool = False
    revival: bool = True
    neighborhood: blocks.BlockSize | None = None

    def __post_init__(self) -> None:
        schedule = self.schedule
        if isinstance(schedule, LostObject):
            warnings.warn(
                f"The pruning schedule {schedule.description} was a Python object that Keras could not save. The masks "
                "stay as they are; call prune_low_magnitude_block again to go on pruning",
                stacklevel=2,
            )
            object.__setattr__(self, "schedule", None)
        elif schedule is not None and not callable(schedule):
            raise TypeError(
                "`pruning_schedule` must be a kbs.PruningSchedule or a callable step -> (should_prune, sparsity). "
                f"Received: pruning_schedule={schedule!r}"
            )
        object.__setattr__(self, "block_size", blocks.check_block_size(self.block_size))
        object.__setattr__(self, "neighborhood", blocks.check_neighborhood(self.neighborhood, self.block_size))
        score = "l2" if isinstance(self.score, LostObject) else self.score
        object.__setattr__(self, "score", blocks.check_score(score))
        object.__setattr__(self, "distribution", distributions.get(self.distribution))
        for name in ("keep_diagonal", "revival"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")
            object.__setattr__(self, name, bool(value))

    @property
    def end_step(self) -> int | None:
        """Step of the schedule's last update, `None` if it has none or does not say."""
        end = getattr(self.schedule, "end_step", None)
        return int(end) if end is not None and int(end) >= 0 else None

    def latest_update(self, after: int, until: int) -> int | None:
        """The last step in `(after, until]` at which the schedule wants an update, `None` if there is none."""
        if self.schedule is None:
            return None
        end = self.end_step
        for step in range(until, max(after, -1), -1):
            # tfmot's schedules never fire at an end that lies off their frequency grid; here the end always counts.
            if step == end or bool(np.asarray(self.schedule(step)[0])):
                return step
        return None

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        config = {field.name: serialize(getattr(self, field.name)) for field in dataclasses.fields(self)}
        neighborhood = None if self.neighborhood is None else list(self.neighborhood)
        return {**config, "block_size": list(self.block_size), "neighborhood": neighborhood}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PruningSettings:
        """The settings that `get_config` described."""
        return cls(**{name: deserialize(value) for name, value in config.items()})


@keras.saving.register_keras_serializable(package=PACKAGE)
class BlockPruning(keras.constraints.Constraint):
    """A constraint that holds masked blocks of one weight at zero, after the user's own constraint.

    `prune_low_magnitude_block` makes these; a `Pruner` moves their masks. A constraint binds to its variable when the
    pruner first sees it, or else when the optimizer first calls it. At that moment, and at each start of a training,
    the mask is read off the weight's zero blocks: a model that was loaded or restored goes on where it was, and nothing
    but the weights themselves has to be stored.

    With `revival` the constraint also keeps what the weight would have been without the mask after the last update, and
    the next ranking is made on that: a pruned block comes back if its last update beats the smallest kept block (the
    behaviour of "Exploring Sparsity in Recurrent Neural Networks", Narang et al. 2017). Without it, what is zero stays
    zero.

    Args:
        settings: what to prune, as `PruningSettings` or their config.
        gates: equal parts of the weight beside each other in its last axis.
        row_axes: how many leading axes are inputs; all but the last if `None`.
        diagonal: whether the weight maps a state to itself, so that `keep_diagonal` applies.
        constraint: the user's own Keras constraint, applied first.
    """

    def __init__(
        self, settings: PruningSettings | dict[str, Any], gates: int = 1, row_axes: int | None = None,
        diagonal: bool = False, constraint: Any = None,
    ) -> None:  # fmt: skip
        self.settings = PruningSettings.from_config(settings) if isinstance(settings, dict) else settings
        self.gates = gates
        self.row_axes = row_axes
        self.diagonal = diagonal
        self.constraint = keras.constraints.get(constraint)

        self.variable: Any = None  # the bound weight, a keras.Variable
        self.skipped: str | None = None  # why the weight is left alone, if it is
        self.grid: blocks.BlockGrid
        self.kept: np.ndarray  # bool, grid.grid_shape: host's copy of the mask, by block
        self.averages: list[Any] = []  # moving averages of the weight, masked along with it
        self.traced = False  # whether a training step has this constraint compiled in
        self.driven = False  # whether a Pruner moves the mask
        self._mask: Any = None  # bool variable of the weight's shape
        self._unmasked: Any = None  # the weight after its last update, before the mask; None without revival

    def __call__(self, w: Any) -> Any:
        """The weight after an update, with its masked blocks at zero."""
        if self.variable is None and is_variable(w):
            self.bind(w)
        self.traced = True
        value = ops.convert_to_tensor(w)
        if self.constraint is not None:
            value = self.constraint(value)
        if self._mask is None:
            return value
        if not self.driven and self.settings.schedule is not None:
            self.driven = True  # once is enough
            warnings.warn(
                f"{self.variable.path} has a pruning schedule but nothing moves its mask. Add "
                "callbacks=[kbs.UpdatePruningStep()] to fit(), or use kbs.Pruner in a custom loop",
                stacklevel=2,
            )
        if self._unmasked is not None:
            self._unmasked.assign(value)
        for average in self.averages:
            average.assign(self._apply_mask(ops.convert_to_tensor(average)))
        return self._apply_mask(value)

    def _apply_mask(self, value: Any) -> Any:
        # A choice and not a product: a masked NaN or infinity is zero too.
        return ops.where(ops.convert_to_tensor(self._mask), value, ops.zeros((), value.dtype))

    def bind(self, variable: Any, warn: bool = True) -> None:
        """Takes over `variable` (built, a keras.Variable), with the mask its zero blocks show.

        Args:
            variable: the weight to prune.
            warn: whether to warn if it is smaller than a block; the caller does it otherwise.

        Raises:
            ValueError: the weight holds NaN or infinities.
        """
        if self.variable is variable:
            return
        self.variable, self.skipped, self._mask, self._unmasked = variable, None, None, None
        try:
            self.grid = blocks.BlockGrid(tuple(variable.shape), self.settings.block_size, self.gates, self.row_axes)
        except ValueError as error:
            self.skipped = str(error)
            if warn:
                warnings.warn(self.refusal, stacklevel=3)
            return
        import tensorflow as tf

        with tf.init_scope():  # variables cannot be made or read inside the step that is being compiled
            if has_value(variable):
                weight = checked_value(self.variable)
                self.kept = _blocks_in_use(weight, self.grid)
            else:
                # Keras builds a model without an Input inside its first compiled step, where weights get values only
                # when it runs. They will be fresh ones.
                weight, self.kept = np.zeros(self.grid.shape), np.ones(self.grid.grid_shape, bool)
            with creation_scope(variable):
                self._mask = untracked_variable(self.grid.expand(self.kept), "bool", f"{variable.name}_mask")
                if self.settings.revival:
                    self._unmasked = untracked_variable(weight, variable.dtype, f"{variable.name}_unmasked")

    @property
    def refusal(self) -> str:
        """A sentence that says which weight is left alone, and why. Only if it is `skipped`."""
        return f"{self.variable.path} is not pruned. {self.skipped}"

    def read_mask_from_weight(self) -> None:
        """Makes the mask agree with the weight's zero blocks, after the weight was loaded or set from outside."""
        weight = checked_value(self.variable)
        self._set_mask(_blocks_in_use(weight, self.grid))
        if self._unmasked is not None:
            self._unmasked.assign(weight)

    def scores(self) -> np.ndarray:
        """Block scores for the next mask, float of `grid.grid_shape`."""
        settings = self.settings
        scores = np.array(self.grid.scores(self._candidate(), settings.score, settings.neighborhood), float)
        if not settings.revival:
            scores[~self.kept] = -np.inf
        return scores

    def keep(self, kept: np.ndarray) -> None:
        """Makes `kept` (bool, `grid.grid_shape`) the mask, and the weight agree with it."""
        weight = np.where(self.grid.expand(kept), self._candidate(), 0)
        self._set_mask(kept)
        self.variable.assign(weight)
        for average in self.averages:
            average.assign(self._apply_mask(ops.convert_to_tensor(average)))

    def enforce(self) -> None:
        """Does after an update of the weight what an optimizer does, if none has done it."""
        if np.logical_and(checked_value(self.variable), ~self.grid.expand(self.kept)).any():
            traced = self.traced
            self.variable.assign(self(self.variable))
            self.traced = traced

    def apply(self) -> None:
        """Sets the masked blocks of the weight to zero."""
        self.variable.assign(self._apply_mask(ops.convert_to_tensor(self.variable)))

    def _set_mask(self, kept: np.ndarray) -> None:
        if not np.array_equal(kept, self.kept):
            self.kept = kept
            self._mask.assign(self.grid.expand(kept))

    def _candidate(self) -> np.ndarray:
        weight = checked_value(self.variable)
        if self._unmasked is None or self.kept.all():
            return weight
        return np.where(self.grid.expand(self.kept), weight, to_numpy(self._unmasked))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "settings": self.settings.get_config(),
            "gates": self.gates,
            "row_axes": self.row_axes,
            "diagonal": self.diagonal,
            "constraint": keras.constraints.serialize(self.constraint),
        }


def checked_value(variable: Any) -> np.ndarray:
    """The value of a weight that is to be ranked.

    Raises:
        ValueError: it holds NaN or infinities.
    """
    weight = to_numpy(variable)
    if not np.isfinite(weight).all():
        raise ValueError(
            f"{variable.path} holds NaN or infinity, so its blocks cannot be ranked. Training has diverged, or the "
            "weights were loaded from a broken file"
        )
    return weight


def _blocks_in_use(weight: np.ndarray, grid: blocks.BlockGrid) -> np.ndarray:
    """Blocks that are not all zero; every block if the zeros are those of an initializer (zeros, identity)."""
    used = grid.nonzero_blocks(weight)
    if not used.any():
        return np.ones_like(used)
    if not used.all():
        matrix = weight.reshape(grid.rows, -1)
        if min(matrix.shape) > 1 and np.array_equal(matrix, matrix[0, 0] * np.eye(*matrix.shape)):
            return np.ones_like(used)
    return used


def pruning_of(variable: Any) -> BlockPruning | None:
    """The pruning constraint of a variable, `None` if it has none."""
    constraint = getattr(variable, "constraint", None)
    return constraint if isinstance(constraint, BlockPruning) else None
