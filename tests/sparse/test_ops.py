"""The TensorFlow ops: products and sequences against TensorFlow and Keras, gradients, graphs, and what is refused."""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_blocksparse
from keras_blocksparse.blocks import BlockGrid
from keras_blocksparse.sparse import BlockSparseMatrix, BlockStructure, _native, block_sparse_matmul, register_ops
from keras_blocksparse.sparse import ops as ops_module
from keras_blocksparse.sparse.ops import block_sparse_rnn

NATIVE = Path(keras_blocksparse.__file__).parent / "native"


def pruned(shape, block_size, gates=1, density=0.3, seed=0):
    rng = np.random.default_rng(seed)
    grid = BlockGrid(shape, block_size, gates)
    return (rng.standard_normal(shape) * grid.expand(rng.random(grid.grid_shape) < density)).astype(np.float32)


def random(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- products --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    block_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    more=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    gates=st.integers(1, 3),
    batch=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (40,)]),
    turned=st.booleans(),
    biased=st.booleans(),
    graph=st.booleans(),
)
def test_products(block_size, more, gates, batch, turned, biased, graph):
    w = pruned((block_size[0] + more[0], gates * (block_size[1] + more[1])), block_size, gates)
    matrix = BlockSparseMatrix.from_dense(w, block_size, gates)
    matrix = matrix.T if turned else matrix
    w = w.T if turned else w
    x, bias = random(*batch, len(w)), random(w.shape[1]) if biased else None

    def work():
        y = block_sparse_matmul(x, matrix, bias=bias)
        assert y.shape == (*batch, w.shape[1])
        return y

    expected = x.astype(np.float64) @ w + (0 if bias is None else bias)
    np.testing.assert_allclose((tf.function(work) if graph else work)(), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("int8", 2e-2)])
def test_short_weights(dtype, tolerance):
    w = pruned((64, 96), (8, 8))
    matrix, x = BlockSparseMatrix.from_dense(w, (8, 8), dtype=dtype), random(3, 64)
    y = block_sparse_matmul(x, matrix)
    np.testing.assert_allclose(y, matrix.matmul(x), rtol=1e-6)
    assert np.abs(y - x @ w).max() <= tolerance * np.abs(x @ w).max()
    values = tf.Variable(matrix.values)
    np.testing.assert_array_equal(block_sparse_matmul(x, matrix.structure, values), y)
    x = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = block_sparse_matmul(x, matrix)
    with pytest.raises(ValueError, match="for inference and have no gradients"):
        tape.gradient(y, x)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_first_and_second_order(turned, graph):
    w = pruned((20, 33), (8, 5), 3)
    matrix = BlockSparseMatrix.from_dense(w, (8, 5), 3)
    x, bias = tf.Variable(random(2, 4, 33 if turned else 20)), tf.Variable(random(20 if turned else 33))
    values, dense = tf.Variable(matrix.values), tf.Variable(w)

    def derivatives(product, weights):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(tf.sin(product()))
            first = inner.gradient(loss, [x, weights, bias])
            length = sum(tf.reduce_sum(tf.square(g)) for g in first)
        return first + outer.gradient(length, [x, weights, bias])

    def ours():
        return derivatives(lambda: block_sparse_matmul(x, matrix.T if turned else matrix, values, bias), values)

    def theirs():
        def product():
            kept = tf.broadcast_to(dense * tf.constant(w != 0, tf.float32), (2, *w.shape))
            return tf.matmul(x, kept, transpose_b=turned) + bias

        return derivatives(product, dense)

    positions = matrix.positions
    for result, expected in zip(tf.function(ours)() if graph else ours(), theirs(), strict=True):
        if result.shape == values.shape:
            assert not result.numpy()[positions < 0].any()
            result, expected = result.numpy()[positions >= 0], expected.numpy().ravel()[positions[positions >= 0]]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-3)


