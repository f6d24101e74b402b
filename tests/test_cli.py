"""The command `kbs`: what it prints, what it writes, its exit codes."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from _helpers import run_python

import keras_blocksparse as kbs
from keras_blocksparse import cli

sys.path.insert(0, str(Path(__file__).parent / "lite"))
from lite_helpers import QUICK, prune


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    keras.utils.set_random_seed(1)
    path = tmp_path_factory.mktemp("cli") / "model.keras"
    prune(keras.Sequential([keras.Input((5, 32)), keras.layers.GRU(32)], name="m"), keep=0.25).save(path)
    return path


@pytest.fixture(scope="module")
def exported(saved):
    path = saved.with_name("model.tflite")
    kbs.export_tflite(keras.models.load_model(saved), path, "fast", validate=False, measure_latency=False)
    return path


def kbs_command(capsys, *arguments):
    """Exit code, output, errors."""
    code = cli.main([str(a) for a in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_inspect_a_keras_model(saved, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, text, _ = kbs_command(capsys, "inspect", saved, "--html", page)
    assert code == 0
    assert "gru/recurrent_kernel" in text
    assert "<img" in page.read_text()
    code, text, errors = kbs_command(capsys, "inspect", saved, "--json", "--block-size", 8, 8)
    result = json.loads(text)
    assert code == 0
    assert not errors
    assert result["rows"][0]["block_size"] == [8, 8]
    assert result["pruned"]["sparsity"] == pytest.approx(0.75, abs=0.01)


def test_inspect_a_tflite_file(exported, capsys, tmp_path):
    page = tmp_path / "page.html"
    code, text, _ = kbs_command(capsys, "inspect", exported, "--html", page)
    assert code == 0
    assert "GRU 32" in text
    assert "<img" in page.read_text()
    code, text, _ = kbs_command(capsys, "inspect", exported, "--json")
    assert json.loads(text)["fused"] == ["GRU 32"]


def test_export_writes_what_python_writes(saved, exported, capsys, tmp_path):
    path = tmp_path / "new.tflite"
    code, text, _ = kbs_command(
        capsys, "export", saved, path, "--target", "fast", "--no-latency", "--runtime", QUICK[0], "--json"
    )
    assert code == 0
    assert json.loads(text)["bytes"] == path.stat().st_size
    run = kbs.lite.Interpreter(path, runtime=QUICK[0]).get_signature_runner()
    x = np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
    (y,) = run(**dict.fromkeys(run.get_input_details(), x)).values()
    np.testing.assert_allclose(y, np.asarray(keras.models.load_model(saved)(x)), atol=2e-5)


def test_export_streams(saved, capsys, tmp_path):
    path = tmp_path / "stream.tflite"
    options = "--streaming", "--timesteps", 2, "--quantize", "int8", "--no-validate", "--no-latency"
    code, text, _ = kbs_command(capsys, "export", saved, path, *options)
    assert code == 0
    assert "state h_out of one call is h_in of the next" in text


def test_benchmark_prints_all_variants(exported, capsys):
    options = "--runs", 5, "--seconds", 1, "--runtime", QUICK[0]
    code, text, _ = kbs_command(capsys, "benchmark", exported, *options)
    assert code == 0
    for words in ("dense float32", "without delegate", "with delegate", "p99", "peak memory"):
        assert words in text
    code, text, _ = kbs_command(capsys, "benchmark", exported, *options, "--json")
    assert [row["calls"] for row in json.loads(text)["rows"]] == [5, 5, 5]


def test_a_model_with_classes_of_its_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_layers.py").write_text(
        "import keras\n@keras.saving.register_keras_serializable('mine')\n"
        "class MyDense(keras.layers.Dense):\n    pass\n"
    )
    with monkeypatch.context() as path_with_it:  # older Keras imports what it finds there by itself
        path_with_it.syspath_prepend(tmp_path)
        from my_layers import MyDense  # pyright: ignore

    path = tmp_path / "own.keras"
    keras.Sequential([keras.Input((8,)), MyDense(8)]).save(path)
    keras.saving.get_custom_objects().pop("mine>MyDense")  # as in a new process
    sys.modules.pop("my_layers")
    code, _, errors = kbs_command(capsys, "inspect", path)
    assert code == 2
    assert "--import" in errors
    monkeypatch.syspath_prepend(tmp_path)
    code, text, _ = kbs_command(capsys, "inspect", path, "--import", "my_layers")
    assert code == 0
    assert "my_dense/kernel" in text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["inspect", "none.keras"], "There is no file none.keras"),
        (["inspect", "model.onnx"], "A model is a .keras"),
        (["inspect", "{exported}", "--block-size", "4", "4"], "--block-size is for Keras models"),
        (["inspect", "{saved}", "--block-size", "0", "4"], "block_size"),
        (["inspect", "{saved}", "--html", "nowhere/page.html"], "cannot be written"),
        (["inspect", "{saved}", "--import", "no_such_module"], "No module named 'no_such_module'"),
        (["export", "{exported}", "out.tflite"], "needs a Keras model"),
        (["export", "{saved}", "nowhere/out.tflite"], "directory"),
        (["export", "{saved}", "out.tflite", "--compat", "custom"], "compat='custom' is for target='fast'"),
        (["benchmark", "{saved}"], "kbs benchmark takes a .tflite file"),
        (["benchmark", "{exported}", "--threads", "0"], "num_threads must be positive"),
    ],
)
def test_wrong_input_is_2(arguments, why, saved, exported, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, errors = kbs_command(capsys, *(a.format(saved=saved, exported=exported) for a in arguments))
    assert (code, text) == (2, "")
    assert why in errors
    assert errors.startswith("kbs: ")
    assert not list(tmp_path.iterdir())


def test_a_broken_keras_file_is_2(tmp_path, capsys):
    path = tmp_path / "broken.keras"
    path.write_bytes(b"PK\x03\x04")
    code, _, errors = kbs_command(capsys, "inspect", path)
    assert code == 2
    assert "Keras cannot load" in errors


def test_a_file_that_fails_its_comparison_is_1(saved, capsys, tmp_path):
    path = tmp_path / "new.tflite"
    options = "--tolerance", 0, "--quantize", "int8", "--no-latency", "--runtime", QUICK[0]
    code, text, errors = kbs_command(capsys, "export", saved, path, *options)
    assert (code, text) == (1, "")
    assert "does not compute what the Keras model computes" in errors
    assert not path.exists()


@pytest.mark.parametrize("arguments", [["no-such-command"], [], ["export", "only_one"], ["benchmark", "--threads"]])
def test_a_wrong_command_line_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: kbs" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["inspect"], ["export"], ["benchmark"]])
def test_help_tells_options_and_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "exit codes:" in text
    assert "example:" in text or not command
    assert "--json" in text or not command


def test_the_module_is_the_command():
    code = (
        "import runpy, sys; sys.argv = ['kbs', '--version']; runpy.run_module('keras_blocksparse', run_name='__main__')"
    )
    assert run_python(code).strip() == f"keras_blocksparse {kbs.__version__}"
