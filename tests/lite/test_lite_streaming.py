"""`streaming=True`: states go in and come out, and frame by frame gives what the whole sequence gives."""

import keras
import numpy as np
import pytest
from keras import layers
from lite_helpers import QUICK, interpreter, prune, sequential

from keras_blocksparse.lite import ExportError, export_tflite


def stream(path, report, frames, chunk):
    """Feeds an array (batch, time, features) to the file chunk by chunk, the states as the report says."""
    run = interpreter(path).get_signature_runner()
    states = {name: np.zeros(report.inputs[name][0], np.float32) for name in report.states.values()}
    chunks = []
    for start in range(0, frames.shape[1], chunk):
        out = run(x=frames[:, start : start + chunk], **states)
        states = {incoming: out[outgoing] for outgoing, incoming in report.states.items()}
        chunks.append(out["y"])
    return chunks


def export(model, path, **options):
    return export_tflite(model, path, streaming=True, runtimes=QUICK, measure_latency=False, **options)


MODELS = {
    "gru": (lambda: sequential(layers.GRU(32, return_sequences=True)), ["h"]),
    "gru_reset_before": (lambda: sequential(layers.GRU(32, reset_after=False, return_sequences=True)), ["h"]),
    "simple_rnn": (lambda: sequential(layers.SimpleRNN(32, return_sequences=True), layers.Dense(8)), ["h"]),
    "lstm": (lambda: sequential(layers.LSTM(32, return_sequences=True)), ["h", "c"]),
    "open_time": (lambda: sequential(layers.GRU(32, return_sequences=True), timesteps=None), ["h"]),
    "cells": (
        lambda: sequential(layers.RNN([layers.GRUCell(32), layers.LSTMCell(32)], return_sequences=True)),
        ["h0", "h1", "h2"],
    ),
    "stacked": (
        lambda: sequential(
            layers.GRU(32, return_sequences=True, name="first"),
            layers.LSTM(48, return_sequences=True, name="second"),
            layers.Dense(5),
        ),
        ["first_h", "second_h", "second_c"],
    ),
    "masking": (
        lambda: sequential(layers.Masking(), layers.GRU(32, return_sequences=True, zero_output_for_mask=True)),
        ["h"],
    ),
    "pointwise_convolution": (
        lambda: sequential(layers.Conv1D(32, 1), layers.GRU(32, return_sequences=True)),
        ["h"],
    ),
}


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("kind", MODELS)
def test_frame_by_frame_is_the_whole_sequence(kind, quantize, tmp_path):
    make, states = MODELS[kind]
    model, path = prune(make()), tmp_path / "stream.tflite"
    report = export(model, path, quantize=quantize)
    assert report.streaming
    assert report.states == {f"{s}_out": f"{s}_in" for s in states}
    assert list(report.inputs) == ["x", *report.states.values()]
    assert list(report.outputs) == ["y", *report.states]
    assert report.inputs["x"][0] == (1, 1, 32)
    frames = np.random.default_rng(1).normal(size=(1, 6, 32)).astype("float32")
    frames[:, 3] = 0
    expected = np.asarray(model(frames))
    got = np.concatenate(stream(path, report, frames, 1), axis=1)
    assert np.std(expected, axis=1).max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-5 if quantize is None else 0.08)


def test_chunks_and_batches(tmp_path):
    model, path = prune(sequential(layers.GRU(32, return_sequences=True))), tmp_path / "stream.tflite"
    report = export(model, path, timesteps=3, batch_size=2)
    assert report.inputs == {"x": ((2, 3, 32), "float32"), "h_in": ((2, 32), "float32")}
    frames = np.random.default_rng(1).normal(size=(2, 6, 32)).astype("float32")
    got = np.concatenate(stream(path, report, frames, 3), axis=1)
    np.testing.assert_allclose(got, model(frames), atol=2e-5)


def test_without_sequences_each_call_answers_for_the_frames_so_far(tmp_path):
    model, path = prune(sequential(layers.GRU(32), layers.Dense(5))), tmp_path / "stream.tflite"
    report = export(model, path)
    frames = np.random.default_rng(1).normal(size=(1, 6, 32)).astype("float32")
    for count, got in enumerate(stream(path, report, frames, 1), start=1):
        np.testing.assert_allclose(got, model(frames[:, :count]), atol=2e-5)


def test_a_stateful_layer_streams_by_its_states(tmp_path):
    model = keras.Sequential(
        [keras.Input(batch_shape=(2, 1, 32)), layers.GRU(32, return_sequences=True, stateful=True)]
    )
    path, frames = tmp_path / "stream.tflite", np.random.default_rng(1).normal(size=(2, 4, 32)).astype("float32")
    report = export(prune(model), path, batch_size=2)
    assert model.layers[0].stateful
    got = np.concatenate(stream(path, report, frames, 1), axis=1)
    model.layers[0].reset_states()
    expected = np.concatenate([model(frames[:, t : t + 1]) for t in range(4)], axis=1)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def computed_state():
    a, b = keras.Input((None, 32)), keras.Input((32,))
    return keras.Model([a, b], layers.GRU(32)(a, initial_state=b))


def called_twice():
    layer, a = layers.GRU(32, return_sequences=True), keras.Input((None, 32))
    return keras.Model(a, layer(layer(a)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sequential(layers.Bidirectional(layers.GRU(32))), "end of the sequence"),
        (lambda: sequential(layers.GRU(32, go_backwards=True)), "go_backwards=True"),
        (lambda: sequential(layers.Dense(32)), "recurrent layer"),
        (
            lambda: sequential(layers.GRU(32, return_sequences=True), layers.Flatten(), layers.Dense(3)),
            "frames at a time|does not take",
        ),
        (computed_state, "initial_state"),
        (lambda: sequential(layers.Masking(), layers.GRU(32, return_sequences=True)), "zero_output_for_mask=True"),
        (called_twice, "more than once"),
    ],
)
def test_what_cannot_stream_is_refused_with_the_reason(make, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export(prune(make()), tmp_path / "stream.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_convolution_over_time_is_found_out(quantize, tmp_path):
    model = prune(sequential(layers.Conv1D(32, 3, padding="same"), layers.GRU(32, return_sequences=True)))
    with pytest.raises(ExportError, match="convolution"):
        export(model, tmp_path / "stream.tflite", quantize=quantize)
    assert list(tmp_path.iterdir()) == []