def test_shapes_that_are_not_known_yet():
    matrix = BlockSparseMatrix.from_dense(pruned((16, 24), (4, 4)), (4, 4))

    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec((None, None, None))])
    def work(x, y):
        assert block_sparse_matmul(x, matrix).shape.rank is None
        assert block_sparse_matmul(y, matrix).shape.as_list() == [None, None, 24]
        return block_sparse_matmul(x, matrix), block_sparse_matmul(y, matrix)

    x = random(2, 3, 16)
    for y in work(x, x):
        np.testing.assert_allclose(y, matrix.matmul(x), rtol=1e-6)


def test_no_blocks_at_all():
    matrix = BlockSparseMatrix.from_dense(np.zeros((16, 24)), (4, 4))
    values, x = tf.Variable(matrix.values), tf.Variable(random(2, 16))
    assert values.shape == (0,)
    with tf.GradientTape() as tape:
        y = block_sparse_matmul(x, matrix, values, np.ones(24, np.float32))
    np.testing.assert_array_equal(y, np.ones((2, 24)))
    dx, dvalues = tape.gradient(y, [x, values])
    assert not dx.numpy().any()
    assert dvalues.shape == (0,)


def test_nan_and_infinity_pass_through():
    w = np.ones((8, 8), np.float32)
    w[0, 0] = np.nan
    y = block_sparse_matmul(np.ones((1, 8), np.float32), BlockSparseMatrix.from_dense(w, (4, 4))).numpy()
    assert np.isnan(y[0, 0])
    np.testing.assert_array_equal(y[0, 1:], 8)


