"""How a target is spread: which layer and which gate gets which sparsity.

The unit is a `Part`, one gate of one weight. A distribution maps parts and an overall sparsity to a sparsity for each
part; the choice of blocks inside a part is `blocks.keep_blocks`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_blocksparse.schedules import PACKAGE


@dataclasses.dataclass(frozen=True)
class Part:
    """One gate of one prunable weight, as a distribution sees it.

    Attributes:
        layer: path of the layer in its model, such as "encoder/forward_gru".
        weight: name of the weight in the layer, such as "recurrent_kernel".
        gate: name of the gate, "" where there is one only.
        kind: layer kind, such as "recurrent" or "dense".
        shape: rows and columns of the gate's matrix.
        elements: elements of each block, int array `(block rows, block columns)`.
        scores: block scores, same shape.
    """

    layer: str
    weight: str
    gate: str
    kind: str
    shape: tuple[int, int]
    elements: np.ndarray
    scores: np.ndarray

    @property
    def size(self) -> int:
        """Elements of the part."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """Base of all distributions. A subclass implements `spread`.

    Example:

    >>> # the state gate of each GRU keeps four times as many weights as the others (LPCNet's densities)
    >>> distribution = kbs.Uniform(gate_density={"z": 1, "r": 1, "h": 4}, layer_sparsity={"decoder": 0.8})

    Args:
        gate_density: relative densities of gates by name. The weight's sparsity as a whole stays what it was; gates
            that are not named have 1. A density that would pass 100 % is cut there and the rest gets more.
        layer_sparsity: final sparsity of layers whose path or `path/weight` matches a regex (`re.search`), instead of
            the schedule's; on the way they are as far along as the schedule is. The first match counts.
    """

    gate_density: Mapping[str, float] | None = None
    layer_sparsity: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, density in (self.gate_density or {}).items():
            if not isinstance(density, (int, float)) or not 0 < density < float("inf"):
                raise ValueError(f"`gate_density` must hold positive numbers. Received: {name!r}: {density!r}")
        for pattern, sparsity in (self.layer_sparsity or {}).items():
            if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
                raise ValueError(f"`layer_sparsity` must hold numbers in [0, 1). Received: {pattern!r}: {sparsity!r}")
            re.compile(pattern)

    def spread(self, parts: Sequence[Part], sparsity: float) -> np.ndarray:
        """A sparsity for each part, so that all together reach `sparsity`.

        Args:
            parts: what is pruned together.
            sparsity: share of all their elements to zero, in [0, 1).

        Returns:
            float array, one sparsity in [0, 1) for each part.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement spread(parts, sparsity)")

    def __call__(self, parts: Sequence[Part], sparsity: float, final_sparsity: float | None = None) -> np.ndarray:
        """`spread`, with the overrides for layers and gates applied.

        Args:
            parts: what is pruned together.
            sparsity: the schedule's sparsity now.
            final_sparsity: the schedule's sparsity at its end, if known; needed by `layer_sparsity`.

        Raises:
            ValueError: `layer_sparsity` is given for a schedule whose final sparsity is not known.
        """
        overrides = np.array([self._override(part) for part in parts], float)
        fixed = ~np.isnan(overrides)
        result = np.zeros(len(parts))
        if fixed.any():
            if not final_sparsity:
                raise ValueError(
                    "`layer_sparsity` needs a schedule with a `final_sparsity` above 0 to know how far along it is. "
                    "Prune such layers by a call of their own, with a schedule of their own"
                )
            result[fixed] = overrides[fixed] * min(sparsity / final_sparsity, 1)
        if not fixed.all():
            result[~fixed] = self.spread([part for part, f in zip(parts, fixed, strict=True) if not f], sparsity)
        return self._spread_gates(parts, result) if self.gate_density else result

    def _override(self, part: Part) -> float | None:
        for pattern, sparsity in (self.layer_sparsity or {}).items():
            if re.search(pattern, f"{part.layer}/{part.weight}"):
                return sparsity
        return None

    def _spread_gates(self, parts: Sequence[Part], sparsities: np.ndarray) -> np.ndarray:
        result, gate_density = sparsities.copy(), self.gate_density or {}
        weights = np.array([f"{part.layer}/{part.weight}" for part in parts])
        for weight in set(weights):
            index = np.flatnonzero(weights == weight).tolist()
            relative = np.array([gate_density.get(parts[i].gate, 1.0) for i in index])
            sizes = np.array([parts[i].size for i in index], float)
            density = ((1 - sparsities[index]) * sizes).sum() / sizes.sum()
            result[index] = 1 - fill_densities(relative, sizes, density)
        return result

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Distribution:
        """The distribution that `get_config` described."""
        return cls(**config)


