"""From a Keras model to a dense TFLite file: shapes, tracing, TensorFlow's converter.

The converter is given a concrete function with static shapes. That is what keeps recurrent layers as one WHILE of
builtin operators: a dynamic batch ends in TensorList operators no wheel can run, and handing over a Keras 3 model
beside the function breaks its variables.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_blocksparse.lite.errors import ExportError


@dataclass(frozen=True)
class InputSpec:
    """One input of the exported function: its name in the signature, static shape and dtype name.

    `time_axis` tells whether axis 1 counts timesteps (an input of rank 3 or more, or token ids of rank 2).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    time_axis: bool


@dataclass
class Traced:
    """A traced model.

    Attributes:
        function: the concrete function; takes the inputs, then the states, returns the outputs, then the new states.
        inputs: specs of the inputs, without the states.
        states: specs of the incoming states; empty unless streaming.
        output_names: names of the outputs, without the states.
        state_outputs: name of the outgoing state for each of `states`.
    """

    function: Any
    inputs: list[InputSpec]
    states: list[InputSpec] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    state_outputs: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> list[Any]:
        """The symbolic outputs, states last."""
        return list(self.function.structured_outputs)


# ---- what the model is


def check_model(model: Any) -> None:
    """Raises unless `model` is a built Keras model on the TensorFlow backend with finite float weights.

    Raises:
        TypeError: not a Keras model.
        ValueError: not built, another Keras backend, weights that are NaN or infinite, or of a dtype other than
            float32.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"export_tflite takes a keras.Model. Received: model={model!r} of type {type(model).__name__}")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "export_tflite needs Keras on the TensorFlow backend (KERAS_BACKEND=tensorflow). "
            f"Received: keras.backend.backend()={keras.backend.backend()!r}"
        )
    if not model.built:
        raise ValueError(
            "export_tflite needs a model that is built: call it on data or build(input_shape) first. "
            f"Received: {model!r}"
        )
    for layer in model._flatten_layers():
        if hasattr(layer, "kernel_structure"):
            raise ValueError(
                f"Layer {layer.name!r} is block-sparse, and TFLite has no such operation. Export kbs.to_dense(model), "
                "whose zeros are kept out of the file too"
            )
        policy = getattr(getattr(layer, "dtype_policy", None), "name", "float32")
        if policy.startswith(("int", "float8")):
            raise ValueError(
                f"Layer {layer.name!r} is quantized by Keras (dtype policy {policy!r}); "
                "export the float model with quantize='int8'."
            )
    for weight in model.weights:
        if weight.dtype in ("float16", "bfloat16", "float64"):
            raise ValueError(
                f"export_tflite takes float32 weights (a mixed precision policy has those). "
                f"Received: {weight.path} of dtype {weight.dtype}"
            )
        if weight.dtype == "float32" and not np.isfinite(np.asarray(weight)).all():
            raise ValueError(
                f"Weight {weight.path!r} holds NaN or infinite values. Received: shape={tuple(weight.shape)}"
            )


def input_specs(model: Any, batch_size: int, timesteps: int | None, streaming: bool) -> list[InputSpec]:
    """Static shape of every input.

    A model with one input calls it `x`; with several, each has the name of its `keras.Input`.

    Args:
        model: a built Keras model.
        batch_size: takes the place of the batch axis.
        timesteps: takes the place of a time axis (axis 1) of None. None means that the model fixes it.
        streaming: the time axis becomes `timesteps` frames, whatever the model says.

    Raises:
        ValueError: a shape that stays open, or that contradicts the arguments.
    """
    if getattr(model, "inputs", None):
        shapes = [(t._keras_history.operation.name, tuple(t.shape), t.dtype) for t in model.inputs]
    else:
        config = model.get_build_config() or {}
        shape = config.get("input_shape")
        if not isinstance(shape, (tuple, list)) or not all(d is None or isinstance(d, int) for d in shape):
            raise ValueError(
                "The inputs of a subclassed model are known only if it was built with one tensor, by calling it or by "
                f"build(input_shape). Received: build config {config}"
            )
        # What the model was built with says nothing about the batch, and little about the time, it will run with.
        shapes = [("x", (None, timesteps or shape[1], *shape[2:]) if len(shape) > 1 else (None,), "float32")]

    specs = []
    for name, shape, dtype in shapes:
        if not shape:
            raise ValueError(f"Input {name!r} has no batch axis. Received: shape={shape}")
        has_time = len(shape) > 2 or (len(shape) == 2 and (shape[1] is None or "int" in dtype))
        # Keras writes the batch of the first data into a Sequential model without an Input: only states depend on it.
        if shape[0] not in (None, batch_size) and any(getattr(layer, "stateful", False) for layer in layers_of(model)):
            raise ValueError(
                f"Input {name!r} has shape {shape}: its batch is fixed, for the model is stateful. "
                f"Received: batch_size={batch_size}"
            )
        static = [batch_size, *shape[1:]]
        if has_time and timesteps is not None:
            if not streaming and shape[1] not in (None, timesteps):
                raise ValueError(
                    f"Input {name!r} has shape {shape}: its time axis is fixed. Received: timesteps={timesteps}"
                )
            static[1] = timesteps
        if has_time and static[1] is None:
            raise ValueError(
                f"Input {name!r} has shape {shape}: its time axis is open and a TFLite file needs it static. "
                "Pass timesteps= to export_tflite."
            )
        if None in static:
            raise ValueError(f"Input {name!r} has shape {shape}: only the batch and the time axis may be open.")
        specs.append(InputSpec(name if len(shapes) > 1 else "x", tuple(static), dtype, has_time))
    if timesteps is not None and not any(s.time_axis for s in specs):
        raise ValueError(
            f"The model has no time axis: inputs {[s.shape for s in specs]}. Received: timesteps={timesteps}"
        )
    return specs


def layers_of(model: Any) -> list[Any]:
    """All layers of a model at any depth, cells included, the model itself first."""
    return list(model._flatten_layers())


def call_model(model: Any, tensors: list[Any], streaming: bool = False) -> tuple[list[Any], list[str]]:
    """Calls the model for inference on a flat list of inputs; returns the flat outputs and their names.

    When streaming, the number of timesteps may be another than the model's inputs have.

    One output is called `y`; several have the keys of the model's output dict, else the names Keras gives them.
    """
    import tensorflow as tf

    struct = getattr(model, "_inputs_struct", None)
    if struct is not None:
        args = tf.nest.pack_sequence_as(struct, tensors)
    else:
        args = tensors[0] if len(tensors) == 1 else tensors
    # A functional model insists on the shapes of its inputs, in __call__ and not in call.
    run = model.call if streaming and struct is not None else model
    result = run(args, training=False)
    outputs = tf.nest.flatten(result)
    if len(outputs) == 1:
        names = ["y"]
    elif isinstance(result, dict):
        names = sorted(result)
    else:
        names = list(getattr(model, "output_names", None) or ())
    if len(names) != len(outputs) or len(set(names)) != len(names):
        names = [f"y_{i}" for i in range(len(outputs))]
    return outputs, names


# ---- running a model otherwise than its owner does


@contextlib.contextmanager
def plain_inference(model: Any) -> Iterator[None]:
    """Lets every layer compute in float32 and without dropout while the context lasts.

    Under a mixed policy the variables are float32 already; only the arithmetic would be 16 bit, which TFLite has no
    kernels for. And recurrent cells draw their dropout masks at inference too, if only to leave them unused: an
    operation that changes a variable.
    """
    import keras

    changed: list[tuple[Any, str, Any]] = []

    def change(layer: Any, name: str, value: Any) -> None:
        changed.append((layer, name, getattr(layer, name)))
        setattr(layer, name, value)

    try:
        for layer in layers_of(model):
            if getattr(layer, "compute_dtype", "float32") in ("float16", "bfloat16"):
                change(layer, "dtype_policy", keras.DTypePolicy("float32"))
            # Up to Keras 3.8 or so the casts between layers are operations of the model's graph.
            for operation in getattr(getattr(layer, "_functional", None) or layer, "operations", ()):
                if type(operation).__name__ == "Cast" and operation.dtype in ("float16", "bfloat16"):
                    change(operation, "dtype", "float32")
            for rate in ("dropout", "recurrent_dropout"):
                if isinstance(vars(layer).get(rate), float) and vars(layer)[rate] > 0:
                    change(layer, rate, 0.0)
        yield
    finally:
        for layer, name, value in changed:
            setattr(layer, name, value)


@dataclass
class StateIO:
    """States of the recurrent layers while a model is called for streaming.

    `feed(layer, initial_state, mask)` gives the initial states of a layer's call, in place of those the model passes;
    `store(layer, states)` takes the final ones.
    """

    feed: Callable[[Any, Any, Any], list[Any]]
    store: Callable[[Any, list[Any]], None]


@contextlib.contextmanager
def external_states(model: Any, io: StateIO) -> Iterator[None]:
    """While the context lasts, recurrent layers begin at the states `io` feeds and hand it the final ones."""
    layers = streaming_layers(model)
    stateful = [layer.stateful for layer in layers]

    def hooks(layer: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        call, inner_loop = layer.call, layer.inner_loop

        def fed_call(sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
            return call(sequences, initial_state=io.feed(layer, initial_state, mask), mask=mask, training=training)

        def stored_inner_loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
            last_output, outputs, states = inner_loop(sequences, initial_state, mask, training)
            io.store(layer, states)
            return last_output, outputs, states

        return fed_call, stored_inner_loop

    try:
        for layer in layers:
            # Past Keras' own __setattr__: these are not state of the layer and must not be tracked.
            layer.__dict__["call"], layer.__dict__["inner_loop"] = hooks(layer)
            layer.stateful = False
        yield
    finally:
        for layer, was in zip(layers, stateful, strict=True):
            layer.__dict__.pop("call", None)
            layer.__dict__.pop("inner_loop", None)
            layer.stateful = was


def streaming_layers(model: Any) -> list[Any]:
    """The recurrent layers of a model that can stream.

    Raises:
        ValueError: the model has none, or has one that needs the future (Bidirectional, go_backwards) or runs inside
        TimeDistributed.
    """
    import keras

    found = []
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.Bidirectional):
            raise ValueError(
                f"streaming=True cannot export layer {layer.name!r}: "
                "a Bidirectional layer needs the end of the sequence first."
            )
        if isinstance(layer, keras.layers.TimeDistributed) and isinstance(layer.layer, keras.layers.RNN):
            raise ValueError(
                f"streaming=True cannot export layer {layer.name!r}: it starts its recurrent layer anew at each step."
            )
        if isinstance(layer, keras.layers.RNN):
            if layer.go_backwards:
                raise ValueError(f"streaming=True cannot export layer {layer.name!r}: it has go_backwards=True.")
            found.append(layer)
    if not found:
        raise ValueError(f"streaming=True needs a model with a recurrent layer. Received: {model!r}")
    return found


# ---- tracing


def trace(model: Any, specs: list[InputSpec], streaming: bool) -> Traced:
    """Traces the model with static shapes, in float32.

    Args:
        model: a built Keras model.
        specs: its inputs, from `input_specs`.
        streaming: states become inputs and outputs of the function.

    Raises:
        ValueError: a stateful layer without streaming, or a layer that cannot stream.
    """
    if streaming:
        return _trace_streaming(model, specs)
    for layer in layers_of(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"Layer {layer.name!r} is stateful: a TFLite file would keep the state where reset_all_variables() "
                "cannot reach it. Use streaming=True, which makes the states inputs and outputs, "
                "or export a copy with stateful=False."
            )
    import tensorflow as tf

    traced = Traced(None, specs)

    def function(*tensors: Any) -> list[Any]:
        outputs, traced.output_names = call_model(model, list(tensors))
        return _named(outputs)

    with plain_inference(model):
        traced.function = tf.function(function, autograph=False).get_concrete_function(*_tensor_specs(specs))
    _refuse_assignments(traced.function)
    return traced


def _trace_streaming(model: Any, specs: list[InputSpec]) -> Traced:
    import tensorflow as tf

    layers = streaming_layers(model)
    shapes = {id(layer): _state_shapes(layer, specs[0].shape[0]) for layer in layers}
    short = _state_names(layers, shapes)
    traced = Traced(None, specs)
    for layer in layers:
        for name, shape in zip(short[id(layer)], shapes[id(layer)], strict=True):
            traced.states.append(InputSpec(f"{name}_in", shape, "float32", False))
            traced.state_outputs.append(f"{name}_out")

    def function(*tensors: Any) -> list[Any]:
        fed = list(tensors[len(specs) :])
        incoming: dict[int, list[Any]] = {}
        outgoing: dict[int, list[Any]] = {}
        for layer in layers:
            incoming[id(layer)], fed = fed[: len(shapes[id(layer)])], fed[len(shapes[id(layer)]) :]

        def feed(layer: Any, initial_state: Any, mask: Any) -> list[Any]:
            if initial_state is not None:
                refuse(
                    layer, "the model computes its initial_state, which a stream would do once and not at every call"
                )
            if mask is not None and not layer.zero_output_for_mask:
                refuse(
                    layer,
                    "for a masked frame it repeats its output of the frame before, which may lie in the call before; "
                    "build it with zero_output_for_mask=True",
                )
            if id(layer) not in incoming:
                refuse(layer, "the model calls it more than once")
            return tf.nest.pack_sequence_as(_as_list(layer.state_size), incoming.pop(id(layer)))

        def store(layer: Any, states: list[Any]) -> None:
            outgoing[id(layer)] = tf.nest.flatten(states)

        with external_states(model, StateIO(feed, store)):
            outputs, traced.output_names = call_model(model, list(tensors[: len(specs)]), streaming=True)
        for layer in layers:
            if id(layer) not in outgoing:
                refuse(layer, "the model does not call it")
        return _named([*outputs, *(s for layer in layers for s in outgoing[id(layer)])])

    refusals: list[str] = []

    def refuse(layer: Any, why: str) -> None:
        refusals.append(f"streaming=True cannot export layer {layer.name!r}: {why}.")
        raise ValueError(refusals[-1])

    try:
        with plain_inference(model):
            traced.function = tf.function(function, autograph=False).get_concrete_function(
                *_tensor_specs([*specs, *traced.states])
            )
    except Exception as error:
        # Keras wraps what is raised inside a layer's call in the arguments of every layer around it.
        if refusals:
            raise ValueError(refusals[0]) from None
        shapes_seen = [s.shape for s in specs]
        raise ValueError(f"streaming=True calls the model on {shapes_seen}, which it does not take: {error}") from error
    _refuse_assignments(traced.function)
    return traced


def _refuse_assignments(function: Any) -> None:
    names = [op.name for op in function.graph.get_operations() if op.type.startswith("Assign")]
    if names:
        raise ExportError(
            f"The model changes variables when it is called for inference ({names[0]}), "
            "which the exported file would not do."
        )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _state_shapes(layer: Any, batch_size: int) -> list[tuple[int, ...]]:
    import tensorflow as tf

    return [tuple(int(d) for d in s.shape) for s in tf.nest.flatten(_as_list(layer.get_initial_state(batch_size)))]


def _state_names(layers: list[Any], shapes: dict[int, list[tuple[int, ...]]]) -> dict[int, list[str]]:
    """`h` (and `c` of an LSTM), with the layer's name in front where the model has several recurrent layers."""
    import keras

    names = {}
    for layer in layers:
        count = len(shapes[id(layer)])
        if isinstance(layer, keras.layers.LSTM):
            short = ["h", "c"]
        else:
            short = ["h"] if count == 1 else [f"h{i}" for i in range(count)]
        prefix = f"{layer.name}_" if len(layers) > 1 else ""
        names[id(layer)] = [prefix + s for s in short]
    flat = [n for short in names.values() for n in short]
    if len(set(flat)) != len(flat):
        raise ValueError(
            f"streaming=True needs recurrent layers of distinct names. Received: {[layer.name for layer in layers]}"
        )
    return names