def test_from_many_threads_and_in_tf_data():
    matrix = BlockSparseMatrix.from_dense(pruned((64, 96), (8, 8)), (8, 8))
    x = random(40, 64)
    expected = matrix.matmul(x)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: block_sparse_matmul(x, matrix).numpy(), range(64)):
            np.testing.assert_array_equal(y, expected)
    data = tf.data.Dataset.from_tensor_slices(x).map(lambda row: block_sparse_matmul(row, matrix), tf.data.AUTOTUNE)
    np.testing.assert_allclose(np.stack(list(data.as_numpy_iterator())), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": np.ones((2, 9), np.float32)}, tf.errors.InvalidArgumentError, "must end with the matrix's 8 rows"),
        ({"x": np.float32(1)}, (ValueError, tf.errors.InvalidArgumentError), "at least rank 1|must end with"),
        ({"x": np.ones((2, 8))}, ValueError, "`x` must be float32. Received: dtype=float64"),
        ({"x": tf.ones((2, 8), tf.float16)}, ValueError, "`x` must be float32. Received: dtype=float16"),
        ({"values": np.ones(3, np.float32)}, tf.errors.InvalidArgumentError, "`values` must hold the"),
        ({"values": np.ones(3)}, ValueError, "`values` must be float32"),
        ({"values": np.ones((3, 3), np.float32)}, ValueError, "`values` must be float32 of shape"),
        ({"bias": np.ones(3, np.float32)}, tf.errors.InvalidArgumentError, "`bias` must have the matrix's 12 columns"),
        ({"bias": np.ones(12, np.int32)}, ValueError, "`bias` must be float32"),
        ({"matrix": np.ones((8, 12))}, ValueError, "`matrix` must be a BlockSparseMatrix"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    matrix = BlockSparseMatrix.from_dense(np.ones((8, 12), np.float32), (4, 4))
    with pytest.raises(error, match=message):
        block_sparse_matmul(**{"x": np.ones((2, 8), np.float32), "matrix": matrix, **arguments})


def test_a_structure_needs_values():
    matrix = BlockSparseMatrix.from_dense(np.ones((8, 12), np.float32), (4, 4))
    with pytest.raises(ValueError, match="give `values`"):
        block_sparse_matmul(np.ones((2, 8), np.float32), matrix.structure)


@pytest.mark.parametrize(
    "change", [lambda s: b"", lambda s: s[:-1], lambda s: s[:70] + b"x" + s[71:], lambda s: bytes(len(s))]
)
def test_a_graph_with_a_damaged_structure_fails_when_it_is_loaded(change):
    matrix = BlockSparseMatrix.from_dense(np.ones((8, 12), np.float32), (4, 4))
    with pytest.raises((tf.errors.DataLossError, tf.errors.InvalidArgumentError), match="packed"):
        register_ops().keras_blocksparse_matmul(
            x=tf.ones((2, 8)),
            values=matrix.values,
            bias=tf.zeros((0,)),
            structure=change(matrix.structure.packed),
            transposed=False,
        )


def test_xla_says_which_op_it_lacks():
    matrix = BlockSparseMatrix.from_dense(np.ones((8, 12), np.float32), (4, 4))
    with pytest.raises(Exception, match="KerasBlocksparse>Matmul"):
        tf.function(lambda x: block_sparse_matmul(x, matrix), jit_compile=True)(tf.ones((2, 8)))


# ---- sequences -------------------------------------------------------------------------------------------------------

LAYERS = {"gru": keras.layers.GRU, "lstm": keras.layers.LSTM, "simple_rnn": keras.layers.SimpleRNN}
GATES = {"gru": 3, "lstm": 4, "simple_rnn": 1}


def sequence(cell, units=12, inputs=10, block_size=(4, 4), dtype="float32", **options):
    """A Keras layer with pruned weights, and what block_sparse_rnn needs to do the same."""
    layer = LAYERS[cell](units, return_state=True, bias_initializer="glorot_normal", **options)
    layer.build((None, None, inputs))
    weights = layer.get_weights()
    weights[:2] = [pruned(w.shape, block_size, GATES[cell], seed=i) for i, w in enumerate(weights[:2])]
    layer.set_weights(weights)
    kernel, recurrent = (BlockSparseMatrix.from_dense(w, block_size, GATES[cell], dtype) for w in weights[:2])
    config = layer.get_config()
    arguments = {
        "cell": cell,
        "activation": config["activation"],
        "recurrent_activation": config.get("recurrent_activation", "linear"),
        "reset_after": config.get("reset_after", False),
        "go_backwards": config["go_backwards"],
        "return_sequences": config["return_sequences"],
        "zero_output_for_mask": config["zero_output_for_mask"],
    }
    return layer, kernel, recurrent, arguments


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("cell", "reset"), [("gru", True), ("gru", False), ("lstm", None), ("simple_rnn", None)])
def test_a_sequence_and_its_gradients_are_kerass(cell, reset, masked, return_sequences, graph):
    options = {} if reset is None else {"reset_after": reset}
    layer, kernel, recurrent, arguments = sequence(cell, return_sequences=return_sequences, **options)
    x = tf.Variable(random(3, 7, 10))
    states = [tf.Variable(random(3, 12, seed=s)) for s in range(2 if cell == "lstm" else 1)]
    mask = tf.constant(np.random.default_rng(3).random((3, 7)) < 0.6) if masked else None
    values = [tf.Variable(kernel.values), tf.Variable(recurrent.values)]
    bias = layer.cell.bias.value

    def gradients(run, weights):
        with tf.GradientTape() as tape:
            y, *final = run()
            loss = tf.reduce_sum(tf.sin(y)) + sum(tf.reduce_sum(f * f) for f in final)
        return y, *final, *tape.gradient(loss, [x, *states, *weights, bias])

    def ours(training):
        def run():
            matrices = kernel.structure, values[0], recurrent.structure, values[1]
            y, final = block_sparse_rnn(x, mask, states, *matrices, bias, **arguments, training=training)
            assert y.shape == ((3, 7, 12) if return_sequences else (3, 12))
            return y, *final

        return gradients(run, values)

    dense = [layer.cell.kernel.value, layer.cell.recurrent_kernel.value]
    theirs = gradients(lambda: layer(x, mask=mask, initial_state=list(states)), dense)
    for training in (False, True):
        results = tf.function(ours)(training) if graph else ours(training)
        for i, (ours_, theirs_) in enumerate(zip(results, theirs, strict=True)):
            for matrix, of_dense in zip((kernel, recurrent), dense, strict=True):
                if ours_.shape == matrix.values.shape and theirs_.shape == of_dense.shape:
                    positions = matrix.positions
                    assert not ours_.numpy()[positions < 0].any()
                    ours_ = ours_.numpy()[positions >= 0]
                    theirs_ = theirs_.numpy().ravel()[positions[positions >= 0]]
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-4, err_msg=f"result {i}, {training=}")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("int8", 0.05)])
def test_a_sequence_with_short_weights(dtype, tolerance):
    layer, kernel, recurrent, arguments = sequence("gru", dtype=dtype, return_sequences=True)
    x, h = tf.Variable(random(3, 7, 10)), np.zeros((3, 12), np.float32)
    matrices = kernel.structure, kernel.values, recurrent.structure, recurrent.values
    with tf.GradientTape() as tape:
        y, _ = block_sparse_rnn(x, None, [h], *matrices, layer.cell.bias.value, **arguments, training=True)
    np.testing.assert_allclose(y, layer(x)[0], atol=tolerance)
    with pytest.raises(ValueError, match="for inference and have no gradients"):
        tape.gradient(y, x)


