"""Putting pruning on a model, driving it, and taking it off again."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_blocksparse import blocks, distributions
from keras_blocksparse.constraints import BlockPruning, PruningSettings, checked_value, pruning_of
from keras_blocksparse.prunable import (
    Filters,
    PrunableLayer,
    PrunableWeight,
    find_prunable_layers,
    refuse_block_sparse,
)
from keras_blocksparse.regularizers import DrivenGroupLasso, GroupLassoRegularizer
from keras_blocksparse.schedules import ThresholdRamp
from keras_blocksparse.variables import to_numpy, updates_of


def prune_low_magnitude_block(
    to_prune: Any,
    pruning_schedule: Any = None,
    block_size: blocks.BlockSize = (16, 16),
    score: blocks.Score | None = None,
    distribution: str | distributions.Distribution = "uniform",
    group_lasso: float | GroupLassoRegularizer | None = None,
    filters: Filters = None,
    keep_diagonal: bool = False,
    revival: bool = True,
    neighborhood: blocks.BlockSize | None = None,
) -> Any:
    """Makes a layer or model prune itself to zero blocks while it trains. Works in place and returns what it was given.

    The layers stay ordinary Keras layers; each weight to prune gets a constraint (`BlockPruning`), and, with
    `group_lasso`, a regularizer beside whatever it has already. Layers that are not built yet are pruned from the
    moment they build. To move the masks, train with the `UpdatePruningStep` callback or call `Pruner.step()` in a loop
    of your own. Weights that hold zero blocks already keep them masked, so a saved model can be pruned on.

    In a model, recurrent, Dense and EinsumDense layers are pruned unless `filters` says otherwise; Embedding and
    convolutions only if a filter matches them. Biases never are. A weight smaller than one block is left alone, with a
    warning; if that leaves nothing, it is an error.

    Example:

    ```python
    model = kbs.prune_low_magnitude_block(
        model, kbs.PolynomialDecay(final_sparsity=0.9, begin_step=500, end_step=4000), block_size=(16, 16)
    )
    model.fit(x, y, callbacks=[kbs.UpdatePruningStep()])
    model = kbs.strip_pruning(model)
    ```

    Args:
        to_prune: Keras layer, model (Sequential, functional, subclassed), or a list of either. An object with
            `get_prunable_weights()`, as tfmot's PrunableLayer, is prunable too.
        pruning_schedule: a `PruningSchedule`, or any callable `step -> (should_prune, sparsity)`, such as a tfmot
            schedule. `None` with `group_lasso` trains by group lasso alone (GL); cut the small blocks with
            `Pruner.prune_now()`.
        block_size: rows (inputs) and columns (outputs) of a block of the Keras weight. `(1, 1)` prunes single weights.
        score: what makes a block matter: "l2" (root of the mean square), "mean" (mean magnitude), "max" (largest
            magnitude), or a callable that maps blocks `(n, rows, cols)` to `(n,)`. By default "max" with a
            `ThresholdRamp`, as in the paper, and else "l2", which lost less accuracy in docs/results.
        distribution: how the sparsity is spread over layers and gates: "uniform", "erk", "global", "per_layer_type", or
            a `Uniform`, `ERK` or `Global` object with densities for gates and sparsities for layers. Not used by a
            `ThresholdRamp`, which has a threshold for each layer type.
        group_lasso: lambda of the group lasso (GLP with a schedule, GL without), or a `GroupLassoRegularizer` whose
            `strength` and `off_at_end` are taken. By default lambda goes to 0 when the schedule ends.
        filters: regex, list of regexes (`re.search` on the layer's path, such as "encoder/forward_gru", or on a weight
            of it, such as "forward_gru/recurrent_kernel") or callable on the layer. What matches is pruned, as in
            Keras's `quantize()`.
        keep_diagonal: keep every block that the diagonal of a recurrent kernel passes through (after LPCNet). They
            count as kept, so the sparsity does not change.
        revival: whether a pruned block can come back until the schedule ends; see `BlockPruning`.
        neighborhood: rows and columns of larger blocks, multiples of `block_size`: a block's score is then the
            geometric mean of its own and of that of the larger one it lies in, so that small blocks are left side by
            side and not one by one. A callable `score` sees the larger blocks, too.

    Returns:
        `to_prune`.

    Raises:
        ValueError: an argument is out of range, nothing in `to_prune` can be pruned, `filters` match nothing, a block
            is larger than every weight, a weight holds NaN, or a layer is block-sparse already.
        TypeError: an argument is of the wrong type.
        RuntimeError: Keras runs on another backend than TensorFlow.
    """
    if keras.config.backend() != "tensorflow":
        # JAX would bake the masks into its compiled step, and they would never move: no silent dense training.
        raise RuntimeError(f"keras_blocksparse needs Keras's TensorFlow backend. Received: {keras.config.backend()!r}")
    if pruning_schedule is None and group_lasso is None:
        raise ValueError(
            "Nothing to do: give a `pruning_schedule` (block pruning), a `group_lasso` strength, or both. "
            "Received: pruning_schedule=None, group_lasso=None"
        )
    if isinstance(pruning_schedule, (bool, int, float)):
        raise TypeError(
            "`pruning_schedule` must be a schedule, for example kbs.ConstantSparsity(target_sparsity=0.9). "
            f"Received: pruning_schedule={pruning_schedule!r}"
        )
    if score is None:
        score = "max" if isinstance(pruning_schedule, ThresholdRamp) else "l2"
    settings = PruningSettings(
        pruning_schedule, block_size, score, distributions.get(distribution), keep_diagonal, revival, neighborhood
    )
    lasso = _lasso_template(group_lasso, settings.block_size)
    _check_overrides(settings)
    layers = _layers_to_prune(to_prune, filters)
    refuse_block_sparse(layers)
    weights, refusals = _weights_to_prune(layers)
    for _, pairs, _ in weights:
        for _, variable in pairs:
            checked_value(variable)  # before anything is changed
    constraints = [c for layer, pairs, specs in weights for c in _attach(layer, pairs, specs, settings, lasso)]
    bound = [c for c in constraints if c.variable is not None]
    if bound and len(bound) == len(constraints) and all(c.skipped for c in bound):
        reasons = "\n".join(f"  {c.refusal}" for c in bound)
        strip_pruning(to_prune)
        raise ValueError(f"No weight can be pruned with block_size={settings.block_size}:\n{reasons}")
    for refusal in [*refusals, *(c.refusal for c in bound if c.skipped)]:
        warnings.warn(refusal, stacklevel=2)
    _forget_compiled_step(to_prune)
    return to_prune


def strip_pruning(model: Any) -> Any:
    """Takes all pruning off a layer or model, in place: masked weights are zero and stay as they are.

    What is left is plain Keras: its files load in a process that has never heard of this package.

    Args:
        model: what was given to `prune_low_magnitude_block`.

    Returns:
        `model`.
    """
    for layer in find_prunable_layers(model, everything=True):
        for spec in _specs(layer):
            for holder, name in _holders(layer, spec, "constraint"):
                value = getattr(holder, name, None)
                if isinstance(value, BlockPruning):
                    if value.variable is not None and not value.skipped:
                        value.apply()
                    setattr(holder, name, value.constraint)
            for holder, name in _holders(layer, spec, "regularizer"):
                value = getattr(holder, name, None)
                if isinstance(value, DrivenGroupLasso):
                    setattr(holder, name, value.regularizer)
    _forget_compiled_step(model)
    return model


def sparsity(model: Any) -> float:
    """Share of zero elements in the weights that are being pruned, or, if none is, in all that could be by default.

    Args:
        model: built Keras model or layer, or a list of either.

    Raises:
        ValueError: no prunable layer is built, or one is block-sparse.
    """
    variables = [variable for _, _, variable in pruned_or_prunable_weights(model)]
    zeros = sum(int(np.count_nonzero(to_numpy(v) == 0)) for v in variables)
    return zeros / sum(int(np.prod(v.shape)) for v in variables)


def pruned_or_prunable_weights(model: Any) -> list[tuple[PrunableLayer, PrunableWeight, Any]]:
    """Layer, weight and variable of all that is being pruned, or, if nothing is, of all that could be by default.

    Raises:
        ValueError: no prunable layer is built, or one is block-sparse.
    """
    layers = find_prunable_layers(model, everything=True)
    refuse_block_sparse(layers)
    weights = [(layer, spec, variable) for layer in layers for spec, variable in _built_weights(layer)]
    pruned = [weight for weight in weights if (c := pruning_of(weight[2])) is not None and not c.skipped]
    weights = pruned or [weight for weight in weights if weight[0].by_default or not isinstance(model, keras.Model)]
    if not weights:
        raise ValueError(
            "No weight that could be pruned is built yet. Build the model first (call it on data, or give it an "
            f"Input). Received: {model!r}"
            if layers
            else f"There is no prunable layer in {model!r}"
        )
    return weights


@dataclasses.dataclass(frozen=True)
class _Target:
    """One weight under a pruner."""

    layer: PrunableLayer
    spec: PrunableWeight
    constraint: BlockPruning

    @property
    def name(self) -> str:
        return f"{self.layer.path}/{self.spec.name}"

    def parts(self) -> list[distributions.Part]:
        grid, scores = self.constraint.grid, self.constraint.scores()
        shape = (grid.rows, grid.cols)
        return [
            distributions.Part(self.layer.path, self.spec.name, gate, self.spec.kind, shape, grid.elements, scores[g])
            for g, gate in enumerate(self.spec.gates)
        ]

    def always(self) -> np.ndarray | None:
        if self.constraint.settings.keep_diagonal and self.constraint.diagonal:
            return self.constraint.grid.diagonal_blocks()
        return None


class Pruner:
    """Moves the masks of a model under pruning: the engine of `UpdatePruningStep`, for training loops of your own.

    Example:

    ```python
    model = kbs.prune_low_magnitude_block(model, schedule)
    pruner = kbs.Pruner(model, optimizer)
    for x, y in data:
        train_step(x, y)       # optimizer.apply(...) inside; weights are sparse after it
        pruner.step()          # moves the masks when the schedule says so
    ```

    Args:
        model: built Keras model, layer, or list of layers that went through `prune_low_magnitude_block`.
        optimizer: whose `iterations` are the training step; `model.optimizer` if `None`. Without any, calls of `step()`
            are counted.

    Raises:
        ValueError: nothing in the model is under pruning, no block fits any weight, or there is group lasso in a
            `keras.distillation.Distiller`, which leaves regularizers out of its loss.
    """

    def __init__(self, model: Any, optimizer: Any = None) -> None:
        self.model = model
        self.optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        #: Latest threshold of a `ThresholdRamp`, for each block kind: `{"recurrent": 0.03}`.
        self.thresholds: dict[str, float] = {}
        #: Whether a training step that was compiled before this pruner was made misses something that it drives.
        self.needs_new_step = False
        self._targets: list[_Target] = []
        self._groups: list[tuple[PruningSettings, list[_Target]]] = []
        self._regularizers: list[tuple[DrivenGroupLasso, BlockPruning]] = []
        self._warned: set[str] = set()
        self._last_step = -1
        self.refresh()
        if not self._targets:
            self._raise_nothing_to_drive()
        distiller = getattr(getattr(keras, "distillation", None), "Distiller", ())  # of Keras 3.12
        if self._regularizers and isinstance(model, distiller):
            raise ValueError(
                "keras.distillation.Distiller leaves regularizers out of its loss, so group lasso would do nothing. "
                "Prune the student without `group_lasso`, or add its `losses` in a training step of your own and give "
                "the student to `Pruner`"
            )
        self.resume()

    def refresh(self) -> None:
        """Takes in weights that were built since the last call, and sets `needs_new_step`."""
        layers = find_prunable_layers(self.model, everything=True)
        pairs = [(layer, spec, variable) for layer in layers for spec, variable in _built_weights(layer)]
        self._targets, self._regularizers, self._groups = [], [], []
        for layer, spec, variable in pairs:
            constraint = pruning_of(variable)
            if constraint is None:
                continue
            constraint.bind(variable)
            if isinstance(variable.regularizer, DrivenGroupLasso):
                self.needs_new_step |= variable.regularizer.drive(variable)
                self._regularizers.append((variable.regularizer, constraint))
            if not constraint.skipped:
                self.needs_new_step |= variable.trainable and not constraint.traced
                constraint.driven = True
                constraint.averages = self._moving_averages(variable)
                self._targets.append(_Target(layer, spec, constraint))
        for target in self._targets:
            group = next((members for s, members in self._groups if s == target.constraint.settings), None)
            if group is None:
                self._groups.append((target.constraint.settings, [target]))
            else:
                group.append(target)

    @property
    def iterations(self) -> int:
        """Updates done so far: the optimizer's, or the calls of `step()`."""
        if self.optimizer is None:
            return max(self._last_step, 0)
        return updates_of(self.optimizer)

    @property
    def settings(self) -> list[PruningSettings]:
        """The different settings that the model's weights are pruned by."""
        return [settings for settings, _ in self._groups]

    @property
    def strengths(self) -> dict[str, float]:
        """Lambda of the group lasso now, by path of the weight."""
        return {c.variable.path: regularizer.strength for regularizer, c in self._regularizers}

    def resume(self, step: int | None = None) -> None:
        """Reads masks and step off the weights and the optimizer, after they were loaded or set from outside.

        Args:
            step: updates done so far for which the schedules have been followed; `iterations` if `None`.
        """
        if self.optimizer is not None or step is not None:
            self._last_step = (self.iterations if step is None else step) - 1
        for target in self._targets:
            target.constraint.read_mask_from_weight()
        self._switch_lasso(self._last_step)

    def step(self, step: int | None = None) -> None:
        """Brings the masks up to the training step; call it after each update of the weights.

        Args:
            step: updates done so far; `iterations` if `None`.

        Raises:
            ValueError: a weight that is due for an update holds NaN.
        """
        if step is None:
            step = self.iterations if self.optimizer is not None else max(self._last_step, 0) + 1
        if self.optimizer is None:
            # Who writes to the weights himself calls no constraint either.
            for target in self._targets:
                target.constraint.enforce()
        self.advance(int(step))

    def advance(self, step: int) -> bool:
        """Does what the schedules want up to `step`. Returns whether a mask moved."""
        moved = False
        for settings, targets in self._groups:
            due = settings.latest_update(self._last_step, step)
            if due is not None:
                self._update(settings, targets, settings.schedule(due)[1], due)
                moved = True
        self._last_step = max(step, self._last_step)
        self._switch_lasso(self._last_step)
        return moved

    def prune_now(self, sparsity: float | None = None, *, threshold: float | None = None) -> float:
        """Prunes in one shot, whatever the schedule says.

        Args:
            sparsity: share of zero elements to reach, in [0, 1), spread by the distribution each weight was given.
            threshold: instead: zero every block whose score lies below it.

        Returns:
            The sparsity reached.

        Raises:
            ValueError: not exactly one of both is given, or it is out of range.
        """
        if (sparsity is None) == (threshold is None):
            raise ValueError(f"Give `sparsity` or `threshold`. Received: sparsity={sparsity}, threshold={threshold}")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1). Received: sparsity={sparsity!r}")
        if threshold is not None and not 0 <= threshold < np.inf:
            raise ValueError(f"`threshold` must be a finite number >= 0. Received: threshold={threshold!r}")
        for settings, targets in self._groups:
            parts = [part for target in targets for part in target.parts()]
            if sparsity is not None:
                wanted = settings.distribution(parts, sparsity, getattr(settings.schedule, "final_sparsity", sparsity))
            elif threshold is not None:
                wanted = np.array([_share_below(part, threshold) for part in parts])
            self._keep(targets, parts, wanted)
        return self.sparsity()

    def sparsity(self) -> float:
        """Share of zero elements in the weights under pruning."""
        return sparsity([target.layer for target in self._targets])

    def masked_sparsity(self) -> float:
        """Share of masked elements in the weights under pruning. Cheap: reads no weight."""
        constraints = [target.constraint for target in self._targets]
        kept = sum(int((c.kept * c.grid.elements).sum()) for c in constraints)
        return 1 - kept / sum(c.kept.shape[0] * int(c.grid.elements.sum()) for c in constraints)

    def apply_masks(self) -> None:
        """Sets masked blocks to zero, after something other than the optimizer wrote to the weights."""
        for target in self._targets:
            target.constraint.apply()

    def _update(self, settings: PruningSettings, targets: list[_Target], goal: Any, step: int) -> None:
        parts = [part for target in targets for part in target.parts()]
        if isinstance(settings.schedule, ThresholdRamp):
            wanted = self._threshold_sparsities(settings, parts, step)
        else:
            goal = float(np.asarray(goal))
            if not 0 <= goal < 1:
                raise ValueError(f"The schedule must give a sparsity in [0, 1). Received: {goal} at step {step}")
            wanted = settings.distribution(parts, goal, getattr(settings.schedule, "final_sparsity", None))
        self._keep(targets, parts, wanted)

    def _threshold_sparsities(
        self, settings: PruningSettings, parts: list[distributions.Part], step: int
    ) -> np.ndarray:
        ramp, elements = settings.schedule, settings.block_size[0] * settings.block_size[1]
        self.thresholds.update({part.kind: ramp.threshold(step, part.kind, elements) for part in parts})
        wanted = np.array([_share_below(part, self.thresholds[part.kind]) for part in parts])
        for part, share in zip(parts, wanted, strict=True):
            if share > ramp.max_sparsity:
                self._warn_once(
                    f"At step {step} the threshold {self.thresholds[part.kind]:.4g} would zero {share:.1%} of "
                    f"{_part_name(part)}; it is held at max_sparsity={ramp.max_sparsity}. A smaller q or "
                    "block_exponent would prune it less",
                    key=f"cap {_part_name(part)}",
                )
        return np.minimum(wanted, ramp.max_sparsity)

    def _keep(self, targets: list[_Target], parts: list[distributions.Part], wanted: np.ndarray) -> None:
        each = iter(zip(parts, wanted, strict=True))
        for target in targets:
            kept = []
            for part, share in (next(each) for _ in target.spec.gates):
                kept.append(blocks.keep_blocks(part.scores, part.elements, float(share), target.always()))
                reached = 1 - (kept[-1] * part.elements).sum() / part.size
                if reached < share - part.elements.max() / 2 / part.size - 1e-9:
                    why = (
                        "keep_diagonal keeps more than that" if target.always() is not None else "it has so few blocks"
                    )
                    self._warn_once(
                        f"{_part_name(part)} is asked to be {share:.1%} zero and is left at {reached:.1%}: {why}. "
                        f"A smaller block than {target.constraint.settings.block_size} would help",
                        key=f"coarse {_part_name(part)}",
                    )
            target.constraint.keep(np.stack(kept))

    def _switch_lasso(self, step: int) -> None:
        for regularizer, constraint in self._regularizers:
            end = constraint.settings.end_step
            over = constraint.settings.schedule is not None and end is not None and step >= end
            regularizer.switch(on=not (constraint.skipped or (over and regularizer.group_lasso.off_at_end)))

    def _moving_averages(self, variable: Any) -> list[Any]:
        """The optimizer's moving average of a variable: it would be written back over the masked weight, dense."""
        optimizer: Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if not getattr(optimizer, "use_ema", False):
            return []
        if not optimizer.built:
            # Left to the first compiled step, the averages would be made too late to be masked in it.
            optimizer.build(self.model.trainable_variables)
        averages = optimizer._model_variables_moving_average
        index = optimizer._trainable_variables_indices.get(optimizer._var_key(variable))
        return [averages[index]] if index is not None and averages[index] is not None else []

    def _warn_once(self, message: str, key: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)

    def _raise_nothing_to_drive(self) -> None:
        layers = find_prunable_layers(self.model, everything=True)
        skipped = [
            f"  {c.refusal}"
            for layer in layers
            for _, variable in _built_weights(layer)
            if (c := pruning_of(variable)) is not None
        ]
        if skipped:
            raise ValueError("No weight can be pruned with the block_size that was asked for:\n" + "\n".join(skipped))
        if any(constraint.variable is None for constraint in constraints_of(self.model)):
            raise ValueError("The model is not built yet. Call it on a batch, or give it an Input, before using Pruner")
        raise ValueError(
            f"Nothing in {self.model!r} is under pruning. Call kbs.prune_low_magnitude_block(model, ...) first"
        )


