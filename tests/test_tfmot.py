"""tfmot's own objects in ours: its schedules work as they are, and give what ours give.

tfmot is not a dependency, needs tf-keras, and sets TF_USE_LEGACY_KERAS for its process, so everything here runs in a
subprocess. Set KBS_TFMOT_PYTHON to a Python that has tensorflow-model-optimization; without one, and without tfmot in
the running environment, these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _helpers import ROOT

PYTHON = os.environ.get("KBS_TFMOT_PYTHON") or sys.executable

pytestmark = pytest.mark.skipif(
    "KBS_TFMOT_PYTHON" not in os.environ and importlib.util.find_spec("tensorflow_model_optimization") is None,
    reason="tensorflow-model-optimization is not installed (set KBS_TFMOT_PYTHON to a Python that has it)",
)


def run(code: str, *arguments: str) -> str:
    tests = Path(__file__).resolve().parent
    done = subprocess.run(
        [PYTHON, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tests)!r}]\n{code}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_our_schedules_give_what_tfmots_give():
    code = """
import numpy as np
import keras_blocksparse as kbs
from tensorflow_model_optimization.sparsity import keras as tfmot
for initial, final, begin, end, power, frequency in [
    (0.0, 0.9, 0, 100, 3, 10), (0.5, 0.8, 10, 60, 3, 25), (0.2, 0.7, 5, 45, 1, 20), (0.9, 0.1, 0, 12, 2, 4)
]:
    theirs = tfmot.PolynomialDecay(initial, final, begin, end, power=power, frequency=frequency)
    ours = kbs.PolynomialDecay(
        initial_sparsity=initial, final_sparsity=final, begin_step=begin, end_step=end, power=power, frequency=frequency
    )
    for step in range(end + 50):
        fires, share = (np.asarray(v) for v in theirs(step))
        assert ours(step)[0] == bool(fires) or step == end, (step, "only the end is ours alone")
        if begin <= step <= end:
            np.testing.assert_allclose(ours(step)[1], share, rtol=1e-5)
    assert ours(end)[0]
theirs, ours = tfmot.ConstantSparsity(0.5, 10, 50, 20), kbs.ConstantSparsity(
    target_sparsity=0.5, begin_step=10, end_step=50, frequency=20)
assert [bool(np.asarray(theirs(s)[0])) for s in range(60)] == [ours(s)[0] for s in range(60)]
print("same")
"""
    assert run(code).split()[-1] == "same"


MODEL = """
import os, warnings
import numpy as np, keras
assert keras.__version__.startswith("3")
import keras_blocksparse as kbs
from tensorflow_model_optimization.sparsity import keras as tfmot
from _helpers import assert_sparsity, pruned_weights, sequence_data
model = keras.Sequential([keras.Input((4, 8)), keras.layers.GRU(12), keras.layers.Dense(3)])
x, y = sequence_data()
"""


@pytest.mark.parametrize(("frequency", "end"), [(2, 6), (3, 7), (100, 6)])
def test_a_tfmot_schedule_works_as_it_is(frequency, end):
    # 7 lies off tfmot's grid of 0, 3, 6: tfmot itself would stop at the sparsity of step 6
    code = f"""
schedule = tfmot.PolynomialDecay(0.0, 0.75, 0, {end}, frequency={frequency})
kbs.prune_low_magnitude_block(model, schedule, (4, 4), filters="gru")
model = keras.models.clone_model(model)      # the constraint passes it by reference
model.compile("adam", "mse")
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
for variable, gates in pruned_weights(model):
    assert_sparsity(variable, (4, 4), 0.75, gates)
print("reached")
"""
    assert run(MODEL + code).split()[-1] == "reached"


def test_a_tfmot_schedule_that_does_not_fit_warns_with_its_numbers():
    code = """
schedule = tfmot.PolynomialDecay(0.0, 0.75, 100, 200, frequency=10)
kbs.prune_low_magnitude_block(model, schedule, (4, 4), filters="gru")
model.compile("adam", "mse")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[kbs.UpdatePruningStep()])
told = [str(w.message) for w in caught if "never fires" in str(w.message)]
assert len(told) == 1 and "begin_step=100" in told[0] and "step 8" in told[0], told
print("warned")
"""
    assert run(MODEL + code).split()[-1] == "warned"


def test_a_layer_that_derives_from_tfmots_prunable_layer_works_as_it_is():
    code = """
class Mine(keras.layers.Layer, tfmot.PrunableLayer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 8), name="w")
        self.v = self.add_weight(shape=(shape[-1], 8), name="v")
    def call(self, x):
        return x @ self.w + x @ self.v
    def get_prunable_weights(self):
        return [self.w]

layer = Mine()
model = keras.Sequential([keras.Input((8,)), layer])
kbs.prune_low_magnitude_block(model, tfmot.ConstantSparsity(0.5, 0, frequency=1), (4, 4))
model.compile("sgd", "mse")
model.fit(x[:, 0], x[:, 1], batch_size=8, verbose=0, callbacks=[kbs.UpdatePruningStep()])
assert_sparsity(layer.w, (4, 4), 0.5)
assert layer.v.numpy().all()
print("pruned")
"""
    assert run(MODEL + code).split()[-1] == "pruned"


@pytest.mark.parametrize("score", ["MAX", "AVG"])
def test_masks_are_those_of_tfmots_pooling_where_blocks_divide(score):
    code = """
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl
from keras_blocksparse.blocks import BlockGrid, keep_blocks
random = np.random.default_rng(0)
for block in [(1, 1), (2, 2), (4, 4), (8, 4), (4, 1)]:
    for sparsity in (0.25, 0.5, 0.75):
        weight = random.normal(size=(16, 24)).astype("float32")
        theirs = pruning_impl.Pruning(
            pruning_vars=[], training_step_fn=lambda: 0, pruning_schedule=lambda step: (True, tf.constant(sparsity)),
            block_size=block, block_pooling_type=sys.argv[1])
        _, mask = theirs._maybe_update_block_mask(tf.constant(np.abs(weight)))
        grid = BlockGrid(weight.shape, block)
        scores = grid.scores(weight, {"MAX": "max", "AVG": "mean"}[sys.argv[1]])[0]
        ours = grid.expand(keep_blocks(scores, grid.elements, sparsity)[None])
        assert np.array_equal(ours, np.asarray(mask) != 0), (block, sparsity)
print("same")
"""
    assert run("import numpy as np\n" + code, score).split()[-1] == "same"


def test_tfmot_itself_refuses_the_model_that_we_prune():
    code = """
try:
    tfmot.prune_low_magnitude(model, tfmot.ConstantSparsity(0.5, 0))
except ValueError as error:
    print("refused")
"""
    assert run(MODEL + code).split()[-1] == "refused"