def _named(outputs: list[Any]) -> list[Any]:
    # An output that is an input as it came would lose its place in the subgraph's output list.
    import tensorflow as tf

    return [tf.identity(tf.convert_to_tensor(t), name=f"output_{i}") for i, t in enumerate(outputs)]


def _tensor_specs(specs: list[InputSpec]) -> list[Any]:
    import tensorflow as tf

    return [tf.TensorSpec(s.shape, s.dtype, name=f"input_{i}") for i, s in enumerate(specs)]


# ---- converting


def to_tflite(traced: Traced, quantize: str | None, marked: bool = False) -> bytes:
    """Runs TensorFlow's converter and returns the bytes of a dense file of builtin operators.

    Args:
        traced: from `trace`.
        quantize: None, `"int8"` (dynamic range: int8 weights, float activations) or `"float16"` (weights only).
        marked: the function holds the marks of `fuse.py`, which are no builtin operators.

    Raises:
        ExportError: the converter failed, or an operator has no TFLite builtin; the message names it.
    """
    import tensorflow as tf

    with _quiet():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.function])
    # Writes a step's output in place. Without it each step of a loop copies the whole output sequence twice.
    converter._experimental_enable_dynamic_update_slice = True
    converter.allow_custom_ops = marked
    if quantize is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        # A scale per output channel raises the version of FULLY_CONNECTED beyond what older runtimes load; those that
        # load it as an older version take no notice of the scales and compute wrong numbers.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    try:
        with _quiet(), _without_native_log() if marked else contextlib.nullcontext():
            return converter.convert()
    except Exception as error:
        raise ExportError(_converter_message(str(error))) from error


def refuse_custom_ops(names: list[str]) -> None:
    """Raises `ExportError` if a converted file has operators that are not builtin; names them."""
    if names:
        raise ExportError(_no_builtin(names))


def _no_builtin(names: list[str]) -> str:
    ops = ", ".join(sorted({name.removeprefix("Flex") for name in names}))
    return f"The model uses operations that have no TFLite builtin: {ops}. A stock interpreter cannot run them."


def _converter_message(text: str) -> str:
    """What is wrong, from the pages the converter writes."""
    named = re.findall(r"(?:TF Select ops|Flex ops|Custom ops|Op builtin_code)[^:\n]*: *([\w, ]+)", text)
    ops = [op.strip() for line in named for op in line.split(",") if op.strip()]
    if ops:
        return _no_builtin(ops)
    return f"TensorFlow's TFLite converter failed: {text.strip()[:2000]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the converter's advice to pass a trackable object, which must not be followed for Keras 3."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _without_native_log() -> Iterator[None]:
    """Keeps the converter's native code from telling users to implement our marks as custom operators.

    It writes to the file descriptor, past `sys.stderr`. Errors come as exceptions and are not lost.
    """
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