def _lasso_template(group_lasso: Any, block_size: blocks.BlockSize) -> GroupLassoRegularizer | None:
    if group_lasso is None or isinstance(group_lasso, GroupLassoRegularizer):
        return group_lasso
    return GroupLassoRegularizer(group_lasso, block_size)


def _check_overrides(settings: PruningSettings) -> None:
    overrides: Mapping[str, float] | None = settings.distribution.layer_sparsity
    if overrides and not getattr(settings.schedule, "final_sparsity", None):
        raise ValueError(
            "`layer_sparsity` needs a schedule with a `final_sparsity` above 0. "
            f"Received: pruning_schedule={settings.schedule!r}"
        )


def _layers_to_prune(to_prune: Any, filters: Filters) -> list[PrunableLayer]:
    layers = find_prunable_layers(to_prune, filters)
    if layers:
        return layers
    possible = [layer.path for layer in find_prunable_layers(to_prune, everything=True)]
    if possible:
        chosen = "no `filters`" if filters is None else f"filters={filters!r}"
        raise ValueError(f"Nothing to prune: {chosen} picks none of the prunable layers {possible}")
    raise ValueError(
        f"There is no layer to prune in {to_prune!r}. Prunable are recurrent, Dense, EinsumDense, Embedding and Conv "
        "layers, and what you register by kbs.register_prunable. (A subclassed model that makes its layers in build() "
        "must be built first.)"
    )


