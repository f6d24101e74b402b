"""Models of every kind that is exported, small."""

import keras
import numpy as np
from keras import layers
from lite_helpers import sequential


def bidirectional(mode, layer):
    inputs = keras.Input((6, 32))
    return keras.Model(inputs, layers.Bidirectional(layer, merge_mode=mode)(inputs))


def multi_io():
    a, b = keras.Input((6, 32), name="a"), keras.Input((16,), name="b")
    sequence = layers.GRU(32, return_sequences=True, name="sequence")(a)
    state = layers.LSTM(32)(sequence)
    return keras.Model([a, b], [sequence, layers.Dense(5, name="classes")(layers.Concatenate()([state, b]))])


def dict_io():
    a, b = keras.Input((6, 32), name="a"), keras.Input((16,), name="b")
    return keras.Model({"a": a, "b": b}, {"second": layers.GRU(32)(a), "first": layers.Dense(32)(b)})


def initial_state():
    inputs = keras.Input((6, 32))
    sequence, state = layers.GRU(32, return_sequences=True, return_state=True)(inputs)
    return keras.Model(inputs, layers.GRU(32)(sequence, initial_state=state))


def shared():
    layer, a, b = layers.GRU(32), keras.Input((6, 32)), keras.Input((6, 32))
    return keras.Model([a, b], layers.Subtract()([layer(a), layer(b)]))


def return_state():
    inputs = keras.Input((6, 32))
    return keras.Model(inputs, layers.LSTM(32, return_state=True)(inputs))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.gru = layers.GRU(32)
        self.head = layers.Dense(4)

    def call(self, x):
        return self.head(self.gru(x))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 6, 32), "float32"))
    return model


MODELS = {
    "gru": lambda: sequential(layers.GRU(32)),
    "gru_reset_before": lambda: sequential(layers.GRU(32, reset_after=False, return_sequences=True)),
    "gru_no_bias": lambda: sequential(layers.GRU(32, use_bias=False, return_sequences=True)),
    "gru_backwards": lambda: sequential(layers.GRU(32, go_backwards=True, return_sequences=True)),
    "gru_unrolled": lambda: sequential(layers.GRU(32, unroll=True)),
    "gru_dropout": lambda: sequential(layers.GRU(32, dropout=0.2, recurrent_dropout=0.2)),
    "simple_rnn": lambda: sequential(layers.SimpleRNN(32, return_sequences=True)),
    "simple_rnn_relu": lambda: sequential(layers.SimpleRNN(32, activation="relu")),
    "lstm": lambda: sequential(layers.LSTM(32, return_sequences=True)),
    "rnn_of_cells": lambda: sequential(layers.RNN([layers.GRUCell(32), layers.LSTMCell(32)], return_sequences=True)),
    "bidirectional_concat": lambda: bidirectional("concat", layers.GRU(32, return_sequences=True)),
    "bidirectional_sum": lambda: bidirectional("sum", layers.LSTM(32)),
    "bidirectional_mul": lambda: bidirectional("mul", layers.SimpleRNN(32)),
    "bidirectional_ave": lambda: bidirectional("ave", layers.GRU(32)),
    "bidirectional_none": lambda: bidirectional(None, layers.SimpleRNN(32, return_sequences=True)),
    "stacked": lambda: sequential(
        layers.GRU(32, return_sequences=True), layers.LSTM(48), layers.Dense(32, "relu"), layers.Dense(5, "softmax")
    ),
    "time_distributed": lambda: sequential(
        layers.GRU(32, return_sequences=True), layers.TimeDistributed(layers.Dense(32)), layers.Dense(64)
    ),
    "masking": lambda: sequential(layers.Masking(), layers.GRU(32, return_sequences=True), layers.LSTM(32)),
    "activations": lambda: sequential(
        layers.GRU(32, "elu", "hard_sigmoid", return_sequences=True),
        layers.Dense(32, "mish"),
        layers.Dense(32, "gelu"),
    ),
    "dense": lambda: keras.Sequential([keras.Input((32,)), layers.Dense(64, "relu"), layers.Dense(32)]),
    "convolution": lambda: sequential(
        layers.Conv1D(32, 3, padding="same"), layers.BatchNormalization(), layers.GRU(32)
    ),
    "embedding": lambda: keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(20, 32, mask_zero=True), layers.GRU(32)]
    ),
    "multi_io": multi_io,
    "dict_io": dict_io,
    "initial_state": initial_state,
    "shared": shared,
    "return_state": return_state,
    "subclassed": subclassed,
}
