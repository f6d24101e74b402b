"""Builds the C++ example, runs exported files with it and compares the outputs with Keras.

`python -m examples.cpp.check` does so here. With `--aarch64` (`make aarch64`) everything is cross-compiled by Debian's
g++-aarch64-linux-gnu, the delegate as one self-contained library, and run under qemu-user against the LiteRT library
of the aarch64 wheel. With `--clang` the same is compiled by clang, as Android's NDK does. It proves function; times
under an emulator mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "keras_blocksparse" / "native"
LITERT = "ai-edge-litert==2.3.0"
PLATFORM = "manylinux_2_27_aarch64"
MAX_DELEGATE_BYTES = 400_000

# What LiteRT's processor detection reads; an emulator shows the host's own.
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


@dataclass(frozen=True)
class Machine:
    """How to build for a machine and run what was built: options of CMake, and the words before a command."""

    litert: Path
    delegate: Path
    cmake: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


def call(*command: Any, **options: Any) -> str:
    """Runs a command and returns what it printed; shows all of it if the command failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def litert_of_this_environment() -> Path:
    """LiteRT's library in the ai-edge-litert that is installed.

    Raises:
        ImportError: it is not.
    """
    spec = find_spec("ai_edge_litert")
    path = (
        Path(spec.submodule_search_locations[0], "libLiteRt.so") if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise ImportError(f"The C++ example needs LiteRT's library: pip install {LITERT}")
    return path


def build_example(machine: Machine, folder: Path) -> Path:
    """Compiles main.cc and returns the program."""
    call("cmake", "-S", Path(__file__).parent, "-B", folder, f"-DLITERT_LIBRARY={machine.litert}", *machine.cmake)
    call("cmake", "--build", folder)
    return folder / "run_tflite"


def run(
    machine: Machine, program: Path, file: Path, delegate: bool, inputs: Sequence[np.ndarray], folder: Path
) -> np.ndarray:
    """The first output of a file, flat."""
    paths = []
    for number, value in enumerate(inputs):
        paths.append(folder / f"input{number}.f32")
        np.ascontiguousarray(value, np.float32).tofile(paths[-1])
    printed = call(*machine.launcher, program, file, machine.delegate if delegate else "none", *paths)
    # LiteRT logs to standard output as well.
    line = next(line for line in printed.splitlines() if line.startswith("y "))
    return np.array(line.split()[1:], np.float32)


def make_models() -> dict[str, Any]:
    """Small models with zero blocks."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    stacks = {
        "gru": [layers.GRU(64, return_sequences=True), layers.Dense(16)],
        "bidirectional lstm": [layers.Bidirectional(layers.LSTM(32))],
        "simple_rnn": [layers.SimpleRNN(64)],
    }
    models = {name: keras.Sequential([keras.Input((8, 32)), *stack]) for name, stack in stacks.items()}
    rng = np.random.default_rng(0)
    for weight in (
        w for model in models.values() for w in model.weights if "dense" not in w.path and len(w.shape) == 2
    ):
        if "bias" in weight.path:
            weight.assign(rng.uniform(-0.5, 0.5, weight.shape))
            continue
        keep = rng.random((weight.shape[0] // 16, weight.shape[1] // 16)) < 0.3
        weight.assign(np.asarray(weight) * np.kron(keep, np.ones((16, 16))))
    return models


def compare(machine: Machine, program: Path, folder: Path) -> float:
    """Runs files of all models and number formats with the delegate and without; returns the largest float32 error.

    Raises:
        SystemExit: an output is not Keras's.
    """
    import keras_blocksparse as kbs

    x = np.random.default_rng(1).normal(size=(1, 8, 32)).astype(np.float32)
    worst = 0.0
    for name, model in make_models().items():
        expected = np.asarray(model(x)).reshape(-1)
        assert np.std(expected) > 1e-2, "an answer that could be right by chance"
        for quantize, tolerance in ((None, 1e-5), ("int8", 2e-2), ("bfloat16", 1e-2)):
            file = folder / f"{name.replace(' ', '_')}_{quantize or 'float32'}.tflite"
            kbs.export_tflite(model, file, "fast", quantize, validate=False, measure_latency=False)
            for delegate in (False, True):
                error = float(np.abs(run(machine, program, file, delegate, [x], folder) - expected).max())
                what = f"{name}, {quantize or 'float32'}, {'with' if delegate else 'without'} the delegate"
                print(f"{what}: largest difference from Keras {error:.1e}")
                if not error <= tolerance:
                    raise SystemExit(f"{what}: off by {error}, where {tolerance} is allowed")
                worst = max(worst, error if quantize is None else 0.0)
    return worst


# ---- aarch64


def aarch64(folder: Path, clang: bool) -> Machine:
    """Cross-builds the delegate and fetches LiteRT for aarch64.

    Raises:
        SystemExit: a tool is missing, or the delegate is too large.
    """
    tools = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "cmake": "cmake"}
    if clang:
        tools["clang++"] = "clang"
    missing = [package for tool, package in tools.items() if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"make aarch64 needs Debian's {' and '.join(missing)}: apt-get install {' '.join(missing)}")
    toolchain = [f"-DCMAKE_TOOLCHAIN_FILE={NATIVE / 'aarch64.cmake'}"]
    if clang:
        toolchain = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=clang++"]
        toolchain.append("-DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu")
    call("cmake", "-S", NATIVE, "-B", folder / "delegate", *toolchain, "-DKBS_STANDALONE=ON", f"-DKBS_OUTPUT={folder}")
    call("cmake", "--build", folder / "delegate", "--parallel", os.cpu_count() or 1)
    delegate = folder / "libkbs_tflite.so"
    size = delegate.stat().st_size
    print(f"{delegate}: {size:,} bytes, stripped")
    if size >= MAX_DELEGATE_BYTES:
        raise SystemExit(f"The delegate has {size} bytes, where {MAX_DELEGATE_BYTES} are allowed")

    wheel = folder / "wheel"
    litert = wheel / "ai_edge_litert" / "libLiteRt.so"
    if not litert.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        platform = ["--only-binary=:all:", "--platform", PLATFORM, "--python-version", "3.11"]
        call(*pip, *platform, "--dest", wheel, LITERT)
        with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
            archive.extractall(wheel)
    root = folder / "root"
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    if not (root / "lib").exists():
        (root / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    launcher = ("qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(root))
    return Machine(litert, delegate, tuple(toolchain), launcher)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m examples.cpp.check", description=__doc__)
    parser.add_argument("--aarch64", action="store_true", help="cross-compile, and run in an emulator")
    parser.add_argument("--clang", action="store_true", help="the same, compiled by clang")
    options = parser.parse_args(arguments)
    cross = options.aarch64 or options.clang
    folder = ROOT / "build" / ("aarch64-clang" if options.clang else "aarch64" if cross else "cpp")
    folder.mkdir(parents=True, exist_ok=True)
    if cross:
        machine = aarch64(folder, options.clang)
    else:
        from keras_blocksparse.lite import delegate_path

        machine = Machine(litert_of_this_environment(), delegate_path())
    compare(machine, build_example(machine, folder / "example"), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
