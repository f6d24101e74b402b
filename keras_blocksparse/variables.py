"""Variables of our own that follow the model's, and values read from either."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops


def to_numpy(variable: Any) -> np.ndarray:
    """A copy of the value of a variable, which may be mirrored over devices, as float32 or float64."""
    view = np.asarray(ops.convert_to_tensor(variable))  # of memory that the next update writes to
    # numpy sorts and compares half precision slowly or not at all
    return view.astype(np.float64 if view.dtype == np.float64 else np.float32)


def untracked_variable(value: np.ndarray, dtype: str, name: str) -> Any:
    """A variable that belongs to no layer or optimizer, so that no file or weight list has it."""
    return keras.Variable(
        value, dtype=dtype, trainable=False, autocast=False, aggregation="only_first_replica", name=name
    )


def creation_scope(variable: Any) -> Any:
    """Where variables must be made to live beside `variable`: the scope of its distribution strategy, if it has one."""
    strategy = getattr(variable.value, "distribute_strategy", None)
    return strategy.scope() if strategy is not None else contextlib.nullcontext()


def has_value(variable: Any) -> bool:
    """Whether a variable can be read: not so while the step that makes it is being compiled."""
    return bool(np.all(variable.value.is_initialized()))


def is_variable(value: Any) -> bool:
    """Whether `value` is a Keras variable; until Keras 3.8 the weights of layers were no `keras.Variable`."""
    return isinstance(value, keras.Variable.__bases__)


def updates_of(optimizer: Any) -> int:
    """How often an optimizer has updated the weights; one that scales the loss counts them inside."""
    return int(to_numpy(getattr(optimizer, "inner_optimizer", optimizer).iterations))
