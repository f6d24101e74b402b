"""Block-sparse recurrent networks for Keras 3: prune in fit(), strip, export, run fast."""

from __future__ import annotations

from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.callbacks import PruningSummaries, UpdatePruningStep
from keras_blocksparse.constraints import BlockPruning
from keras_blocksparse.distributions import ERK, Distribution, Global, Uniform
from keras_blocksparse.inspection import FileReport, StoredWeight, tflite_report
from keras_blocksparse.lite import ExportError, ExportReport, export_tflite
from keras_blocksparse.plots import plot_masks
from keras_blocksparse.prunable import PrunableLayer, PrunableWeight, register_prunable
from keras_blocksparse.pruning import Pruner, prune_low_magnitude_block, sparsity, strip_pruning
from keras_blocksparse.regularizers import GroupLassoRegularizer
from keras_blocksparse.report import SparsityReport, sparsity_report
from keras_blocksparse.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule, ThresholdRamp
from keras_blocksparse.sparse import (
    BlockSparseDense,
    BlockSparseGRU,
    BlockSparseLSTM,
    BlockSparseMatrix,
    BlockSparseSimpleRNN,
    BlockStructure,
    ConversionReport,
    block_sparse_matmul,
    conversion_report,
    get_isa,
    register_ops,
    set_num_threads,
    to_block_sparse,
    to_dense,
)

__version__ = "0.1.0"

__all__ = [
    "ERK",
    "BlockGrid",
    "BlockPruning",
    "BlockSparseDense",
    "BlockSparseGRU",
    "BlockSparseLSTM",
    "BlockSparseMatrix",
    "BlockSparseSimpleRNN",
    "BlockStructure",
    "ConstantSparsity",
    "ConversionReport",
    "Distribution",
    "ExportError",
    "ExportReport",
    "FileReport",
    "Global",
    "GroupLassoRegularizer",
    "PolynomialDecay",
    "PrunableLayer",
    "PrunableWeight",
    "Pruner",
    "PruningSchedule",
    "PruningSummaries",
    "SparsityReport",
    "StoredWeight",
    "ThresholdRamp",
    "Uniform",
    "UpdatePruningStep",
    "block_sparse_matmul",
    "conversion_report",
    "export_tflite",
    "get_isa",
    "plot_masks",
    "prune_low_magnitude_block",
    "register_ops",
    "register_prunable",
    "set_num_threads",
    "sparsity",
    "sparsity_report",
    "strip_pruning",
    "tflite_report",
    "to_block_sparse",
    "to_dense",
]