Weights = tuple[PrunableLayer, list[tuple[PrunableWeight, Any]], list[PrunableWeight]]


def _weights_to_prune(layers: list[PrunableLayer]) -> tuple[list[Weights], list[str]]:
    """The weights of each layer, built or to come, and why some layers have to be left alone."""
    weights: list[Weights] = []
    refusals = []
    for layer in layers:
        try:
            pairs = [(spec, variable) for spec, variable in layer.built_weights() if layer.picks(spec)]
            specs = [spec for spec, _ in pairs] or [spec for spec in layer.get_weight_specs() if layer.picks(spec)]
            weights.append((layer, pairs, specs))
        except ValueError as error:
            refusals.append(f"{layer.path} is not pruned. {error}")
    if not weights:
        raise ValueError("Nothing to prune:\n" + "\n".join(f"  {refusal}" for refusal in refusals))
    return weights, refusals


def _attach(
    layer: PrunableLayer, pairs: list[tuple[PrunableWeight, Any]], specs: list[PrunableWeight],
    settings: PruningSettings, lasso: GroupLassoRegularizer | None,
) -> list[BlockPruning]:  # fmt: skip
    if not pairs and (not specs or any(not hasattr(layer.owner, spec.attribute("constraint")) for spec in specs)):
        _attach_when_built(layer, settings, lasso)
    variables = {spec.name: variable for spec, variable in pairs}
    return [
        _attach_weight(layer, spec, variables.get(spec.name), settings, lasso)
        for spec in specs
        if _holders(layer, spec, "constraint")
    ]


