"""Block-sparse matrices and layers that run on the native kernels."""

from keras_blocksparse.sparse._native import available_isas, get_isa, get_num_threads, set_num_threads
from keras_blocksparse.sparse.convert import (
    ConversionReport,
    LayerConversion,
    conversion_report,
    to_block_sparse,
    to_dense,
)
from keras_blocksparse.sparse.layers import (
    BlockSparseDense,
    BlockSparseGRU,
    BlockSparseGRUCell,
    BlockSparseLSTM,
    BlockSparseLSTMCell,
    BlockSparseSimpleRNN,
    BlockSparseSimpleRNNCell,
)
from keras_blocksparse.sparse.matrix import BlockSparseMatrix
from keras_blocksparse.sparse.ops import block_sparse_matmul, block_sparse_rnn, register_ops
from keras_blocksparse.sparse.structure import BlockStructure

__all__ = [
    "BlockSparseDense",
    "BlockSparseGRU",
    "BlockSparseGRUCell",
    "BlockSparseLSTM",
    "BlockSparseLSTMCell",
    "BlockSparseMatrix",
    "BlockSparseSimpleRNN",
    "BlockSparseSimpleRNNCell",
    "BlockStructure",
    "ConversionReport",
    "LayerConversion",
    "available_isas",
    "block_sparse_matmul",
    "block_sparse_rnn",
    "conversion_report",
    "get_isa",
    "get_num_threads",
    "register_ops",
    "set_num_threads",
    "to_block_sparse",
    "to_dense",
]
