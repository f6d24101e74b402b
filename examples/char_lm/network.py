"""The network, and its score in bits a character."""

from __future__ import annotations

import keras
import numpy as np

from examples.char_lm.data import CONTEXT, scored_windows
from examples.common.student import Student

CELLS = {"gru": keras.layers.GRU, "lstm": keras.layers.LSTM}


def build(alphabet: int, cell: str, units: int, layers: int = 1, embedding: int = 64, dropout: float = 0.0) -> Student:
    """A character language model: embedding, recurrent layers, logits of the next character.

    Args:
        alphabet: how many characters there are.
        cell: "gru" or "lstm".
        units: of each recurrent layer.
        layers: how many there are.
        embedding: numbers by which a character is given to the first layer.
        dropout: share of each layer's outputs dropped while training.
    """
    inputs = keras.Input((None,), dtype="int32", name="characters")
    x = keras.layers.Embedding(alphabet, embedding, name="embedding")(inputs)
    for n in range(layers):
        x = CELLS[cell](units, return_sequences=True, name=f"{cell}_{n + 1}")(x)
        x = keras.layers.Dropout(dropout, name=f"dropout_{n + 1}")(x)
    return Student(inputs, keras.layers.Dense(alphabet, name="next")(x), name="char_lm")


def bits_per_character(model: keras.Model, text: np.ndarray) -> float:
    """Mean of -log2 of what the network gives the character that comes."""
    total = count = 0.0
    for windows, expected in scored_windows(text):
        logits = np.asarray(model.predict_on_batch(windows), np.float64)[:, CONTEXT - 1 :]
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, expected[..., None], -1)[..., 0]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
        count += expected.size
    return total / count / np.log(2)
