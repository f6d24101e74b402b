"""Block-sparse matrices and layers that run on the native kernels."""

from keras_blocksparse.sparse._native import available_isas, get_isa, get_num_threads, set_num_threads
from keras_blocksparse.sparse.matrix import BlockSparseMatrix
from keras_blocksparse.sparse.ops import block_sparse_matmul, block_sparse_rnn, register_ops
from keras_blocksparse.sparse.structure import BlockStructure

__all__ = [
    "BlockSparseMatrix",
    "BlockStructure",
    "available_isas",
    "block_sparse_matmul",
    "block_sparse_rnn",
    "get_isa",
    "get_num_threads",
    "register_ops",
    "set_num_threads",
]
