"""When weights are pruned, and how far: functions of the training step.

A schedule is any callable `step -> (should_prune, sparsity)`, which tfmot's schedules are too. The classes here add
what such a callable cannot say by itself: where it begins and ends, so that the last update always happens and a
schedule that cannot fire is noticed, and a config, so that it is saved with the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_blocksparse.variables import to_numpy

PACKAGE = "keras_blocksparse"
FOREVER = -1  # tfmot's word for "no end"


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_step(name: str, value: Any, minimum: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer number of steps. Received: {name}={value!r}")
    _require(value >= minimum, f"`{name}` must be at least {minimum}. Received: {name}={value}")


def _check_sparsity(name: str, value: Any) -> None:
    valid = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 <= value < 1
    _require(valid, f"`{name}` must be in [0, 1). Received: {name}={value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """Base of all schedules: updates at `begin_step`, every `frequency` steps after it, and at `end_step`.

    A subclass implements `target(step)`. Decorate it with `keras.saving.register_keras_serializable()` to have it saved
    with the model.

    Example:

    ```python
    @keras.saving.register_keras_serializable()
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Linear(kbs.PruningSchedule):
        final_sparsity: float = 0.9

        def target(self, step):
            return self.final_sparsity * (step - self.begin_step) / (self.end_step - self.begin_step)
    ```

    Args:
        begin_step: first step (`optimizer.iterations`) at which weights are pruned.
        end_step: step of the last update; -1 for no end.
        frequency: steps between updates.

    Raises:
        ValueError: a number is out of range, or `end_step` lies before `begin_step`.
        TypeError: a step is not an integer.
    """

    begin_step: int = 0
    end_step: int = FOREVER
    frequency: int = 100

    def __post_init__(self) -> None:
        _check_step("begin_step", self.begin_step)
        _check_step("end_step", self.end_step, minimum=FOREVER)
        _check_step("frequency", self.frequency, minimum=1)
        _require(
            self.end_step == FOREVER or self.end_step >= self.begin_step,
            "`end_step` must not lie before `begin_step`. "
            f"Received: begin_step={self.begin_step}, end_step={self.end_step}",
        )

    def should_prune(self, step: int) -> bool:
        """Whether masks are updated at `step`."""
        if step < self.begin_step or (self.end_step != FOREVER and step > self.end_step):
            return False
        # The end is forced: off the frequency grid it would never be applied.
        return (step - self.begin_step) % self.frequency == 0 or step == self.end_step

    def target(self, step: int) -> Any:
        """The sparsity to reach at `step`, `begin_step <= step <= end_step`."""
        raise NotImplementedError(f"{type(self).__name__} must implement target(step)")

    def __call__(self, step: int) -> tuple[bool, Any]:
        """Whether to prune at `step`, and to what. Steps outside the schedule give its nearest end's target."""
        step = int(step)
        inside = max(step, self.begin_step)
        if self.end_step != FOREVER:
            inside = min(inside, self.end_step)
        return self.should_prune(step), self.target(inside)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PruningSchedule:
        """The schedule that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantSparsity(PruningSchedule):
    """The same sparsity from `begin_step` on, as tfmot's `ConstantSparsity`.

    Example:

    >>> kbs.ConstantSparsity(target_sparsity=0.5, begin_step=1000)(1000)
    (True, 0.5)

    Args:
        target_sparsity: share of zero elements, in [0, 1).
        begin_step: first step at which weights are pruned.
        end_step: step of the last update; -1 for no end.
        frequency: steps between updates.
    """

    target_sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sparsity("target_sparsity", self.target_sparsity)

    @property
    def final_sparsity(self) -> float:
        """Sparsity at the end."""
        return self.target_sparsity

    def target(self, step: int) -> float:
        """See `PruningSchedule.target`."""
        return float(self.target_sparsity)


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolynomialDecay(PruningSchedule):
    """Sparsity that rises fast at first and slowly at the end: Zhu & Gupta 2017, eq. 1; tfmot's `PolynomialDecay`.

    `s(t) = s_final + (s_initial - s_final) * (1 - (t - begin) / (end - begin)) ** power`

    Example:

    >>> ramp = kbs.PolynomialDecay(initial_sparsity=0.0, final_sparsity=0.9, begin_step=500, end_step=4000)
    >>> ramp(4000)
    (True, 0.9)

    Args:
        initial_sparsity: sparsity at `begin_step`, in [0, 1).
        final_sparsity: sparsity at `end_step`, in [0, 1).
        begin_step: first step at which weights are pruned.
        end_step: step of the last update, `>= begin_step`; equal means one shot.
        power: exponent of the decay, > 0.
        frequency: steps between updates.
    """

    initial_sparsity: float = 0.0
    final_sparsity: float = 0.9
    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sparsity("initial_sparsity", self.initial_sparsity)
        _check_sparsity("final_sparsity", self.final_sparsity)
        _require(self.end_step != FOREVER, "`end_step` must be given: a decay needs an end. Received: end_step=-1")
        valid = isinstance(self.power, (int, float)) and math.isfinite(self.power) and self.power > 0
        _require(valid, f"`power` must be a positive number. Received: power={self.power!r}")

    @classmethod
    def from_epochs(
        cls, final_sparsity: float = 0.9, *, epochs: int, steps_per_epoch: int, **kwargs: Any
    ) -> PolynomialDecay:
        """An early ramp: from 1 % to 20 % of `epochs`, in about 100 updates; the rest trains what is kept.

        Where to end was chosen on the dev set of the characters in docs/results.

        Example:

        >>> kbs.PolynomialDecay.from_epochs(0.9, epochs=40, steps_per_epoch=250).end_step
        2000

        Args:
            final_sparsity: as for the class.
            epochs: epochs of the whole training.
            steps_per_epoch: optimizer updates in an epoch.
            **kwargs: any other argument of the class, overriding these.
        """
        _check_step("epochs", epochs, minimum=1)
        _check_step("steps_per_epoch", steps_per_epoch, minimum=1)
        total = epochs * steps_per_epoch
        begin, end = total // 100, total // 5
        steps = {"begin_step": begin, "end_step": end, "frequency": max(1, (end - begin) // 100)}
        return cls(final_sparsity=final_sparsity, **{**steps, **kwargs})

    def target(self, step: int) -> float:
        """See `PruningSchedule.target`."""
        length = self.end_step - self.begin_step
        left = 1 - (step - self.begin_step) / length if length else 0.0
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left**self.power


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRamp(PruningSchedule):
    """The paper's own schedule: a threshold that rises in two slopes, the same for all layers of a type.

    Blocks whose score lies below the threshold are zeroed. With itr the step and f the frequency (Algorithm 1),

        eps = theta * (itr - begin + 1) / f                                         itr < ramp
        eps = (theta * (ramp - begin + 1) + phi * (itr - ramp + 1)) / f             ramp <= itr <= end

    and by Eq. 1 with `phi = slope_ratio * theta`, theta is chosen so that the threshold of single weights ends near q:
    `theta = 2 q f / (2 (ramp - begin) + 3 (end - ramp))` for the usual ratio 1.5. By Eq. 2 it is larger for blocks:
    `theta_block = theta * N ** block_exponent`, N the elements of a block.

    Eq. 2 is empirical: on layers whose weights do not adapt it can zero everything. A gate is therefore never taken
    beyond `max_sparsity`; its largest blocks stay, and a warning is given.

    Example:

    ```python
    ramp = kbs.ThresholdRamp.from_dense(dense_model, sparsity=0.9, steps_per_epoch=len(data), epochs=20)
    ```

    Args:
        q: the magnitude below which the asked share of a trained dense model's weights lies (its 90th percentile for
            90 %), > 0; or one for each layer kind, such as `{"recurrent": 0.12, "dense": 0.08}`. See `from_dense`.
        begin_step: the paper takes the start of the second epoch.
        ramp_step: where the second slope begins; the paper takes 20 % of all steps.
        end_step: step of the last update; the paper takes 40 % of all steps.
        frequency: steps between updates.
        slope_ratio: phi / theta; the paper used 1.2 to 1.7.
        block_exponent: exponent of Eq. 2; 0 gives every block size the same threshold.
        max_sparsity: cap for the sparsity of each gate, in [0, 1).
    """

    q: float | Mapping[str, float] = 0.1
    ramp_step: int = 0
    slope_ratio: float = 1.5
    block_exponent: float = 0.25
    max_sparsity: float = 0.97

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.end_step != FOREVER, "`end_step` must be given: a ramp needs an end. Received: end_step=-1")
        _check_step("ramp_step", self.ramp_step)
        _require(
            self.begin_step <= self.ramp_step <= self.end_step and self.begin_step < self.end_step,
            "A threshold ramp needs begin_step <= ramp_step <= end_step and begin_step < end_step. Received: "
            f"begin_step={self.begin_step}, ramp_step={self.ramp_step}, end_step={self.end_step}",
        )
        values = self.q.values() if isinstance(self.q, Mapping) else [self.q]
        valid = all(isinstance(q, (int, float, np.number)) and math.isfinite(q) and q > 0 for q in values) and values
        _require(bool(valid), f"`q` must be a positive number, or one for each layer kind. Received: q={self.q!r}")
        _require(self.slope_ratio > 0, f"`slope_ratio` must be positive. Received: slope_ratio={self.slope_ratio}")
        _require(self.block_exponent >= 0, f"`block_exponent` must be >= 0. Received: {self.block_exponent}")
        _check_sparsity("max_sparsity", self.max_sparsity)

    @classmethod
    def from_epochs(
        cls, q: float | Mapping[str, float], *, epochs: int, steps_per_epoch: int, **kwargs: Any
    ) -> ThresholdRamp:
        """The paper's heuristics: begin with the second epoch, second slope at 20 %, end at 40 % of `epochs`.

        Args:
            q: as for the class.
            epochs: epochs of the whole training.
            steps_per_epoch: optimizer updates in an epoch.
            **kwargs: any other argument of the class, overriding the heuristics.
        """
        _check_step("epochs", epochs, minimum=1)
        _check_step("steps_per_epoch", steps_per_epoch, minimum=1)
        total = epochs * steps_per_epoch
        begin = min(steps_per_epoch, total // 10)
        steps = {"begin_step": begin, "ramp_step": max(begin, total // 5), "end_step": max(begin + 1, 2 * total // 5)}
        return cls(q=q, **{**steps, **kwargs})

    @classmethod
    def from_dense(
        cls, model: Any, *, sparsity: float = 0.9, epochs: int | None = None, steps_per_epoch: int | None = None,
        filters: Any = None, **kwargs: Any,
    ) -> ThresholdRamp:  # fmt: skip
        """A ramp whose `q` is read off a trained dense model: the `sparsity` quantile of |w|, for each layer kind.

        Args:
            model: built Keras model, trained without pruning.
            sparsity: share of weights below q, in (0, 1).
            epochs: with `steps_per_epoch`, sets the steps by the paper's heuristics; else give the steps themselves.
            steps_per_epoch: optimizer updates in an epoch.
            filters: which layers to read, as in `prune_low_magnitude_block`.
            **kwargs: any other argument of the class.

        Raises:
            ValueError: the model is not built, has nothing prunable, or only one of `epochs` and `steps_per_epoch` is
                given.
        """
        from keras_blocksparse.prunable import find_prunable_layers  # stands above schedules

        _require(0 < sparsity < 1, f"`sparsity` must be in (0, 1). Received: sparsity={sparsity!r}")
        magnitudes: dict[str, list[np.ndarray]] = {}
        for layer in find_prunable_layers(model, filters):
            for spec, variable in layer.built_weights():
                if not layer.picks(spec):
                    continue
                magnitudes.setdefault(spec.kind, []).append(np.abs(to_numpy(variable)).ravel())
        _require(bool(magnitudes), "The model has no built prunable layer to read `q` from; build and train it first")
        q = {kind: float(np.quantile(np.concatenate(parts), sparsity)) for kind, parts in magnitudes.items()}
        if epochs is None and steps_per_epoch is None:
            return cls(q=q, **kwargs)
        if epochs is None or steps_per_epoch is None:
            raise ValueError(f"Give both or neither. Received: epochs={epochs}, steps_per_epoch={steps_per_epoch}")
        return cls.from_epochs(q, epochs=epochs, steps_per_epoch=steps_per_epoch, **kwargs)

    def target(self, step: int) -> float | dict[str, float]:
        """The threshold of single weights at `step` (of each kind, if `q` is one for each kind)."""
        rise = self._rise(step)
        return {kind: q * rise for kind, q in self.q.items()} if isinstance(self.q, Mapping) else self.q * rise

    def threshold(self, step: int, kind: str, block_elements: int) -> float:
        """The threshold at `step` for blocks of `block_elements` elements in a layer of `kind` (Eq. 2).

        Raises:
            ValueError: `q` names layer kinds, but not this one.
        """
        targets = self(step)[1]
        if isinstance(targets, Mapping):
            if kind not in targets:
                raise ValueError(f"`q` has no entry for layers of kind {kind!r}. Received: q={self.q!r}")
            targets = targets[kind]
        return targets * block_elements**self.block_exponent

    def _rise(self, step: int) -> float:
        first, second = self.ramp_step - self.begin_step, self.end_step - self.ramp_step
        theta = 1 / (first + self.slope_ratio * second)  # Eq. 1 with q = frequency = 1: both cancel in eps
        if step < self.ramp_step:
            return theta * (step - self.begin_step + 1)
        return theta * (first + 1) + self.slope_ratio * theta * (step - self.ramp_step + 1)