def fill_densities(relative: np.ndarray, sizes: np.ndarray, density: float) -> np.ndarray:
    """Densities proportional to `relative`, none above 1, whose mean weighted by `sizes` is `density`."""
    result, full = np.ones(len(sizes)), np.zeros(len(sizes), bool)
    while not full.all():
        left = density * sizes.sum() - sizes[full].sum()
        scaled = relative * left / (relative * sizes)[~full].sum()
        over = ~full & (scaled > 1)
        if not over.any():
            result[~full] = np.maximum(scaled[~full], 0)
            break
        full |= over
    return result


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Distribution):
    """Every gate of every weight gets the same sparsity."""

    def spread(self, parts: Sequence[Part], sparsity: float) -> np.ndarray:
        """See `Distribution.spread`."""
        return np.full(len(parts), float(sparsity))


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ERK(Distribution):
    """Erdos-Renyi: density proportional to `(rows + cols) / (rows * cols)`, so that small matrices stay denser.

    After Mocanu et al. 2018 and Evci et al. 2020 (RigL), whose kernel terms vanish for matrices.
    """

    def spread(self, parts: Sequence[Part], sparsity: float) -> np.ndarray:
        """See `Distribution.spread`."""
        relative = np.array([sum(part.shape) / part.size for part in parts])
        return 1 - fill_densities(relative, np.array([part.size for part in parts], float), 1 - sparsity)


@keras.saving.register_keras_serializable(package=PACKAGE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Global(Distribution):
    """All blocks are ranked together, whatever layer they are in, within bounds for each gate.

    Args:
        min_sparsity: no gate is left denser than this, unless the target itself lies below.
        max_sparsity: no gate is made sparser than this, unless the target itself lies above.
        by_kind: rank within each layer kind ("recurrent", "dense", ...) instead of over all. This is what the paper's
            one threshold for each layer type amounts to when the sparsity is given.
        gate_density: see `Distribution`.
        layer_sparsity: see `Distribution`.
    """

    min_sparsity: float = 0.0
    max_sparsity: float = 0.99
    by_kind: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_sparsity <= self.max_sparsity <= 1:
            raise ValueError(
                "A global distribution needs 0 <= min_sparsity <= max_sparsity <= 1. "
                f"Received: min_sparsity={self.min_sparsity}, max_sparsity={self.max_sparsity}"
            )

    def spread(self, parts: Sequence[Part], sparsity: float) -> np.ndarray:
        """See `Distribution.spread`."""
        kinds = np.array([part.kind if self.by_kind else "" for part in parts])
        result = np.zeros(len(parts))
        for kind in set(kinds):
            index = np.flatnonzero(kinds == kind).tolist()
            result[index] = self._rank([parts[i] for i in index], sparsity)
        return result

    def _rank(self, parts: Sequence[Part], sparsity: float) -> np.ndarray:
        low, high = min(self.min_sparsity, sparsity), max(self.max_sparsity, sparsity)
        sizes = np.array([part.size for part in parts], float)
        result, free = np.zeros(len(parts)), np.ones(len(parts), bool)
        while free.any():
            index = np.flatnonzero(free).tolist()
            zeros = sparsity * sizes.sum() - (result * sizes)[~free].sum()
            result[index] = _global_cut([parts[i] for i in index], zeros) / sizes[index]
            outside = free & ((result < low) | (result > high))
            if not outside.any():
                break
            # Bounds met on both sides at once would be set from a cut that fits neither: take the larger side first.
            under, over = outside & (result < low), outside & (result > high)
            excess = ((low - result) * sizes)[under].sum() - ((result - high) * sizes)[over].sum()
            chosen = under if excess >= 0 else over
            result[chosen] = low if excess >= 0 else high
            free &= ~chosen
        return np.clip(result, low, high)


def _global_cut(parts: Sequence[Part], zeros: float) -> np.ndarray:
    """Elements that each part loses when the lowest-scored blocks of all go until `zeros` elements have gone."""
    scores = np.concatenate([part.scores.ravel() for part in parts])
    elements = np.concatenate([part.elements.ravel() for part in parts])
    owner = np.repeat(np.arange(len(parts)), [part.scores.size for part in parts])
    order = np.argsort(scores, kind="stable")
    gone = order[np.cumsum(elements[order]) <= zeros + 0.5]
    return np.bincount(owner[gone], weights=elements[gone], minlength=len(parts))


DISTRIBUTIONS = {"uniform": Uniform, "erk": ERK, "global": Global}


def get(identifier: Any) -> Distribution:
    """The distribution that a name or an object stands for.

    Raises:
        ValueError: the name is not known.
    """
    if isinstance(identifier, Distribution):
        return identifier
    if isinstance(identifier, str):
        name = identifier.lower()
        if name in DISTRIBUTIONS:
            return DISTRIBUTIONS[name]()
        if name == "per_layer_type":
            return Global(by_kind=True)
    raise ValueError(
        f"`distribution` must be one of {[*DISTRIBUTIONS, 'per_layer_type']} or a kbs.Distribution object. "
        f"Received: distribution={identifier!r}"
    )
