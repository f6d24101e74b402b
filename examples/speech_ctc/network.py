"""The paper's two architectures, scaled, and their score: character error rate."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from examples.common.student import Student
from examples.speech_ctc.features import MELS, SUBSAMPLING, Features
from examples.speech_ctc.pipeline import BLANK, scored_batches

#: Outputs (40 ms each) that the lookahead convolution of the GRU network sees beyond the one it writes.
LOOKAHEAD = 10
# Keras before 3.10 loads an activation that is a layer only if it is among the custom objects (its issue 21088).
keras.saving.get_custom_objects().setdefault("ReLU", layers.ReLU)


def build(alphabet: int, cell: str, units: int, depth: int = 3, channels: int = 128, dropout: float = 0.0) -> Student:
    """A network from log-mel frames `float32[batch, time, 64]` to logits `[batch, ceil(time / 4), 1 + alphabet]`.

    "gru" is two convolutions, forward GRU layers and a lookahead convolution (Deep Speech 2, Amodei et al. 2016,
    section 3.7); "rnn" one convolution and bidirectional simple RNN layers with clipped ReLU, whose directions are
    summed. Layers are normalized, where the paper has batch normalization.

    Args:
        alphabet: how many characters there are.
        cell: "gru" or "rnn".
        units: of each recurrent layer.
        depth: recurrent layers.
        channels: of the convolutions.
        dropout: share of each recurrent layer's outputs dropped while training.
    """
    x = inputs = keras.Input((None, MELS), name="frames")
    if cell == "gru":
        for n in (1, 2):
            x = layers.Conv1D(channels, 5, strides=2, padding="same", activation="relu", name=f"conv_{n}")(x)
    else:
        x = layers.Conv1D(channels, 11, strides=SUBSAMPLING, padding="same", activation="relu", name="conv_1")(x)
    for n in range(1, depth + 1):
        x = layers.LayerNormalization(name=f"norm_{n}")(x)
        if cell == "gru":
            x = layers.GRU(units, return_sequences=True, name=f"gru_{n}")(x)
        else:
            clipped = layers.ReLU(max_value=20.0)
            rnn = layers.SimpleRNN(units, activation=clipped, return_sequences=True, name=f"rnn_{n}")
            x = layers.Bidirectional(rnn, merge_mode="sum", name=f"birnn_{n}")(x)
        x = layers.Dropout(dropout, name=f"dropout_{n}")(x)
    x = layers.LayerNormalization(name="norm")(x)
    if cell == "gru":
        x = layers.ZeroPadding1D((0, LOOKAHEAD), name="future")(x)
        x = layers.DepthwiseConv1D(LOOKAHEAD + 1, activation="relu", name="lookahead")(x)
    model = Student(inputs, layers.Dense(1 + alphabet, name="character")(x), name="speech_ctc")
    model.sums = True
    return model


class CTC(keras.losses.Loss):
    """`keras.losses.CTC` by TensorFlow's older kernel: the same loss, quicker on a CPU."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The loss of each utterance, `float32[batch]`, of labels that end with blanks and of logits."""
        labels = tf.sparse.from_dense(tf.cast(y_true, tf.int32))  # without the blanks
        batch, steps = tf.unstack(tf.shape(y_pred)[:2])
        lengths = tf.fill([batch], steps)
        return tf.nn.ctc_loss(labels, y_pred, None, lengths, logits_time_major=False, blank_index=BLANK)


def decode(logits: np.ndarray, lengths: np.ndarray, alphabet: str, beam: int | None = None) -> list[str]:
    """The texts that logits stand for: the best path's, or those of a beam search.

    Args:
        logits: `float[batch, time, 1 + alphabet]`.
        lengths: `int[batch]`, how many outputs count.
        alphabet: the characters.
        beam: width of the beam.
    """
    how = {"strategy": "greedy"} if beam is None else {"strategy": "beam_search", "beam_width": beam}
    decoded, _ = keras.ops.ctc_decode(logits, lengths, mask_index=BLANK, **how)
    return ["".join(alphabet[n - 1] for n in row if n > 0) for row in np.asarray(decoded)[0]]


def errors(hypotheses: list[str], references: list[str]) -> np.ndarray:
    """Characters to insert, delete or replace to make each reference of its hypothesis, `int[texts]`."""
    made, meant = (tf.strings.unicode_split(texts, "UTF-8").to_sparse() for texts in (hypotheses, references))
    size = (len(references), max(made.dense_shape[1], meant.dense_shape[1], 1))
    made, meant = (tf.SparseTensor(s.indices, s.values, size) for s in (made, meant))
    return tf.edit_distance(made, meant, normalize=False).numpy().astype(int)


def character_error_rate(
    model: keras.Model, features: Features, split: str, alphabet: str, beam: int | None = None
) -> tuple[float, list[tuple[str, str]]]:
    """Errors over characters of a split; and what was said and what was understood, from short to long."""
    wrong = total = 0
    pairs = []
    for frames, lengths, texts in scored_batches(features, split):
        logits = model.predict_on_batch(frames)
        heard = decode(logits, -(-lengths // SUBSAMPLING), alphabet, beam)
        wrong += int(errors(heard, texts).sum())
        total += sum(map(len, texts))
        pairs += zip(texts, heard, strict=True)
    return wrong / total, pairs
