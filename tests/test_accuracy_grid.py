"""The grid of trainings: its file, the runner, and the pages, without any training."""

import json
import math
import re
import sys
import tomllib

import pytest

from benchmarks.accuracy import device, grid, results, running, summary, tables
from benchmarks.accuracy.grid import Run

FILE = """
[networks.a]
title = "A"
lead = "A network."
program = "program_a"
options = { cell = "gru", fast = true, slow = false }
values = { units = 8 }
[networks.b]
title = "B"
lead = "Another."
program = "program_b"
options = {}

[[rows]]
name = "dense"
seeds = 2
options = { algorithm = "dense" }
[[rows]]
name = "bp"
seeds = 1
networks = ["a"]
options = { algorithm = "bp", block-size = [4, 4], q-from = "@dense" }
[[rows]]
name = "wide"
like = "dense"
seeds = 1
options = { units = "$units", deep = "$deep?", batch = "$units?" }

[[tables]]
title = "Table 2"
rows = ["dense", "bp", "wide"]
note = "A note."
[[tables]]
title = "Of the other"
networks = ["b"]
rows = ["dense", "bp"]
[[tables]]
title = "What matters"
device = false
split = "dev"
rows = ["dense", "bp"]
[[bars]]
row = "bp"
against = "dense"
loss_at_most = 0.02
networks = ["a"]
[[bars]]
row = "wide"
against = "dense"
why = "as the paper"
gain_at_least = 0.05
networks = ["a"]
[pictures]
masks = ["bp"]
parameters = { dense = ["dense", "wide"], sparse = ["bp"] }
sparsity = { bp = ["bp", "dense"] }
course = { BP = ["bp"] }
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(FILE)
    return path


def outcome(score=1.0, **others):
    course = {"losses": [3.0, 2.0], "zeros": [0.0, 0.9], "seconds": 60.0, "cpu_seconds": 50.0}
    return {
        "scores": {"dev": score, "test": score}, "unit": "errors", "parameters": 2000, "kept_parameters": 500,
        "sparsity": 0.9, "sparsity_by_weight": {}, "course": course, "versions": {"keras": "3"}, **others,
    }  # fmt: skip


def test_all_runs_of_one_seed_come_before_the_next(file):
    runs = grid.load(file)
    assert [run.name for run in runs] == ["a/dense/0", "b/dense/0", "a/bp/0", "a/wide/0", "a/dense/1", "b/dense/1"]
    assert runs[2].others == {"a/dense/0"}
    assert runs[2].arguments == [
        "--cell", "gru", "--fast", "--no-slow", "--algorithm", "bp", "--block-size", "4", "4",
        "--q-from", "@a/dense/0", "--seed", "0",
    ]  # fmt: skip
    assert runs[3].arguments[-8:] == ["--algorithm", "dense", "--units", "8", "--batch", "8", "--seed", "0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("networks = [\"a\"]\noptions = { algorithm = \"bp\"", "networks = [\"c\"]\noptions = { algorithm = \"bp\""),
         "row 'bp' is for ['c']"),
        (('"@dense"', '"@thin"'), "a/bp/0 needs a/thin/0"),
        (('like = "dense"', 'like = "thin"'), "row 'wide' is like 'thin', which is no row before it"),
        (('name = "wide"', 'name = "dense"'), "a/dense/0 is there twice"),
    ],
)  # fmt: skip
def test_a_grid_that_makes_no_sense_is_refused(file, change, message):
    file.write_text(FILE.replace(*change))
    with pytest.raises(ValueError, match=re.escape(message)):
        grid.load(file)


def test_a_network_can_do_with_fewer_seeds(file):
    file.write_text(FILE.replace("options = {}", "options = {}\nseeds = 1"))
    assert [run.name for run in grid.load(file)] == ["a/dense/0", "b/dense/0", "a/bp/0", "a/wide/0", "a/dense/1"]


def test_a_run_can_need_models_of_several_seeds(file):
    file.write_text(FILE.replace('"@dense"', '["@dense/0", "@dense/1", "@wide"]'))
    run = next(run for run in grid.load(file) if run.row == "bp")
    assert run.others == {"a/dense/0", "a/dense/1", "a/wide/0"}
    assert run.arguments[-6:] == ["--q-from", "@a/dense/0", "@a/dense/1", "@a/wide/0", "--seed", "0"]


def test_runs_are_picked_by_name_with_what_they_need(file):
    runs = grid.load(file)
    assert [run.name for run in grid.pick(runs, "a/bp")] == ["a/dense/0", "a/bp/0"]
    assert grid.pick(runs, None) == runs
    with pytest.raises(SystemExit, match="No run's name has 'c/'"):
        grid.pick(runs, "c/")


def test_the_projects_grid_is_one_its_programs_understand():
    runs = grid.load()
    content = tomllib.loads(grid.GRID.read_text())
    rows = {run.row for run in runs}
    assert rows == {row["name"] for row in content["rows"]}
    for table in content["tables"]:
        assert set(table["rows"]) <= rows
    for bar in content["bars"]:
        assert {bar["row"], bar["against"]} <= rows
        assert set(bar["networks"]) <= set(content["networks"])
    assert set(content["pictures"].pop("masks")) <= rows
    for lines in content["pictures"].values():
        assert {row for found in lines.values() for row in found} <= rows
    parsers = {}
    for program in {run.program for run in runs}:
        parsers[program] = __import__(f"{program}.__main__", fromlist=["parse_args"]).parse_args
    for run in runs:
        parsers[run.program]([*run.arguments, *running.ALWAYS])


class Programs:
    """Stands for the training programs."""

    def __init__(self, failing=(), **found):
        self.failing, self.found, self.commands = failing, found, []

    def __call__(self, command, log, core, lock):
        self.commands.append(command)
        if any(name in str(log) for name in self.failing):
            return 1
        (log.parent / "result.json").write_text(json.dumps(outcome(settings={}, task="x", **self.found)))
        return 0


def test_what_is_missing_is_run_once_and_after_what_it_needs(file, tmp_path):
    runs, programs, path = grid.load(file), Programs(), tmp_path / "results.jsonl"
    make = lambda: running.Runner(runs, 2, tmp_path / "work", path, programs)  # noqa: E731
    make().go()
    assert len(programs.commands) == 6
    (bp,) = [command for command in programs.commands if "bp" in command]
    assert bp[:3] == [sys.executable, "-m", "program_a"]
    assert bp[bp.index("--q-from") + 1] == str(tmp_path / "work/a/dense/0/model.keras")
    assert programs.commands.index(bp) > 0
    assert bp[-2:] == ["--output", str(tmp_path / "work/a/bp/0")]
    lines = results.load(path)
    assert sorted(line["run"] for line in lines) == sorted(run.name for run in runs)
    assert all(len(line["commit"].split("+")[0]) == 12 and line["cpu"] for line in lines)
    make().go()
    assert len(programs.commands) == 6
    for change, more in ((("units = 8", "units = 9"), 1), (('cell = "gru"', 'cell = "lstm"'), 4)):
        file.write_text(FILE.replace(*change))
        before = len(programs.commands)
        running.Runner(grid.load(file), 2, tmp_path / "work", path, programs).go()
        assert len(programs.commands) - before == more
        assert set(results.of_runs(grid.load(file), results.load(path))) == {run.name for run in runs}


def test_a_model_that_is_needed_and_gone_is_trained_again_but_its_result_stays(file, tmp_path):
    runs, programs, path = grid.load(file), Programs(), tmp_path / "results.jsonl"
    running.Runner([run for run in runs if run.row == "dense"], 1, tmp_path / "there", path, programs).go()
    before = results.load(path)
    running.Runner(runs, 1, tmp_path / "here", path, programs).go()
    assert [name for command in programs.commands for name in command[-1:] if "a/dense/0" in name] == [
        str(tmp_path / folder / "a/dense/0") for folder in ("there", "here")
    ]
    after = results.load(path)
    assert after[: len(before)] == before
    assert sorted(line["run"] for line in after) == sorted(run.name for run in runs)


def test_a_model_that_comes_out_otherwise_when_trained_again_counts_as_it_is_now(file, tmp_path):
    runs, path = grid.load(file), tmp_path / "results.jsonl"
    running.Runner([run for run in runs if run.name == "a/dense/0"], 1, tmp_path / "there", path, Programs()).go()
    scores = {"dev": 0.3, "test": 0.4}
    running.Runner(runs, 1, tmp_path / "here", path, Programs(scores=scores)).go()
    first, *_ = lines = results.load(path)
    assert [line["run"] for line in lines].count("a/dense/0") == 2
    assert first["scores"] != scores == results.of_runs(runs, lines)["a/dense/0"]["scores"]


def test_what_depends_on_another_run_is_done_again_when_that_changes(file, tmp_path):
    path = tmp_path / "results.jsonl"
    running.Runner(grid.load(file), 1, tmp_path / "work", path, Programs()).go()
    file.write_text(FILE.replace('{ algorithm = "dense" }', '{ algorithm = "dense", dropout = 0.5 }'))
    changed = grid.load(file)
    assert "a/bp/0" not in results.of_runs(changed, results.load(path))


def test_a_run_that_fails_is_named_and_the_others_are_done(file, tmp_path):
    path = tmp_path / "results.jsonl"
    runner = running.Runner(grid.load(file), 1, tmp_path / "work", path, Programs(failing=["a/dense/0"]))
    with pytest.raises(SystemExit, match="2 failed: a/dense/0, a/bp/0"):
        runner.go()
    assert {line["run"] for line in results.load(path)} == {"b/dense/0", "a/wide/0", "a/dense/1", "b/dense/1"}


def test_two_runners_do_not_do_the_same_work(file, tmp_path):
    seen = []

    def other(command, log, core, lock):
        with pytest.raises(SystemExit, match="Another process is running the grid"):
            running.Runner(grid.load(file), 1, tmp_path / "work", tmp_path / "results.jsonl", Programs()).go()
        seen.append(lock)
        return 1

    with pytest.raises(SystemExit, match="6 failed"):
        running.Runner(grid.load(file), 1, tmp_path / "work", tmp_path / "results.jsonl", other).go()
    assert seen


def test_a_command_is_run_on_its_core_with_its_output_in_the_log(tmp_path):
    code = "import os, sys; print(os.sched_getaffinity(0), os.environ['TF_CPP_MIN_LOG_LEVEL']); sys.exit(3)"
    with (tmp_path / "lock").open("w") as lock:
        assert running.execute([sys.executable, "-c", code], tmp_path / "log.txt", 0, lock.fileno()) == 3
    assert (tmp_path / "log.txt").read_text() == "{0} 3\n"


def test_a_damaged_results_file_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": "a", "arguments": [], "others": {}, "scores": {}}\n{"run"\n')
    with pytest.raises(SystemExit, match="results.jsonl:2 is no result"):
        results.load(path)


def cell(row, **scores):
    return summary.Cell("a", row, [outcome(score) | {"run": f"a/{row}/{seed[1:]}"} for seed, score in scores.items()])


def test_figures_are_means_with_standard_errors():
    dense = cell("dense", s0=1.0, s1=1.2, s2=1.1)
    assert dense.score("test").mean == pytest.approx(1.1)
    assert dense.score("test").error == pytest.approx(0.1 / math.sqrt(3))
    assert dense.score("dev").text(2) == "1.10 ± 0.06"


def test_gains_are_over_the_seeds_that_both_have():
    dense, sparse = cell("dense", s0=1.0, s1=1.2, s2=7.0), cell("bp", s0=1.2, s1=1.3)
    gain = sparse.gain(dense, "test")
    assert gain.mean == pytest.approx((1.1 - 1.25) / 1.1)
    assert gain.error == pytest.approx(1.25 / 1.1 * math.hypot(0.05 / 1.25, 0.1 / 1.1))
    assert gain.percent().startswith("-13.6 ± ")
    other = cell("gl", s5=2.0).gain(cell("dense", s0=1.0, s1=3.0), "test")  # none in common: all there are
    assert other.mean == 0
    assert summary.Figure.of([-0.0004]).percent() == "+0.0 %"
    assert summary.Figure.of([2.0]).text(1) == "2.0"


def test_bars_say_by_how_many_seeds_and_when_chance_could_turn_them():
    of_network = {"dense": cell("dense", s0=1.0, s1=1.2), "bp": cell("bp", s0=1.0, s1=1.19, s2=9.0)}
    of_network["gl"] = cell("gl", s0=1.4, s1=1.66)
    asked = [
        {"row": row, "against": "dense", "networks": ["a"], kind: bound}
        for row, kind, bound in (
            ("bp", "gain_at_least", 0.0),
            ("bp", "gain_at_least", 0.05),
            ("gl", "loss_at_most", 0.4),
        )
    ]
    rows = [bar.row() for bar in tables.bars(of_network, asked, "a")]
    assert [verdict for *_, verdict in rows] == [
        "met within its error",
        "MISSED within its error, 91% off",
        "met within its error",
    ]
    assert rows[0][3].startswith("+0.5 ± ")
    assert rows[0][3].endswith(" %, 2 seeds")
    asked[2]["loss_at_most"] = 0.1
    assert tables.bars(of_network, asked, "a")[2].row()[-1].startswith("MISSED, ")


def test_pages_show_tables_bars_and_what_was_not_run(file, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.device, "of_rows", lambda runs: {})
    runs, path = grid.load(file), tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match="There are no results"):
        tables.write_pages(runs, tmp_path / "docs", file, path)
    scores = {"a/dense/0": 1.0, "a/dense/1": 1.2, "a/bp/0": 1.11}
    for run in runs:
        if run.name in scores:
            results.append(
                outcome(scores[run.name])
                | {"run": run.name, "arguments": run.arguments, "others": results.others(run, runs), "cpu": "a cpu"},
                path,
            )
    results.append(outcome(9.0) | {"run": "a/wide/0", "arguments": ["--other"], "others": {}, "cpu": "a cpu"}, path)
    for run in runs[:3]:
        folder = running.folder_of(run.name, tmp_path / "work")
        folder.mkdir(parents=True)
        (folder / "masks.png").write_bytes(run.name.encode())
        (folder / running.MADE_BY).write_text(json.dumps(run.arguments))
    tables.device.keep_masks(runs, ["bp"], tmp_path / "docs", tmp_path / "work")
    assert [path.read_bytes() for path in (tmp_path / "docs").iterdir()] == [b"a/bp/0"]
    index = tmp_path / "docs/index.md"
    index.write_text("No marks.")
    with pytest.raises(SystemExit, match=r"index\.md should have the lines <!-- written by python -m benchmarks"):
        tables.write_pages(runs, tmp_path / "docs", file, path)
    begin = "<!-- written by python -m benchmarks.accuracy tables: begin -->"
    index.write_text(f"Before.\n\n{begin}\n\nold\n\n<!-- end -->\n\nAfter.\n")
    tables.write_pages(runs, tmp_path / "docs", file, path)
    once = index.read_text()
    tables.write_pages(runs, tmp_path / "docs", file, path)
    assert index.read_text() == once
    assert once.startswith(f"Before.\n\n{begin}\n\n## Where it stands\n\n|  | [A](a.md) |\n")
    assert "| runs done | 3 of 4 |" in once
    assert "| bp against dense | -11.0 %, 1 seed; loss <= 2%: **MISSED** |" in once
    assert "| wide against dense (as the paper) | not measured |" in once
    assert once.endswith("|\n\n<!-- end -->\n\nAfter.\n")
    text = (tmp_path / "docs/a.md").read_text()
    assert "3 of 4 runs are done" in text
    assert "| bp (1 seed) | 2 k | 0 k | 90.0 % | 1.1100 | -11.0 % |" in text.replace("0.5 k", "0 k")
    assert "| dense (2 seeds) | 2 k | 0 k | 90.0 % | 1.1000 ± 0.1000 | 0 |" in text
    assert "| wide | not run yet |" in text
    assert "Of the other" not in text
    after = text.partition("What matters")[2]
    assert "errors, dev | relative |\n" in after
    assert " file" not in after
    assert "| bp against dense | loss <= 2% | 11% |" in text
    assert "| wide against dense (as the paper) | gain >= 5% | not measured |" in text
    assert "The blocks that are kept, of bp." in text
    assert (tmp_path / "docs/a-course.svg").exists()
    assert not (tmp_path / "docs/a-parameters.svg").exists()
    assert not (tmp_path / "docs/b.md").exists()


def test_sizes_and_latencies_are_against_the_dense_networks_stock_file(file, tmp_path):
    def line(stock, fast, ms, fast_ms):
        latency = {"latency_ms": {"tf.lite": ms, "ai_edge_litert": ms + 1}}
        fast_latency = {"latency_ms": {"tf.lite": 0.1, "tf.lite with delegate": fast_ms}}
        return {"stock": {"bytes": stock, **latency}, "fast": {"bytes": fast, **fast_latency}}

    base, sparse = line(10240, 10240, 8.0, 9.0), line(2048, 1024, 4.0, 0.5)
    assert tables._device(base, base) == ["10 KiB (1.0x)", "8.00 ms (1.0x)", "10 KiB (1.0x)", "9.00 ms (0.9x)"]
    assert tables._device(sparse, base) == ["2 KiB (5.0x)", "2.0x", "1 KiB (10.0x)", "16.0x"]
    slower_day = sparse | {"dense": line(10240, 10240, 16.0, 18.0)}
    assert tables._device(slower_day, base) == ["2 KiB (5.0x)", "4.0x", "1 KiB (10.0x)", "32.0x"]
    assert tables._device(sparse, None)[1] == "4.00 ms"
    assert tables._device(None, base) == ["-"] * 4


def test_a_row_is_measured_once_by_whichever_seed_is_at_hand(file, tmp_path, monkeypatch):
    runs, path, found = grid.load(file), tmp_path / "device.jsonl", tmp_path / "results.jsonl"
    for run in runs:
        about = {"run": run.name, "arguments": run.arguments, "others": results.others(run, runs), "cpu": "a cpu"}
        results.append(outcome(1.0) | about, found)
    with pytest.raises(SystemExit, match="no trained model"):
        device.measure(runs, runs, tmp_path / "work", path, found)
    latency = {"bytes": 1, "latency_ms": {"tf.lite": 1.0}}
    measured = []

    def measure(paths):
        measured.append([path.parent for path in paths])
        return [{"stock": latency | {"bytes": number}, "fast": latency} for number in range(len(paths))]

    monkeypatch.setattr(device, "_measured", measure)
    work = tmp_path / "work"

    def train(name):
        run = next(run for run in runs if run.name == name)
        folder = running.folder_of(name, work)
        folder.mkdir(parents=True)
        (folder / running.MADE_BY).write_text(json.dumps(run.arguments))
        device.measure([run], runs, work, path, found)
        return folder

    sparse = train("a/bp/0")
    assert not measured, "there is nothing to compare it with"
    dense = train("a/dense/1")
    assert measured == [[dense]], "the only row that was asked for"
    train("a/dense/0")  # the row has its line
    assert measured == [[dense]]
    device.measure(runs, runs, work, path, found)
    assert measured[1:] == [[dense.with_name("0"), sparse]]
    rows = device.of_rows(runs, path)
    assert rows.keys() == {("a", "dense"), ("a", "bp")}
    assert rows["a", "bp"]["stock"]["bytes"] == 1
    assert rows["a", "bp"]["dense"]["stock"]["bytes"] == 0
    assert "dense" not in rows["a", "dense"]


def test_a_run_is_json_in_one_line():
    run = Run("a", "b c", 1, "p", {})
    assert run.name == "a/b c/1"
    assert running.folder_of(run.name, grid.FOLDER).name == "1"
    assert " " not in str(running.folder_of(run.name).relative_to(running.WORK))
