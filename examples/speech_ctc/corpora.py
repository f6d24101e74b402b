"""Which audio files there are, what is said in them, and which are for training: the corpora this program can read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Utterance:
    """An audio file and what is said in it."""

    audio: Path
    text: str
    split: str


@dataclass
class Corpus:
    """What a corpus holds.

    Attributes:
        utterances: in the corpus's own order.
        skipped: what could not be read, and why: `{"where": ..., "why": ...}`.
    """

    utterances: list[Utterance] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, where: object, why: str) -> None:
        """Notes what could not be read."""
        self.skipped.append({"where": str(where), "why": why})


def normalized(text: str) -> str:
    """A transcript as it is learned: lower case, letters and apostrophes, single spaces."""
    kept = "".join(
        c if c.isalpha() or c == "'" else " " for c in text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return " ".join(kept.split())


def load(data: str) -> Corpus:
    """The corpus that `--data` names: "manifest:FILE", "manifest:TRAIN,DEV,TEST" or "librispeech:DIR".

    Raises:
        SystemExit: it is neither, is not there, or has nothing for one of train, dev and test.
    """
    kind, _, where = data.partition(":")
    if kind not in ("manifest", "librispeech") or not where:
        raise SystemExit(f"--data must be kjv, manifest:FILE or librispeech:DIR. Received: {data}")
    corpus = read_manifests(where.split(",")) if kind == "manifest" else read_librispeech(Path(where))
    counts = {split: sum(u.split == split for u in corpus.utterances) for split in SPLITS}
    if not all(counts.values()):
        skipped = f"; {len(corpus.skipped)} lines or files were skipped" if corpus.skipped else ""
        first = f", such as {corpus.skipped[0]['where']}: {corpus.skipped[0]['why']}" if corpus.skipped else ""
        raise SystemExit(f"{where} must have utterances for train, dev and test. Found: {counts}{skipped}{first}")
    return corpus


def read_manifests(paths: list[str]) -> Corpus:
    """JSON lines with `audio_filepath` (absolute, or relative to the file), `text` and, if known, `duration`, as NeMo.

    Of three files, the first is train, the second dev, the third test. In one file, `"split"` says it; without it,
    5 % of the utterances each are dev and test, drawn by the names of their files.

    Args:
        paths: one or three files.
    """
    if len(paths) not in (1, 3):
        raise SystemExit(f"Give one manifest, or three for train, dev and test. Received: {len(paths)}")
    corpus = Corpus()
    for number, path in enumerate(map(Path, paths)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"The manifest {path} cannot be read: {error}") from error
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                audio, text = str(entry["audio_filepath"]), str(entry["text"])
                split = SPLITS[number] if len(paths) == 3 else str(entry.get("split") or _split_of(audio))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                corpus.skip(f"{path}:{n}", f"no JSON object with audio_filepath and text ({error!r})")
                continue
            if split not in SPLITS:
                corpus.skip(f"{path}:{n}", f"split must be one of {SPLITS}, not {split!r}")
                continue
            _add(corpus, path.parent / audio, text, split)
    return corpus


def read_librispeech(folder: Path) -> Corpus:
    """Folders speaker/chapter with `*.flac` (or another format) and a `*.trans.txt`: a line with name and text each.

    Folders `train*`, `dev*` and `test*` above them say what is for what, as in LibriSpeech itself; without them, 5 % of
    the speakers each (at least one) are dev and test.
    """
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise SystemExit(f"There is no speaker/chapter/*.trans.txt in {folder}")
    speakers = sorted({path.parent.parent.name for path in transcripts})
    order = [speakers[n] for n in np.random.default_rng(0).permutation(len(speakers))]
    share = max(1, round(0.05 * len(order)))
    drawn = {**dict.fromkeys(order[:share], "dev"), **dict.fromkeys(order[share : 2 * share], "test")}
    corpus = Corpus()
    for path in transcripts:
        above = [part for part in path.relative_to(folder).parts[:-3] if part.startswith(SPLITS)]
        named = next((split for split in SPLITS for part in above if part.startswith(split)), None)
        split = named or drawn.get(path.parent.parent.name, "train")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            corpus.skip(path, f"cannot be read: {error}")
            continue
        files = {file.stem: file for file in sorted(path.parent.iterdir()) if not file.name.endswith(".txt")}
        for line in filter(str.strip, lines):
            name, _, text = line.strip().partition(" ")
            _add(corpus, files.get(name, path.parent / f"{name}.flac"), text, split)
    return corpus


def _add(corpus: Corpus, audio: Path, text: str, split: str) -> None:
    text = normalized(text)
    if not text:
        corpus.skip(audio, "no letter in its text")
    elif not audio.is_file():
        corpus.skip(audio, "no such file")
    else:
        corpus.utterances.append(Utterance(audio, text, split))


def _split_of(name: str) -> str:
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "dev" if drawn < 0.05 else "test" if drawn < 0.1 else "train"
