"""Group lasso over blocks: section 3.2 of "Block-Sparse Recurrent Neural Networks" (Narang et al., 2017)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blocksparse.blocks import BlockGrid, BlockSize, check_block_size
from keras_blocksparse.schedules import PACKAGE
from keras_blocksparse.variables import creation_scope, to_numpy, untracked_variable

# Added under the root: the gradient of the norm is 0 at a block of zeros instead of NaN.
TINY = 1e-12


@keras.saving.register_keras_serializable(package=PACKAGE)
class GroupLassoRegularizer(keras.regularizers.Regularizer):
    """A regularizer that adds `strength * sum over blocks of ||block||_2`, one group for each block.

    It pushes whole blocks towards zero together. There is no factor for the block's size, as in the paper (Eq. 3). By
    itself (GL) it makes blocks small but never exactly zero; together with a pruning schedule (GLP) small blocks are
    cut, and `prune_low_magnitude_block(..., group_lasso=strength)` sets both up.

    Example:

    >>> layer = keras.layers.Dense(256, kernel_regularizer=kbs.GroupLassoRegularizer(1e-4, block_size=(16, 16)))

    Args:
        strength: lambda, >= 0.
        block_size: rows (inputs) and columns (outputs) of a block of the Keras weight.
        gates: equal parts beside each other in the last axis that blocks must not straddle: 3 for the kernels of a GRU,
            4 for an LSTM.
        row_axes: how many leading axes of the weight are inputs; all but the last if `None`.
        off_at_end: whether lambda goes to 0 when the pruning schedule that drives the weight ends (GLP), or stays on
            for the whole training. Without a schedule it always stays on.

    Raises:
        ValueError: `strength` is negative or not finite, or `block_size` is no pair of positive integers.
    """

    def __init__(
        self, strength: float, block_size: BlockSize = (16, 16), gates: int = 1, row_axes: int | None = None,
        off_at_end: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
            raise ValueError(f"`strength` must be a finite number >= 0. Received: strength={strength!r}")
        self.strength = float(strength)
        self.block_size = check_block_size(block_size)
        self.gates = gates
        self.row_axes = row_axes
        self.off_at_end = off_at_end

    def __call__(self, x: Any) -> Any:
        """The penalty of weight `x`, a float32 scalar; 0 with a warning if `x` is smaller than one block."""
        try:
            grid = BlockGrid(tuple(x.shape), self.block_size, self.gates, self.row_axes)
        except ValueError as error:
            warnings.warn(f"Group lasso leaves a weight alone: {error}", stacklevel=2)
            return ops.zeros((), "float32")
        return self.strength * ops.sum(block_norms(x, grid))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in ("strength", "block_size", "gates", "row_axes", "off_at_end")}


def block_norms(x: Any, grid: BlockGrid) -> Any:
    """Euclidean norm of each block of tensor `x`, a float32 tensor of `grid.grid_shape`."""
    (gates, down, across), (height, width) = grid.grid_shape, grid.block_size
    squares = ops.square(ops.cast(ops.convert_to_tensor(x), "float32"))
    squares = ops.reshape(squares, (grid.rows, gates, grid.cols))
    padding = ((0, down * height - grid.rows), (0, 0), (0, across * width - grid.cols))
    if any(after for _, after in padding):
        squares = ops.pad(squares, padding)
    # Two reductions over neighbours are several times faster than one over two axes that are not.
    squares = ops.sum(ops.reshape(squares, (down, height, gates * across * width)), axis=1)
    squares = ops.sum(ops.reshape(squares, (down, gates, across, width)), axis=3)
    return ops.transpose(ops.sqrt(squares + TINY), (1, 0, 2))


@keras.saving.register_keras_serializable(package=PACKAGE)
class DrivenGroupLasso(keras.regularizers.Regularizer):
    """A group lasso that a pruner switches on and off, beside the user's own regularizer.

    Args:
        group_lasso: a `GroupLassoRegularizer`.
        regularizer: the Keras regularizer that the weight had before, or `None`.
    """

    def __init__(self, group_lasso: Any, regularizer: Any = None) -> None:
        self.group_lasso = keras.regularizers.get(group_lasso)
        self.regularizer = keras.regularizers.get(regularizer)
        # On or off: a variable once a pruner drives it, since a compiled step could not see a number move.
        self._switch: Any = None
        self._weight: Any = None

    def __call__(self, x: Any) -> Any:
        """Both penalties of weight `x`, a scalar."""
        penalty = self.group_lasso(x)
        if self._switch is not None:
            penalty = penalty * ops.convert_to_tensor(self._switch)
        return penalty if self.regularizer is None else penalty + ops.cast(self.regularizer(x), penalty.dtype)

    @property
    def strength(self) -> float:
        """Lambda now."""
        return self.group_lasso.strength * (1.0 if self._switch is None else float(to_numpy(self._switch)))

    def drive(self, variable: Any) -> bool:
        """Makes lambda switchable for the weight `variable`. Returns whether it was not before."""
        if self._weight is variable:
            return False
        with creation_scope(variable):
            self._switch = untracked_variable(np.ones((), np.float32), "float32", f"{variable.name}_group_lasso")
        self._weight = variable
        return True

    def switch(self, on: bool) -> None:
        """Sets lambda to its strength or to 0. Only after `drive`."""
        self._switch.assign(1.0 if on else 0.0)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        serialize = keras.regularizers.serialize
        return {
            "group_lasso": serialize(self.group_lasso),
            "regularizer": None if self.regularizer is None else serialize(self.regularizer),
        }
