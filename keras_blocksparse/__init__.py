"""Block-sparse recurrent networks for Keras 3: prune in fit(), strip, export, run fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.callbacks import PruningSummaries, UpdatePruningStep
from keras_blocksparse.constraints import BlockPruning
from keras_blocksparse.distributions import ERK, Distribution, Global, Uniform
from keras_blocksparse.plots import plot_masks
from keras_blocksparse.prunable import PrunableLayer, PrunableWeight, register_prunable
from keras_blocksparse.pruning import Pruner, prune_low_magnitude_block, sparsity, strip_pruning
from keras_blocksparse.regularizers import GroupLassoRegularizer
from keras_blocksparse.report import SparsityReport, sparsity_report
from keras_blocksparse.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule, ThresholdRamp

if TYPE_CHECKING:
    from keras_blocksparse.lite import ExportReport, export_tflite

__version__ = "0.1.0"

__all__ = [
    "ERK",
    "BlockGrid",
    "BlockPruning",
    "ConstantSparsity",
    "Distribution",
    "ExportReport",
    "Global",
    "GroupLassoRegularizer",
    "PolynomialDecay",
    "PrunableLayer",
    "PrunableWeight",
    "Pruner",
    "PruningSchedule",
    "PruningSummaries",
    "SparsityReport",
    "ThresholdRamp",
    "Uniform",
    "UpdatePruningStep",
    "export_tflite",
    "plot_masks",
    "prune_low_magnitude_block",
    "register_prunable",
    "sparsity",
    "sparsity_report",
    "strip_pruning",
]

# The exporter is loaded when it is first asked for: training should not wait for it.
_LAZY = {"export_tflite": "keras_blocksparse.lite", "ExportReport": "keras_blocksparse.lite"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