def _attach_weight(
    layer: PrunableLayer, spec: PrunableWeight, variable: Any, settings: PruningSettings,
    lasso: GroupLassoRegularizer | None,
) -> BlockPruning:  # fmt: skip
    holders = _holders(layer, spec, "constraint")
    user_constraint = getattr(*holders[0], None)
    if isinstance(user_constraint, BlockPruning):
        user_constraint = user_constraint.constraint
    constraint = BlockPruning(settings, len(spec.gates), spec.row_axes, spec.diagonal, user_constraint)
    for holder, name in holders:
        setattr(holder, name, constraint)
    if variable is not None:
        constraint.bind(variable, warn=False)

    holders = _holders(layer, spec, "regularizer")
    user_regularizer = getattr(*holders[0], None) if holders else None
    if isinstance(user_regularizer, DrivenGroupLasso):
        user_regularizer = user_regularizer.regularizer
    regularizer: Any = user_regularizer
    if lasso is not None and not constraint.skipped:
        group_lasso = GroupLassoRegularizer(
            lasso.strength, settings.block_size, len(spec.gates), spec.row_axes, lasso.off_at_end
        )
        regularizer = DrivenGroupLasso(group_lasso, user_regularizer)
    for holder, name in holders:
        setattr(holder, name, regularizer)
    return constraint


