"""The project as a user meets it: what importing loads, which names there are, what the README promises."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest

import keras_blocksparse as kbs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEVER_IMPORTED = (
    "tensorflow_model_optimization",
    "tensorflow_io",
    "matplotlib",
    "tensorboard",
    "ai_edge_litert",
    "rich",
)


def run(*arguments: str, cwd: Path = ROOT) -> str:
    """The output of a fresh Python, where nothing is imported yet."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_keras_and_ourselves_but_no_extra_and_is_quick():
    code = (
        "import sys, time, keras; before, start = set(sys.modules), time.perf_counter()\n"
        "import keras_blocksparse\n"
        "print(time.perf_counter() - start, *sorted(set(sys.modules) - before))"
    )
    seconds, *added = run("-c", code).split()
    assert float(seconds) <= 0.3
    assert "keras_blocksparse" in added
    tops = {name.split(".")[0] for name in added}
    assert not tops & set(NEVER_IMPORTED)
    foreign = {top for top in tops if top != "keras_blocksparse" and top not in sys.stdlib_module_names}
    assert not foreign, f"import keras_blocksparse loads {sorted(foreign)}, which import keras does not"


def test_every_public_name_exists_and_is_documented():
    assert len(set(kbs.__all__)) == len(kbs.__all__)
    for name in kbs.__all__:
        if name.startswith("__"):
            continue
        value = getattr(kbs, name)
        assert inspect.getdoc(value), f"kbs.{name} has no docstring"


def test_the_version_is_told_once():
    assert kbs.__version__ == PROJECT["version"] == importlib.metadata.version("keras_blocksparse")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


@pytest.mark.parametrize("example", sorted(path.parent.name for path in ROOT.glob("examples/*/__main__.py")))
def test_every_example_tells_its_options(example):
    usage = run("-m", f"examples.{example}", "--help")
    assert "--quick" in usage or "--preset {smoke}" in usage  # there is a way to try it in a minute


def test_the_readme_names_the_two_commands_and_its_code_runs(tmp_path):
    readme = ROOT / "README.md"
    assert "make demo" in readme.read_text()
    assert "make test" in readme.read_text()
    (block,) = python_blocks(readme)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    run_script(tmp_path, data((100, 64)) + shrunk(block))
    assert (tmp_path / "model.tflite").stat().st_size > 0


def test_the_guides_code_runs(tmp_path):
    blocks = python_blocks(ROOT / "docs" / "guide.md")
    if not hasattr(keras, "distillation"):  # of Keras 3.12
        blocks = [block for block in blocks if "keras.distillation" not in block]
    code = "\n".join(blocks)
    out = run_script(tmp_path, data((20, 32)) + code)
    assert "of the pruned weights are zero" in out


def test_the_api_page_shows_every_public_name():
    shown = re.findall(r"^::: keras_blocksparse\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(name for name in kbs.__all__ if not name.startswith("__"))
    shown += re.findall(r"^::: keras_blocksparse\.lite\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(kbs.lite.__all__) <= set(shown)


def data(shape: tuple[int, ...], utterances: int = 160) -> str:
    """Code that makes the `x` and `y` of the pages' code."""
    size = (utterances, *shape)
    return f"import numpy as np\nx, y = np.random.rand(*{size}).astype('float32'), np.arange({utterances}) % 9\n"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_script(folder: Path, code: str) -> str:
    script = folder / "page.py"
    script.write_text(code)
    return run("-W", "error::UserWarning", str(script), cwd=folder)


def shrunk(block: str) -> str:
    """The README's code with a network and a schedule small enough for a test."""
    for pattern, small in [
        (r"GRU\(\d+\)", "GRU(96)"),
        (r"begin_step=\d+", "begin_step=1"),
        (r"end_step=\d+", "end_step=4"),
    ]:
        block, found = re.subn(pattern, small, block)
        assert found, f"the README's code no longer has {pattern}"
    return block


@pytest.mark.parametrize(
    "command",
    ["help", "-n demo", "-n test", "-n lint", "-n docs", "-n bench", "-n fuzz", "-n lite-matrix", "-n aarch64"],
)
def test_make_knows_its_commands(command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_of_a_machine_is_in_the_tree():
    """No absolute home or work paths, and no large files, among what git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 1 << 20, f"{name} is over 1 MB"
        assert not re.search(rb"(?<![\w.])/(?:root|home)/\w", path.read_bytes()), f"{name} has a path of a machine"
