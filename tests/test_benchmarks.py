"""What the benchmarks write: no times here, but that their numbers are told rightly."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks._opus import _pack
from benchmarks._report import Bar, Table, bars_table, page, time_text, write
from benchmarks.lite_matrix import ENVIRONMENTS, KINDS, Outcome, cell

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5e-6, "1.50 us"), (152.4e-6, "152 us"), (9.214e-3, "9.21 ms"), (0.99951, "1.00 s"), (99.96e-6, "100 us"),
     (83, "83.0 s")],
)  # fmt: skip
def test_times_have_three_digits(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [(5.0, False, "met"), (4.0, False, "MISSED, 20% off"), (4.0, True, "met"), (6.0, True, "MISSED, 20% off"),
     (None, False, "-")],
)  # fmt: skip
def test_a_bar_is_met_or_missed_by_so_much(measured, at_most, verdict):
    bar = Bar("a product", "{} the other", 5, measured, "1 us, 2 us", at_most)
    assert bar.row()[-1] == verdict
    assert bar.row()[1] == ("<= 5x the other" if at_most else ">= 5x the other")


def test_a_bar_just_missed_does_not_read_as_its_bound():
    row = Bar("a product", "{} of the peak", 0.9, 0.898, unit="%").row()
    assert row[2] == "89.8%"
    assert row[-1].startswith("MISSED")
    assert Bar("a gain", "gain {}", 0.0, -0.012, unit="%").row()[-1] == "MISSED"


def test_a_page_has_the_bars_first_then_pictures_then_tables(tmp_path):
    other = Table("Others", ("", "batch 1"), [("ours", "1 us")], note="A note.")
    text = page("Title", "python -m it", "Lead.", "A machine", [bars_table([]), other], {"a_b.svg": "A sentence."})
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Title", "## Bars", "## Pictures", "## Others",
    ]  # fmt: skip
    assert "![a b](a_b.svg)\n\nA sentence." in text
    assert "|  | batch 1 |\n|---|---:|\n| ours | 1 us |\n\nA note." in text
    write(tmp_path / "new" / "page.md", text)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.md"]


def test_opus_gets_the_blocks_it_walks_over():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 24)) * np.kron(rng.random((3, 3)) < 0.5, np.ones((4, 8)))
    index, blocks = _pack(w)
    x, y, place, block = rng.standard_normal(12), np.zeros(24), 0, 0
    for output in range(0, 24, 8):
        count, place = index[place], place + 1
        for first in index[place : place + count]:
            y[output : output + 8] += x[first : first + 4] @ blocks[block]
            block += 1
        place += count
    assert (place, block) == (len(index), len(blocks))
    np.testing.assert_allclose(y, x @ w)


@pytest.mark.parametrize(
    ("title", "composites", "delegate", "result", "text", "good"),
    [
        ("composite, float32", True, False, "ok", "1e-07", True),
        ("composite, float32", True, False, "wrong: off by 1", "gru: wrong: off by 1", False),
        ("composite, float32", True, True, "died of signal 11", "gru: died of signal 11", False),
        ("composite, float32", False, True, "cannot load", "refused", True),
        ("composite, float32", False, True, "died of signal 11", "died of signal 11", False),
        ("custom, float32", True, False, "cannot load", "refused", True),
        ("custom, float32", False, True, "ok", "1e-07", True),
        ("stock, float32", False, False, "cannot load", "gru: cannot load", False),
    ],
)
def test_a_runtime_is_as_it_should_be(title, composites, delegate, result, text, good):
    number = next(i for i, kind in enumerate(KINDS) if kind.title == title)
    kind = dataclasses.replace(KINDS[number], models=("gru",))
    environment = next(e for e in ENVIRONMENTS if e.composites is composites)
    key = f"{number}/gru/{int(delegate)}"
    outcome = Outcome("1.0", {key: result}, {key: 1e-7})
    assert cell(kind, number, environment, outcome, delegate) == (text, good)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ai_edge_litert"), reason="needs ai-edge-litert")
def test_the_device_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device", "--quick", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "device.md").read_text()
    for words in ("## Bars", "ours, float32", "stock 1x16-sparse int8", "## Streaming", "peak memory"):
        assert words in text
    assert (tmp_path / "device.svg").stat().st_size > 0
