"""What the export tests share: models with zero blocks, a way to run a file, a way to look into one."""

import importlib.util

import keras
import numpy as np

from keras_blocksparse.lite.flatbuffer import Flatbuffer

# Most tests need one proof; the quick runtime starts in a tenth of the time.
QUICK = ["ai_edge_litert"] if importlib.util.find_spec("ai_edge_litert") else ["tf.lite"]


def prune(model, block=(16, 16), keep=0.3, seed=0):
    """Zeroes random blocks of the matrices of a model, where blocks fit, and makes no bias zero; returns the model."""
    rng = np.random.default_rng(seed)
    values = []
    for weight, value in zip(model.weights, model.get_weights(), strict=True):
        rows, cols = block
        if "bias" in weight.path:
            value = rng.uniform(-0.5, 0.5, value.shape)
        elif value.ndim == 2 and value.shape[0] % rows == 0 and value.shape[1] % cols == 0:
            grid = (value.shape[0] // rows, value.shape[1] // cols)
            mask = np.zeros(grid[0] * grid[1])
            mask[: max(1, round(keep * mask.size))] = 1
            value = value * np.kron(rng.permutation(mask).reshape(grid), np.ones(block))
        values.append(value)
    model.set_weights(values)
    return model


def interpreter(path, delegates=True):
    """An interpreter of this process, for files that were proven in another; without XNNPACK if told."""
    if QUICK == ["ai_edge_litert"]:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    else:
        import tensorflow as tf

        Interpreter, OpResolverType = tf.lite.Interpreter, tf.lite.experimental.OpResolverType
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(str(path), experimental_op_resolver_type=OpResolverType.AUTO if delegates else plain)


def run_file(path, **inputs):
    """Outputs of the file's signature by name."""
    return interpreter(path).get_signature_runner()(**inputs)


def random_inputs(report, seed=7, high=20):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, high, shape).astype(dtype) if "int" in dtype else rng.normal(size=shape).astype(dtype)
        for name, (shape, dtype) in report.inputs.items()
    }


def fully_connected(path):
    """`(version, weight tensor, options)` of each FULLY_CONNECTED of a file."""
    file = Flatbuffer(path.read_bytes())
    return [
        (file.tree.operatorCodes[op.opcodeIndex].version, graph.tensors[op.inputs[1]], op.builtinOptions)
        for graph, op in file.operators("FULLY_CONNECTED")
    ]


def op_names(path):
    file = Flatbuffer(path.read_bytes())
    return [file.op_name(op) for graph in file.tree.subgraphs for op in graph.operators]


def encodings(report):
    """Encoding of each weight, by the last part of its Keras path."""
    return {w.name.rsplit("/", 1)[-1]: w.encoding for w in report.weights}


def sequential(*layers, features=32, timesteps=6):
    return keras.Sequential([keras.Input((timesteps, features)), *layers])
