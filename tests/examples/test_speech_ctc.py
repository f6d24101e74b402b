import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import soundfile
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.accuracy import larger
from examples.common import bible
from examples.common.student import Teacher
from examples.speech_ctc import corpora, features, network, pipeline, synthesis
from examples.speech_ctc.__main__ import main

QUIET = Console(quiet=True)
RATES = {"a.flac": 16_000, "b.wav": 44_100, "c.ogg": 22_050, "d.mp3": 24_000, "e.flac": 8_000}


def spoken(text, rate=16_000):
    """A tone of 0.12 s, whole periods, for each character, high for late ones in the alphabet."""
    times = np.arange(int(0.12 * rate)) / rate
    pitches = [250 + 100 * (ord(c) - ord("`")) if c != " " else 0 for c in text]
    return np.concatenate([0.5 * np.sin(2 * np.pi * pitch * times) + 1e-3 * (pitch == 0) for pitch in pitches])


def manifest(folder, count=30, split=True, seed=0):
    """A manifest of small FLAC files in the three splits."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        text = " ".join("".join(random.choice(list("abcd"), random.integers(2, 5))) for _ in range(2))
        soundfile.write(folder / f"{n}.flac", spoken(text), 16_000)
        line = {"audio_filepath": f"{n}.flac", "text": text.upper() + ".", "duration": 1.0}
        lines.append(line | ({"split": ("dev", "test", "train")[min(n // 4, 2)]} if split else {}))
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_transcripts_become_letters_apostrophes_and_single_spaces():
    assert corpora.normalized(" He SAID,\t“don’t — 2 Été!” ") == "he said don't été"


def test_a_manifest_is_read_relative_to_itself(tmp_path):
    path = manifest(tmp_path / "corpus")
    corpus = corpora.load(f"manifest:{path}")
    assert not corpus.skipped
    assert [u.split for u in corpus.utterances] == ["dev"] * 4 + ["test"] * 4 + ["train"] * 22
    assert corpus.utterances[0].audio == tmp_path / "corpus/0.flac"
    assert corpus.utterances[0].text == json.loads(path.read_text().splitlines()[0])["text"][:-1].lower()


def test_three_manifests_are_train_dev_and_test(tmp_path):
    paths = [manifest(tmp_path / name, count, split=False) for name, count in (("a", 3), ("b", 2), ("c", 1))]
    corpus = corpora.load("manifest:" + ",".join(map(str, paths)))
    assert [u.split for u in corpus.utterances] == ["train"] * 3 + ["dev"] * 2 + ["test"]


def test_a_manifest_without_splits_is_split_by_names_of_files(tmp_path):
    path = manifest(tmp_path, 100, split=False)
    first, again = (corpora.load(f"manifest:{path}") for _ in range(2))
    assert first.utterances == again.utterances
    counts = {split: sum(u.split == split for u in first.utterances) for split in corpora.SPLITS}
    assert counts["train"] >= 80
    assert min(counts.values()) >= 1


def test_what_is_wrong_with_a_manifest_is_named_and_counted(tmp_path):
    path = manifest(tmp_path, 12)
    bad = ['{"text": "a"}', "[1]", "not json", '{"audio_filepath": "gone.flac", "text": "a", "split": "dev"}',
           '{"audio_filepath": "0.flac", "text": "...", "split": "dev"}',
           '{"audio_filepath": "0.flac", "text": "a", "split": "later"}']  # fmt: skip
    path.write_text(path.read_text() + "\n".join(bad) + "\n\n")
    corpus = corpora.load(f"manifest:{path}")
    assert len(corpus.utterances) == 12
    where, why = zip(*(problem.values() for problem in corpus.skipped), strict=True)
    assert where[:3] == (f"{path}:13", f"{path}:14", f"{path}:15")
    assert where[3:] == (str(tmp_path / "gone.flac"), str(tmp_path / "0.flac"), f"{path}:18")
    assert all(reason.startswith("no JSON object with audio_filepath and text (") for reason in why[:3])
    assert why[3:] == (
        "no such file", "no letter in its text", "split must be one of ('train', 'dev', 'test'), not 'later'"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("kaldi:here", "kjv, manifest:FILE or librispeech:DIR. Received: kaldi:here"),
        ("manifest:", "Received: manifest:"),
        ("manifest:a,b", "one manifest, or three.* Received: 2"),
        ("manifest:nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("librispeech:nowhere", "no speaker/chapter/.*trans.txt in nowhere"),
    ],
)
def test_corpora_that_are_none_are_refused(data, message):
    with pytest.raises(SystemExit, match=message):
        corpora.load(data)


def test_a_corpus_without_test_says_what_it_has(tmp_path):
    path = manifest(tmp_path, 6)
    with pytest.raises(SystemExit, match="Found: {'train': 0, 'dev': 4, 'test': 2}"):
        corpora.load(f"manifest:{path}")


def librispeech(folder, subsets, extension="flac"):
    for speaker, subset in enumerate(subsets):
        chapter = folder / subset / str(100 + speaker) / "7"
        chapter.mkdir(parents=True)
        lines = []
        for n in range(2):
            name = f"{100 + speaker}-7-{n:04}"
            soundfile.write(chapter / f"{name}.{extension}", spoken("ab cd"), 16_000)
            lines.append(f"{name} AB CD\n")
        (chapter / f"{100 + speaker}-7.trans.txt").write_text("".join(lines))


@pytest.mark.parametrize("extension", ["flac", "wav"])
def test_librispeech_folders_say_what_is_for_what(tmp_path, extension):
    librispeech(tmp_path, ["train-clean-100", "train-other-500", "dev-clean", "test-other"], extension)
    corpus = corpora.load(f"librispeech:{tmp_path}")
    assert sorted((u.audio.name.split("-")[0], u.split) for u in corpus.utterances) == [
        ("100", "train"), ("100", "train"), ("101", "train"), ("101", "train"), ("102", "dev"), ("102", "dev"),
        ("103", "test"), ("103", "test"),
    ]  # fmt: skip
    assert {u.text for u in corpus.utterances} == {"ab cd"}


def test_librispeech_speakers_are_split_if_folders_do_not_say_it(tmp_path):
    librispeech(tmp_path, [""] * 5)
    (tmp_path / "101/7/101-7-0001.flac").unlink()
    corpus = corpora.load(f"librispeech:{tmp_path}")
    by_speaker = {u.audio.name.split("-")[0]: u.split for u in corpus.utterances}
    assert sorted(by_speaker.values()) == ["dev", "test", "train", "train", "train"]
    assert all(u.split == by_speaker[u.audio.name.split("-")[0]] for u in corpus.utterances)
    assert corpus.skipped == [{"where": str(tmp_path / "101/7/101-7-0001.flac"), "why": "no such file"}]


def test_audio_of_any_format_and_rate_is_the_same_tone(tmp_path):
    for name, rate in RATES.items():
        audio = spoken("a" * 10, rate)
        soundfile.write(tmp_path / name, np.stack([audio, audio], axis=1), rate)
        samples = features.read_audio(tmp_path / name, max_seconds=5)
        assert samples.dtype == np.float32
        assert len(samples) == pytest.approx(1.2 * 16_000, abs=2500 if name.endswith("mp3") else 2)
        spectrum = np.abs(np.fft.rfft(samples[2000:18_000]))
        assert np.argmax(spectrum) == pytest.approx(350, abs=1)  # Hz: the tone of "a"


def test_files_that_cannot_be_used_are_named_and_the_rest_is_learned_from(tmp_path, capsys):
    path = manifest(tmp_path / "corpus", 30)
    folder = path.parent
    (folder / "10.flac").write_bytes(b"not audio")
    (folder / "11.flac").write_bytes((folder / "12.flac").read_bytes()[:60])
    soundfile.write(folder / "13.flac", np.zeros(16_000), 16_000)
    soundfile.write(folder / "14.flac", np.ones(100), 16_000)
    soundfile.write(folder / "15.flac", np.zeros(16_000 * 30), 16_000)
    soundfile.write(folder / "16.flac", spoken("ab"), 16_000)
    soundfile.write(folder / "17.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[16]["text"] = "too much to say in so short a time"
    lines[17]["audio_filepath"] = "17.wav"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = features.extract(corpora.load(f"manifest:{path}"), tmp_path / "cache", Console(width=200))
    assert len(found.text) == 22 + 1
    reasons = {problem["where"].rsplit("/", 1)[1]: problem["why"] for problem in found.skipped}
    assert sorted(reasons) == ["10.flac", "11.flac", "13.flac", "14.flac", "15.flac", "16.flac", "17.wav"]
    assert "cannot be decoded" in reasons["10.flac"]
    assert "cannot be decoded" in reasons["11.flac"]
    assert reasons["13.flac"] == reasons["17.wav"] == "holds NaN, infinity or silence only"
    assert reasons["14.flac"] == "only 6 ms long"
    assert reasons["15.flac"] == "30.0 s long, more than 20"
    assert reasons["16.flac"] == "34 characters in 0.2 s are more than CTC can write"
    out = capsys.readouterr().out
    assert "7 utterances are skipped" in out
    assert "10.flac: cannot be decoded" in out


def test_nothing_left_is_an_error(tmp_path):
    path = manifest(tmp_path / "corpus", 12)
    for n in range(4):
        (path.parent / f"{n}.flac").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="Nothing is left for dev: 4 utterances had to be skipped"):
        features.extract(corpora.load(f"manifest:{path}"), tmp_path / "cache", QUIET)


def log_mel(audio):
    """Frames of 25 ms each 10 ms, 64 triangles on the HTK mel scale, dB below the loudest; in float64."""
    audio = np.asarray(audio, np.float64) / np.abs(audio).max()
    padded = np.pad(audio, 256, mode="reflect")
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    count = 1 + (len(padded) - 512) // 160
    power = np.abs(np.fft.rfft([padded[160 * n : 160 * n + 512] * window for n in range(count)])) ** 2
    mel = lambda f: 1127 * np.log1p(f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 66)
    bins = mel(np.linspace(0, 8000, 257))
    rise = (bins[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - bins[:, None]) / np.diff(edges)[1:]
    weights = np.maximum(0, np.minimum(rise, fall))
    weights[0] = 0
    decibels = 10 * np.log10(np.maximum(power @ weights, 1e-10))
    return np.maximum(decibels - decibels.max(), -features.RANGE) / (features.RANGE / 2) + 1


def test_features_are_log_mel_of_numpy(tmp_path):
    path = manifest(tmp_path / "corpus", 12)
    found = features.extract(corpora.load(f"manifest:{path}"), tmp_path / "cache", QUIET)
    expected = log_mel(soundfile.read(path.parent / "0.flac")[0])
    assert found.of(0).shape == expected.shape
    np.testing.assert_allclose(found.of(0), expected, atol=0.02)
    assert found.of(0).min() == -1
    assert found.of(0).max() == 1


def test_a_killed_pass_goes_on_and_frames_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 8)
    corpus = corpora.load(f"manifest:{manifest(tmp_path / 'corpus', 20)}")
    whole = features.extract(corpus, tmp_path / "whole", QUIET)
    read = features.read_audio

    def killed(path, max_seconds):
        if path.name == "17.flac":
            raise KeyboardInterrupt
        return read(path, max_seconds)

    monkeypatch.setattr(features, "read_audio", killed)
    with pytest.raises(KeyboardInterrupt):
        features.extract(corpus, tmp_path / "cache", QUIET)
    seen = []
    monkeypatch.setattr(features, "read_audio", lambda path, s: seen.append(path.stem) or read(path, s))
    resumed = features.extract(corpus, tmp_path / "cache", QUIET)
    assert sorted(seen) == ["16", "17", "18", "19"]
    for n in range(20):
        np.testing.assert_array_equal(resumed.of(n), whole.of(n))
    assert all(isinstance(frames, np.memmap) for frames in resumed.frames)
    seen.clear()
    features.extract(corpus, tmp_path / "cache", QUIET)
    assert not seen


@given(st.integers(5, 60), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_plans_hold_each_utterance_at_most_once_in_batches_of_like_length(count, batch, seed, epoch):
    lengths = np.random.default_rng(count).integers(10, 500, count)
    batches = pipeline.plan(lengths, batch, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, pipeline.plan(lengths, batch, seed, epoch), strict=True))
    flat = np.concatenate(batches)
    assert len(batches) == count // batch
    assert len(set(flat.tolist())) == len(flat) == count // batch * batch
    means = [lengths[b].mean() for b in batches]
    blur = 1.1 / 0.9
    ordered = sorted(batches, key=lambda b: lengths[b].mean())
    for before, after in itertools.pairwise(ordered):
        assert lengths[before].min() <= lengths[after].max() * blur
    if epoch == 0:
        assert all(lengths[a].min() <= lengths[b].max() * blur for a, b in itertools.pairwise(batches)), means


def small_features(tmp_path, count=30):
    return features.extract(corpora.load(f"manifest:{manifest(tmp_path / 'corpus', count)}"), tmp_path / "cache", QUIET)


def begun(row):
    """How many frames late an utterance begins in a batch."""
    return int(np.argmax((row != pipeline.SILENCE).any(-1)))


def test_training_batches_are_padded_and_go_on_with_any_epoch(tmp_path):
    found = small_features(tmp_path)
    alphabet = pipeline.alphabet_of(found)
    assert alphabet == " abcd"
    batches = list(pipeline.training_batches(found, alphabet, 4, seed=1, augment=False).take(10).as_numpy_iterator())
    (chosen, *_) = pipeline.plan(found.length[found.numbers("train")], 4, 1, 0)
    frames, labels = batches[0]
    assert frames.shape[1] % 4 == 0
    for row, text, n in zip(frames, labels, found.numbers("train")[chosen], strict=True):
        late, spoken_frames = begun(row), found.length[n]
        np.testing.assert_array_equal(row[late : late + spoken_frames], found.of(n))
        assert (row[:late] == pipeline.SILENCE).all()
        assert (row[late + spoken_frames :] == pipeline.SILENCE).all()
        assert "".join(alphabet[c - 1] for c in text if c) == found.text[n]
    resumed = pipeline.training_batches(found, alphabet, 4, seed=1, first_epoch=1, augment=False).as_numpy_iterator()
    np.testing.assert_array_equal(next(resumed)[0], batches[5][0])
    assert {begun(row) for frames, _ in batches for row in frames} == {0, 1, 2, 3}
    with pytest.raises(SystemExit, match="--batch 40 is more than the 22 utterances"):
        pipeline.training_batches(found, alphabet, 40, seed=0)


def test_a_teachers_lessons_are_what_it_says_of_each_utterance(tmp_path):
    found = small_features(tmp_path)
    teacher = network.build(5, "gru", 8, depth=1, channels=4)
    lessons = pipeline.lessons(Teacher((teacher,)), found, tmp_path, QUIET)
    numbers = found.numbers("train")
    assert sorted(lessons) == sorted(numbers)
    frames, (labels, logits) = next(
        pipeline.training_batches(found, " abcd", 4, seed=1, augment=False, lessons=lessons).as_numpy_iterator()
    )
    assert frames.shape[1] == 4 * logits.shape[1]
    assert labels.shape[0] == 4
    said = teacher.predict_on_batch(frames)
    (chosen, *_) = pipeline.plan(found.length[numbers], 4, 1, 0)
    for n, row, own, expected in zip(numbers[chosen], frames, logits, said, strict=True):
        late = begun(row)
        length = -(-(late + found.length[n]) // 4)
        sure = length - network.LOOKAHEAD - 4  # its end hears how much silence follows: in a batch, up to the longest
        np.testing.assert_allclose(own[:sure], expected[:sure], atol=2e-3)
        np.testing.assert_array_equal(own[:length], lessons[n][late])
        assert (own[length:] == 0).all()
    doubting = Teacher((network.build(5, "gru", 8, depth=1, channels=4, dropout=0.5),), passes=2)
    for of_utterance in pipeline.lessons(doubting, found, tmp_path, QUIET).values():
        for row in of_utterance:  # probabilities, whose mean is no logits' any more
            np.testing.assert_allclose(np.exp(row.astype("float32")).sum(-1), 1, atol=1e-2)


def test_spec_augment_masks_bands_and_times_and_nothing_else(tmp_path):
    pytest.importorskip("tensorflow_io")
    found = small_features(tmp_path)
    plain, masked = (
        next(pipeline.training_batches(found, " abcd", 4, seed=1, augment=augment).as_numpy_iterator())[0]
        for augment in (False, True)
    )
    changed = plain != masked
    assert changed.any()
    assert (masked[changed] == 0).all()
    for one in changed:
        bands, times = one.any(0) & (one.mean(0) > 0.5), one.mean(1) > 0.5
        assert bands.sum() <= pipeline.MASKS * pipeline.FREQUENCIES
        assert times.sum() <= pipeline.MASKS * pipeline.TIMES


def test_the_loss_and_its_gradients_are_keras_own():
    random = np.random.default_rng(0)
    logits = tf.Variable(random.normal(size=(3, 12, 5)), dtype="float32")
    labels = np.array([[1, 2, 2, 4], [3, 0, 0, 0], [1, 4, 0, 0]])
    found = []
    for loss in (network.CTC(), keras.losses.CTC()):
        with tf.GradientTape() as tape:
            value = loss(labels, logits)
        found.append((value, tape.gradient(value, logits)))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def collapsed(logits, length, alphabet):
    path = logits[:length].argmax(-1)
    return "".join(alphabet[c - 1] for n, c in enumerate(path) if c and (n == 0 or c != path[n - 1]))


def test_decoding_is_the_best_path_and_a_beam_finds_likelier_texts():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 20, 4)).astype(np.float32) * 2
    lengths = np.array([20, 15, 1, 20, 7, 20])
    assert network.decode(logits, lengths, "abc") == [
        collapsed(x, n, "abc") for x, n in zip(logits, lengths, strict=True)
    ]
    # Three steps of p(blank) 0.4, p(a) 0.35, p(b) 0.25: the best path is empty, but "a" is likelier as a text.
    logits = np.log(np.tile([0.4, 0.35, 0.25], (1, 3, 1))).astype(np.float32)
    assert network.decode(logits, np.array([3]), "ab") == [""]
    likelihood = {}
    for path in itertools.product(range(3), repeat=3):
        text = "".join("ab"[c - 1] for n, c in enumerate(path) if c and (n == 0 or c != path[n - 1]))
        likelihood[text] = likelihood.get(text, 0) + np.prod([(0.4, 0.35, 0.25)[c] for c in path])
    assert network.decode(logits, np.array([3]), "ab", beam=10) == [max(likelihood, key=likelihood.get)] == ["a"]


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@given(
    st.lists(st.tuples(st.text("abé ", max_size=8), st.text("abé ", min_size=1, max_size=8)), min_size=1, max_size=4)
)
def test_errors_are_edit_distances(pairs):
    heard, said = zip(*pairs, strict=True)
    assert network.errors(list(heard), list(said)).tolist() == [distance(a, b) for a, b in pairs]


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("frames", [1, 7, 8, 101])
def test_networks_write_25_outputs_a_second(cell, frames):
    model = network.build(5, cell, 8, depth=2, channels=4)
    x = np.random.default_rng(0).normal(size=(2, frames, 64)).astype("float32")
    assert model(x).shape == (2, -(-frames // 4), 6)


def test_the_gru_network_looks_ahead_and_no_further():
    model = network.build(5, "gru", 8, depth=2, channels=4)
    x = np.random.default_rng(0).normal(size=(1, 200, 64)).astype("float32")
    y = np.asarray(model(x))
    x[:, 100:] = 0
    same = np.isclose(np.asarray(model(x)), y, atol=1e-6).all(axis=(0, 2))
    assert same[: 25 - network.LOOKAHEAD - 2].all()
    assert not same[25:].any()


def test_noise_is_as_loud_as_it_was_asked_to_be_and_an_echo_follows():
    random = np.random.default_rng(0)
    speech = spoken("abcd" * 5)
    noise = synthesis.with_noise(speech, 10.0, 1.0, random) - speech
    assert 20 * np.log10(speech.std() / noise.std()) == pytest.approx(10.0, abs=1e-6)
    click = np.zeros(16_000)
    click[100] = 1
    heard = synthesis.in_a_room(click, 0.3, 16_000, random)
    np.testing.assert_allclose(heard[:100], 0, atol=1e-9)
    assert heard[100] == pytest.approx(1.0)
    energy = np.cumsum(heard[101:][::-1] ** 2)[::-1]
    decay = 10 * np.log10(energy[int(0.15 * 16_000)] / energy[0])
    assert decay == pytest.approx(-30, abs=2)


def test_phrases_are_cut_at_marks_and_kept_if_neither_short_nor_long():
    verse = bible.Verse(1, 1, 1, "And he said, Behold, I come quickly; and they answered him. Amen.")
    assert synthesis.phrases([verse], 5, 30) == [
        "And he said, Behold,",
        "I come quickly;",
        "and they answered him. Amen.",
    ]
    assert synthesis.phrases([verse], 16, 25) == ["And he said, Behold,", "and they answered him."]


@pytest.fixture
def verses(monkeypatch):
    words = ["a word, ", "and the light; ", "of many waters, ", "that it was good, "]
    random = np.random.default_rng(0)
    found = [bible.Verse(1, 1, n, "".join(random.choice(words, 4)) + "so.") for n in range(500)]
    monkeypatch.setattr(bible, "load", lambda cache: found)


def test_the_same_speech_is_made_again_and_damage_is_noticed(tmp_path, verses):
    recipe = synthesis.Recipe(train=6, dev=4, test=4)
    path = synthesis.make(recipe, tmp_path / "a", QUIET)
    again = synthesis.make(recipe, tmp_path / "b", QUIET)
    made, remade = (json.loads((p.parent / "corpus.json").read_text()) for p in (path, again))
    assert made == remade
    assert synthesis.make(recipe, tmp_path / "a", QUIET) == path
    corpus = corpora.load(f"manifest:{path}")
    assert [u.split for u in corpus.utterances] == ["train"] * 6 + ["dev"] * 4 + ["test"] * 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["voice"] for line in lines if line["split"] == "train"} <= set(synthesis.VOICES)
    audio, rate = soundfile.read(path.parent / lines[0]["audio_filepath"])
    assert rate == 16_000
    assert 1 < lines[0]["duration"] < 6
    assert len(audio) == round(lines[0]["duration"] * rate)
    (path.parent / lines[3]["audio_filepath"]).unlink()
    with pytest.raises(SystemExit, match="is not what was made. Delete the folder"):
        synthesis.make(recipe, tmp_path / "a", QUIET)


def test_voices_that_are_not_there_are_named():
    espeak = synthesis.Espeak()
    assert espeak.rate == 22_050
    assert hashlib.sha256(espeak.say("amen", "en")).digest() != hashlib.sha256(espeak.say("amen", "en+f2")).digest()
    for voice in ("elvish", "en+elvish"):
        with pytest.raises(ValueError, match=f"no voice '{re.escape(voice)}'"):
            espeak.say("amen", voice)
    with pytest.raises(ValueError, match="said nothing"):
        espeak.say("", "en")


def test_every_voice_is_there():
    espeak = synthesis.Espeak()
    heard = {hashlib.sha256(espeak.say("amen", voice)).digest() for voice in synthesis.VOICES + synthesis.NEW_VOICES}
    assert len(heard) == len(synthesis.VOICES) + len(synthesis.NEW_VOICES)


def test_help_does_not_wait_for_tensorflow():
    code = (
        "import sys; from examples.speech_ctc.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "librispeech:DIR" in out
    assert out.rstrip().endswith("loaded []")


def test_smoke(tmp_path, capsys):
    path = manifest(tmp_path / "corpus", 40)
    main(["--preset", "smoke", "--data", f"manifest:{path}", "--epochs", "3", "--cache", str(tmp_path / "cache"),
          "--learning-rate", "5e-3", "--native-loop", "--output", str(tmp_path / "out")])  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.9, abs=0.02)
    assert result["alphabet"] == " abcd"
    losses = result["course"]["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    pairs = [line.split("\t") for line in (tmp_path / "out/texts.tsv").read_text().splitlines()]
    assert len(pairs) == 4
    wrong = sum(distance(said, heard) for said, heard in pairs)
    assert result["scores"]["dev"] == pytest.approx(wrong / sum(len(said) for said, _ in pairs))
    assert json.loads((tmp_path / "out/export.json").read_text())["fast"]["fused"]
    assert keras.saving.load_model(tmp_path / "out/model.keras")(np.zeros((1, 40, 64), "float32")).shape == (1, 10, 6)
    assert "Character error rate: " in capsys.readouterr().out
    main(["--preset", "smoke", "--data", f"manifest:{path}", "--epochs", "1", "--cache", str(tmp_path / "cache"),
          "--native-loop", "--no-export", "--teacher", str(tmp_path / "out/model.keras"), "--teacher-share", "1",
          "--start-from", str(tmp_path / "out/model.keras"), "--algorithm", "dense",
          "--output", str(tmp_path / "taught")])  # fmt: skip
    taught = json.loads((tmp_path / "taught/result.json").read_text())
    assert taught["course"]["losses"][0] < losses[2] / 10  # it begins as its teacher, and stays near it
    assert not (tmp_path / "taught/unfinished").exists()


def test_smoke_of_the_bidirectional_network_and_its_score_on_more_speech(tmp_path, verses, capsys):
    main(["--preset", "smoke", "--phrases", "16", "--cell", "rnn", "--epochs", "1", "--no-export", "--cache",
          str(tmp_path / "cache"), "--algorithm", "dense", "--output", str(tmp_path / "out")])  # fmt: skip
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["sparsity"] == 0
    assert set(result["sparsity_by_weight"]) == {
        f"birnn_{n}/{way}_rnn_{n}/simple_rnn_cell/{kernel}"
        for n in (1, 2) for way in ("forward", "backward") for kernel in ("kernel", "recurrent_kernel")
    }  # fmt: skip
    (tmp_path / "net/dense").mkdir(parents=True)
    shutil.copytree(tmp_path / "out", tmp_path / "net/dense/0")
    shutil.copytree(tmp_path / "out", tmp_path / "net/ours/0")
    for split, option in (("dev", []), ("test", ["--split", "test"])):
        larger.main([*(str(tmp_path / f"net/{row}/0") for row in ("dense", "ours")), *option, "--phrases", "6",
                     "--cache", str(tmp_path / "cache")])  # fmt: skip
        made = max((tmp_path / "cache").glob("kjv-speech-*"), key=lambda path: path.stat().st_mtime_ns)
        lines = [json.loads(line) for line in (made / "manifest.jsonl").read_text().splitlines()]
        hours = sum(line["duration"] for line in lines if line["split"] == split) / 3600
        assert [line["split"] for line in lines].count(split) == 6
        printed = capsys.readouterr().out
        assert f"{hours:.2f} hours of {split}" in printed
        score = re.search(r"/net/ours/0: character error rate (\d\.\d{4})$", printed, re.MULTILINE)
        assert 0.5 < float(score[1]) < 2  # it has learned next to nothing
        assert "/net/ours: +0.0 ± 0.0 % against dense, by 1 seed(s)" in printed
    (tmp_path / "out/model.keras").unlink()
    with pytest.raises(SystemExit, match="out is not what a training of examples.speech_ctc wrote"):
        larger.main([str(tmp_path / "out")])


def test_what_rows_lose_on_more_speech_and_what_chance_in_the_phrases_makes_of_it():
    chance = np.random.default_rng(0)
    net = Path("net")
    dense = [chance.poisson(5, 400), chance.poisson(5, 400)]
    ours = [counts + chance.poisson(0.2, 400) for counts in dense]
    wrong = {net / "dense/0": dense[0], net / "dense/1": dense[1], net / "ours/0": ours[0], net / "ours/1": ours[1],
             net / "other/2": ours[0]}  # fmt: skip
    found = larger.against_dense(wrong)
    assert list(found) == [net / "ours"]  # "other" has no seed that dense has
    figure, seeds = found[net / "ours"]
    assert seeds == 2
    assert figure.mean == pytest.approx((sum(dense).sum() - sum(ours).sum()) / sum(dense).sum())
    drawn = [chance.integers(400, size=400) for _ in range(2000)]
    assert figure.error == pytest.approx(np.std([sum(ours)[n].sum() / sum(dense)[n].sum() for n in drawn]), rel=0.1)