def _attach_when_built(layer: PrunableLayer, settings: PruningSettings, lasso: GroupLassoRegularizer | None) -> None:
    """For layers that have no constraint argument to carry the pruning until their weights exist."""
    build = layer.layer.build

    @functools.wraps(build)
    def build_and_attach(*args: Any, **kwargs: Any) -> Any:
        result = build(*args, **kwargs)
        for spec, variable in layer.built_weights():
            if layer.picks(spec) and pruning_of(variable) is None:
                # This may be inside the first training step, when a callback that drives it cannot have found it yet.
                constraint = _attach_weight(layer, spec, variable, settings, lasso)
                constraint.driven = True
                if constraint.skipped:
                    warnings.warn(constraint.refusal, stacklevel=2)
        return result

    layer.layer.build = build_and_attach


def _holders(layer: PrunableLayer, spec: PrunableWeight, suffix: str) -> list[tuple[Any, str]]:
    """Where a weight's constraint or regularizer is kept: on the variable, and on the layer for its config."""
    variable = next((v for s, v in _built_weights(layer) if s == spec), None)
    holders: list[tuple[Any, str]] = [] if variable is None else [(variable, suffix)]
    if hasattr(layer.owner, spec.attribute(suffix)):
        holders.append((layer.owner, spec.attribute(suffix)))
    return holders


def _specs(layer: PrunableLayer) -> list[PrunableWeight]:
    try:
        return [spec for spec, _ in layer.built_weights()] or list(layer.get_weight_specs())
    except ValueError:
        return []


def _built_weights(layer: PrunableLayer) -> list[tuple[PrunableWeight, Any]]:
    try:
        return layer.built_weights()
    except ValueError:
        return []


def constraints_of(model: Any) -> list[BlockPruning]:
    """The constraints of all weights under pruning, built or not."""
    return [
        constraint
        for layer in find_prunable_layers(model, everything=True)
        for spec in _specs(layer)
        for holder, name in _holders(layer, spec, "constraint")
        if isinstance(constraint := getattr(holder, name, None), BlockPruning)
    ]


def _part_name(part: distributions.Part) -> str:
    return f"{part.layer}/{part.weight}" + (f" gate {part.gate}" if part.gate else "")


def _share_below(part: distributions.Part, threshold: float) -> float:
    return float(part.elements[part.scores < threshold].sum() / part.size)


def _forget_compiled_step(model: Any) -> None:
    """Keras keeps a compiled training step across fit() calls, and it would not see constraints set since."""
    if isinstance(model, keras.Model) and getattr(model, "train_function", None) is not None:
        model.train_function = None
