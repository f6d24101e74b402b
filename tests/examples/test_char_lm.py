import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from examples.char_lm import data, network
from examples.char_lm.__main__ import main


@pytest.fixture
def text(tmp_path):
    """A file of 200 parts in which every character follows from the two before it."""
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta"]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(random.choice(words, 40)) for _ in range(200)))
    return path


def test_parts_of_a_text_are_split_at_random_and_nothing_is_lost(text):
    corpus = data.load(text)
    assert corpus.alphabet == "\n abdeghlmpt"
    total = sum(len(part) for part in data.parts_of(text))
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == total
    first = "".join(corpus.alphabet[n] for n in corpus.dev[:200])
    assert first.split("\n")[0] in text.read_text()
    few = data.load(text, characters=5000)
    assert 5000 <= len(few.train) < 5500
    np.testing.assert_array_equal(few.test, corpus.test)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"one line", "1 parts or lines; at least 100"), (b"\xff\xfe\x00", "cannot be read as UTF-8")],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        data.load(path)
    with pytest.raises(SystemExit, match="nowhere.txt cannot be read"):
        data.load(tmp_path / "nowhere.txt")


def test_too_short_a_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a\n\n" * 120)
    with pytest.raises(SystemExit, match="too short: 8 characters for dev, at least 200"):
        data.load(path)


def test_windows_are_each_epochs_own_and_the_same_when_resumed():
    text = np.arange(1000, dtype=np.int32)
    steps = data.windows_in(text, 20) // 4
    batches = list(data.training_batches(text, 4, 20, seed=1).take(2 * steps).as_numpy_iterator())
    for x, y in batches:
        assert x.shape == y.shape == (4, 20)
        np.testing.assert_array_equal(x + 1, y)
    first, second = batches[:steps], batches[steps:]
    for epoch in (first, second):
        starts = np.concatenate([x[:, 0] for x, _ in epoch])
        assert len(set(starts.tolist())) == len(starts) == 48
    assert not np.array_equal(first[0][0], second[0][0])
    resumed = next(data.training_batches(text, 4, 20, seed=1, first_epoch=1).as_numpy_iterator())
    np.testing.assert_array_equal(resumed[0], second[0][0])
    with pytest.raises(SystemExit, match="at least 120 characters. Received: 100"):
        data.training_batches(text[:100], 4, 20, seed=0)


def test_every_scored_character_is_scored_once_with_context():
    text = np.arange(1000, dtype=np.int32)
    batches = list(data.scored_windows(text, length=100, batch=4))
    scored = np.concatenate([expected.ravel() for _, expected in batches])
    np.testing.assert_array_equal(scored, np.arange(data.CONTEXT, data.CONTEXT + 900))
    windows, expected = batches[0]
    np.testing.assert_array_equal(windows[:, -100:] + 1, expected)


def test_bits_per_character_is_that_of_numpy_in_float64():
    keras.utils.set_random_seed(0)
    model = network.build(5, "lstm", 8, layers=2)
    text = np.random.default_rng(0).integers(5, size=600).astype(np.int32)
    bits = []
    for windows, expected in data.scored_windows(text):
        logits = np.asarray(model(windows), np.float64)[:, -expected.shape[1] :]
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        bits.append(-np.log2(np.take_along_axis(probabilities, expected[..., None], -1)))
    assert network.bits_per_character(model, text) == pytest.approx(np.concatenate(bits).mean(), rel=1e-6)


def test_help_does_not_wait_for_tensorflow():
    code = (
        "import sys; from examples.char_lm.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--group-lasso" in out
    assert out.rstrip().endswith("loaded []")


def test_smoke(text, tmp_path, capsys):
    main(["--preset", "smoke", "--text", str(text), "--units", "32", "--dropout", "0.1", "--output",
          str(tmp_path / "out")])  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.9, abs=0.02)
    assert result["settings"]["compression"]["block_size"] == [4, 4]
    assert result["scores"]["dev"] < np.log2(12)  # better than a guess, after a few steps
    model = keras.saving.load_model(tmp_path / "out/model.keras")
    corpus = data.load(text, 20_000)
    assert network.bits_per_character(model, corpus.dev) == pytest.approx(result["scores"]["dev"], abs=1e-5)
    exports = json.loads((tmp_path / "out/export.json").read_text())
    assert exports["fast"]["fused"]
    assert (tmp_path / "out/masks.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Bits per character: " in out
    assert "smaller than dense float32" in out
    main(["--preset", "smoke", "--text", str(text), "--units", "16", "--no-export", "--teacher",
          str(tmp_path / "out/model.keras"), "--teacher-share", "1", "--teacher-dropout",
          "--output", str(tmp_path / "taught")])  # fmt: skip
    losses = json.loads((tmp_path / "taught/result.json").read_text())["course"]["losses"]
    assert 0 < losses[-1] < losses[0]