def test_second_derivatives_of_a_sequence_are_refused():
    _, kernel, recurrent, arguments = sequence("gru")
    x, h = tf.Variable(random(3, 7, 10)), tf.zeros((3, 12))
    matrices = kernel.structure, kernel.values, recurrent.structure, recurrent.values
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y, _ = block_sparse_rnn(x, None, [h], *matrices, None, **arguments)
        dx = inner.gradient(y, x)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        outer.gradient(dx, x)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": np.ones((3, 7, 9), np.float32)},
            tf.errors.InvalidArgumentError,
            "`x` must have shape",
        ),
        ({"x": np.ones((3, 7, 10))}, ValueError, "`x` must be float32"),
        ({"x": np.ones((3, 0, 10), np.float32)}, tf.errors.InvalidArgumentError, "0 steps"),
        ({"mask": np.ones((3, 8), bool)}, tf.errors.InvalidArgumentError, "`mask` must have shape .3, 7"),
        ({"initial_states": [np.ones((3, 9), np.float32)]}, tf.errors.InvalidArgumentError, "`initial_h` must have"),
        ({"initial_states": []}, ValueError, "'gru' has 1 state"),
        ({"bias": np.ones(5, np.float32)}, tf.errors.InvalidArgumentError, "`bias` must hold 72 numbers"),
        ({"kernel_values": np.ones(5, np.float32)}, tf.errors.InvalidArgumentError, "`kernel_values` must hold"),
        ({"recurrent_values": np.ones(5, np.uint8)}, ValueError, "`recurrent_values` must be float32"),
        ({"cell": "rnn"}, ValueError, "`cell` must be one of"),
        ({"cell": "lstm", "initial_states": [np.ones((3, 12), np.float32)] * 2}, None, "this cell has 4 gates"),
        ({"activation": "softmax"}, ValueError, "Activations must be among"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(changes, error, message):
    _, kernel, recurrent, arguments = sequence("gru")
    given = {
        "x": random(3, 7, 10),
        "mask": None,
        "initial_states": [random(3, 12)],
        "kernel": kernel.structure,
        "kernel_values": kernel.values,
        "recurrent": recurrent.structure,
        "recurrent_values": recurrent.values,
        "bias": None,
        **arguments,
        **changes,
    }
    with pytest.raises(error or tf.errors.InvalidArgumentError, match=message):
        block_sparse_rnn(**given)


# ---- saved models, and libraries that do not fit ---------------------------------------------------------------------


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        cwd=NATIVE.parent.parent,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_a_saved_model_works_in_another_process_and_says_what_is_missing_without_the_package(tmp_path):
    matrix = BlockSparseMatrix.from_dense(pruned((16, 24), (4, 4)), (4, 4))
    module = tf.Module()
    module.values = tf.Variable(matrix.values)
    module.work = tf.function(
        lambda x: block_sparse_matmul(x, matrix, module.values), input_signature=[tf.TensorSpec((None, 16))]
    )
    tf.saved_model.save(module, str(tmp_path / "model"))
    x = random(2, 16)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", matrix.matmul(x))
    code = f"""
        import numpy as np, tensorflow as tf
        {{}}
        model = tf.saved_model.load({str(tmp_path / "model")!r})
        x, y = (np.load({str(tmp_path)!r} + name) for name in ("/x.npy", "/y.npy"))
        print("largest error", np.abs(model.work(tf.constant(x)) - y).max())
    """
    out = run_python(code.format("import keras_blocksparse as kbs; kbs.register_ops()"))
    assert float(re.search("largest error (.*)", out)[1]) < 1e-5
    assert "'KerasBlocksparse>Matmul'" in run_python(code.format(""))


def test_an_instruction_set_that_the_cpu_lacks_is_an_error_of_the_op():
    out = run_python(
        """
        import numpy as np, tensorflow as tf, keras_blocksparse as kbs
        matrix = kbs.BlockSparseMatrix.from_dense(np.eye(8), (4, 4))
        try:
            kbs.block_sparse_matmul(np.ones((2, 8), "float32"), matrix)
        except tf.errors.UnimplementedError as error:
            print("UnimplementedError:", error)
        """,
        KBS_ISA="avx9000",
    )
    assert re.search("UnimplementedError: .*KBS_ISA.*avx9000", out)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "native library cannot be loaded|is missing"),
        (["libkbs.so"], "native ops' library is missing"),
        (["libkbs.so", "foreign"], "cannot load|do not work with"),
    ],
)
def test_a_library_that_is_missing_or_foreign_is_an_import_error(files, message, tmp_path):
    for name in files:
        source = NATIVE / "lib" / ("libkbs.so" if name == "foreign" else name)
        shutil.copy(source, tmp_path / ("libkbs_tf.so" if name == "foreign" else name))
    if "foreign" in files:
        (tmp_path / "libkbs_tf.so").write_bytes(b"\x7fELF but no more than that")
    out = run_python(
        """
        import keras_blocksparse as kbs
        try:
            kbs.register_ops()
        except ImportError as error:
            print("ImportError:", error)
        """,
        KBS_LIBRARY=str(tmp_path / "libkbs.so"),
    )
    assert re.search(f"ImportError: .*({message})", out)


