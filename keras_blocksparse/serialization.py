"""Configs of objects that Keras can save, and of those it cannot.

A pruning constraint stands in the config of its layer, and Keras copies layers through their configs in many places
(`Bidirectional`, `clone_model`, ...). A schedule or score that is just a Python callable, such as a tfmot schedule, has
no config that works; it is passed by a reference that is good inside this process.
"""

from __future__ import annotations

import itertools
from typing import Any

import keras

_LIVE_PREFIX = "keras_blocksparse>live:"
_live: dict[str, Any] = {}
_numbers = itertools.count()


class LostObject:
    """Stands for an object of another process that could not be saved; `description` says what it was."""

    def __init__(self, description: str) -> None:
        self.description = description


def serialize(value: Any) -> Any:
    """A JSON-able stand-in for `value`: itself, its Keras config, or a reference that lasts as long as the process."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    cls = type(value)
    if hasattr(value, "get_config") and keras.saving.get_registered_name(cls) != cls.__name__:
        return keras.saving.serialize_keras_object(value)
    for key, known in _live.items():
        if known is value:
            return key
    key = f"{_LIVE_PREFIX}{next(_numbers)}:{getattr(value, '__qualname__', cls.__qualname__)}:{id(value):x}"
    _live[key] = value
    return key


def deserialize(value: Any) -> Any:
    """What `serialize` was given; a `LostObject` for a reference made in another process."""
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    if isinstance(value, str) and value.startswith(_LIVE_PREFIX):
        return _live[value] if value in _live else LostObject(value.split(":")[-2])
    return value
