import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from examples.japanese_vowels import data
from examples.japanese_vowels.__main__ import main, parse_args

TS = """#a comment
@problemName Tiny
@dimensions 2
@data
1.0,2.0,3.0:4.0,5.0,6.0:1
-1.5,0.5:2.5,0.0:9
"""


def utterances(speakers=9, each=4, longest=12, seed=0):
    """Sequences that a small GRU can tell apart: every speaker has a direction of its own."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(7).normal(size=(speakers, 12))
    y = np.repeat(np.arange(speakers, dtype=np.int32), each)
    x = [directions[s] + 0.3 * rng.normal(size=(rng.integers(5, longest + 1), 12)) for s in y]
    return data.Utterances(data.pad([u.astype(np.float32) for u in x], longest), y)


def wheel_with(folder: Path, members: dict[str, str]) -> Path:
    path = folder / data.PACKAGE.wheel
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_ts_text_is_read_as_frames_by_channels():
    (first, second), labels = data.parse_ts(TS)
    np.testing.assert_array_equal(first, [[1, 4], [2, 5], [3, 6]])
    np.testing.assert_array_equal(second, [[-1.5, 2.5], [0.5, 0.0]])
    np.testing.assert_array_equal(labels, [0, 8])


def test_ts_text_without_data_line_is_refused():
    with pytest.raises(ValueError, match="@data.*none in 1 lines"):
        data.parse_ts("1.0:2.0:1")


def test_ts_channels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"line 2.*\[2, 1\]"):
        data.parse_ts("@data\n1.0,2.0:3.0:1")


def test_padding_follows_the_utterance():
    padded = data.pad([np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)], 4)
    np.testing.assert_array_equal(padded[:, :, 0], [[1, 1, 0, 0], [1, 1, 1, 1]])


def test_held_out_takes_its_share_of_every_speaker_and_loses_nothing():
    train = utterances(each=6)
    kept, held = data.held_out(train, share=1 / 3, seed=0)
    np.testing.assert_array_equal(np.bincount(kept.y), 4)
    np.testing.assert_array_equal(np.bincount(held.y), 2)
    assert {u.tobytes() for u in kept.x} | {u.tobytes() for u in held.x} == {u.tobytes() for u in train.x}


def test_loads_the_recordings_from_the_wheel(tmp_path, monkeypatch):
    members = {data.MEMBER.format(split=split): TS for split in ("TRAIN", "TEST")}
    wheel_with(tmp_path, members)
    monkeypatch.setattr(data, "SHA256", dict.fromkeys(("TRAIN", "TEST"), hashlib.sha256(TS.encode()).hexdigest()))
    train, test = data.load(tmp_path)
    assert train.x.shape == test.x.shape == (2, 3, 2)
    frames = np.concatenate([train.x[0], train.x[1, :2]])
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(train.x[1, 2], 0)


def test_bad_arguments_are_quoted(capsys):
    for argv, message in [
        (["--begin", "0.6", "--end", "0.5"], "Received: --begin 0.6 --end 0.5"),
        (["--seeds", "0"], "expected a positive number. Received: 0"),
    ]:
        with pytest.raises(SystemExit):
            parse_args(argv)
        assert message in capsys.readouterr().err


def test_help_does_not_wait_for_tensorflow():
    code = (
        "import sys; from examples.japanese_vowels.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--evaluate" in out
    assert out.rstrip().endswith("loaded []")


def test_the_whole_way_on_small_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("examples.japanese_vowels.__main__.load", lambda cache: (utterances(), utterances(seed=1)))
    main(["--seeds", "2", "--epochs", "12", "--units", "32", "--block-size", "4", "4", "--output", str(tmp_path)])

    facts = json.loads((tmp_path / "results.json").read_text())
    np.testing.assert_allclose(facts["zeros_in_recurrent_kernel"]["sparse"], 0.9, atol=4 * 4 / (32 * 32))
    assert facts["zeros_in_recurrent_kernel"]["dense"] == [0.0, 0.0]
    size = {(file["kind"], file["quantize"]): file["bytes"] for file in facts["files"]}
    assert size["sparse", None] < size["dense", None]
    assert size["sparse", "int8"] < size["dense", "int8"]
    for file in facts["files"]:
        accuracies = [run["accuracy"] for run in file["runs"].values()]
        np.testing.assert_allclose(accuracies, facts["accuracy"][file["kind"]][0], atol=1 / 36)  # one utterance
    table = (tmp_path / "results.md").read_text()
    (heading,) = (line for line in table.splitlines() if line.startswith("|  |"))
    assert heading == "|  | dense, float32 | dense, int8 | 90% sparse, float32 | 90% sparse, int8 |"
    assert f"| against dense |  |  | {facts['verdict']} | {facts['verdict']} |" in table
    for picture in ("masks.png", "training.png", "files.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert "against dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dense", "sparse", "verdict"),
    [
        ([0.98, 0.99], [0.90, 0.91], "WORSE: -8.00, spread 0.71"),
        ([0.98, 0.99], [0.97, 0.99], "not worse: -0.50, spread 1.41"),
        ([0.90], [0.95], "+5.00, by ONE SEED"),
    ],
)
def test_the_table_says_if_sparse_is_worse_by_more_than_the_spread(dense, sparse, verdict):
    from examples.japanese_vowels.results import Outcome
    from examples.japanese_vowels.training import Recipe, Run

    recipe = Recipe(1, 8, 1e-3, (4, 4), 0.9, 0.0, 0.1, 0.5)
    scores = {"dense": dense, "sparse": sparse}
    runs = [Run(kind, seed, None, score, [], []) for kind in scores for seed, score in enumerate(scores[kind])]
    assert Outcome(recipe, runs, [], "test", 100, 0.0).verdict == verdict