def test_a_second_copy_of_the_ops_is_refused(tmp_path):
    for name in ("libkbs.so", "libkbs_tf.so"):
        shutil.copy(NATIVE / "lib" / name, tmp_path)
    out = run_python(
        f"""
        import tensorflow as tf
        tf.load_op_library({str(tmp_path / "libkbs_tf.so")!r})
        import keras_blocksparse as kbs
        try:
            kbs.register_ops()
        except ImportError as error:
            print("ImportError:", error)
        """
    )
    assert "ImportError: Another copy" in out


def test_a_tensorflow_that_is_too_old_is_an_import_error(monkeypatch):
    monkeypatch.setattr(ops_module.tf, "__version__", "2.15.1")
    with pytest.raises(ImportError, match="need TensorFlow 2.17 or newer. Received: 2.15.1"):
        ops_module._load.__wrapped__()


def test_our_declarations_are_those_of_this_tensorflow():
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", f"-I{tf.sysconfig.get_include()}", f"-I{NATIVE / 'tf'}",
         str(Path(__file__).parents[1] / "native" / "tf_headers.cc")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_structure_is_not_a_matrix():
    structure = BlockSparseMatrix.from_dense(np.ones((8, 12), np.float32), (4, 4)).structure
    assert isinstance(structure, BlockStructure)
    with pytest.raises(ValueError, match="truncated"):
        BlockSparseMatrix(structure.packed)
    assert _native.get_isa()
