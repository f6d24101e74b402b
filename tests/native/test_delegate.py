"""The delegate without TFLite, which does not survive sanitizers: results against plain loops, hostile graphs, failing
allocations, threads, and the fuzzers' seeds. What libFuzzer does for hours (`make fuzz`), this does for a moment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import keras_blocksparse
from keras_blocksparse.sparse import _native

HERE = Path(__file__).parent
NATIVE = next(Path(path, "native") for path in keras_blocksparse.__path__)
DELEGATE = "tflite/*.cc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiles_sanitized(folder):
    source = folder / "main.cc"
    source.write_text("int main() { return 0; }\n")
    command = ["g++", *SANITIZE, str(source), "-o", str(folder / "main")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles a program of some of our sources, sanitized, against the library as it is installed."""
    folder = tmp_path_factory.mktemp("delegate")
    if not shutil.which("g++") or not compiles_sanitized(folder):
        pytest.skip("needs g++ with the address sanitizer")
    library = _native.library_path().parent

    def compiled(name, sources, *options):
        includes = [f"-I{NATIVE / place}" for place in ("include", "src", "tflite")]
        sources = [HERE / f"{name}.cc", *sorted(NATIVE.glob(sources))]
        command = ["g++", "-std=c++17", "-g", "-O1", "-pthread", "-Wno-psabi", *SANITIZE, *options, *includes, *sources]
        command += ["-o", folder / name, f"-L{library}", "-lkbs", f"-Wl,-rpath,{library}"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / name

    return compiled


def run(*command):
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "KBS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_delegate_under_sanitizers(build):
    check = build("check_delegate", DELEGATE, "-Wl,--wrap=malloc")
    for what in ("results", "hostile", "memory", "threads"):
        output = run(check, what)
        assert output.startswith(f"{what}: ")
        assert output.endswith(" 0 wrong\n")
        assert int(output.split()[1]) >= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "sources", "runs"), [("delegate", DELEGATE, 3000), ("packed", "src/error.cc", 20000)]
)
def test_seeds_of_the_fuzzers_under_sanitizers(target, sources, runs, build):
    program = build(f"fuzz_{target}", sources, "-DKBS_MAIN")
    seeds = sorted((HERE / "corpus" / target).iterdir())
    assert len(seeds) >= 40
    assert run(program, f"-runs={runs}", *seeds) == f"{len(seeds) + runs} inputs\n"
