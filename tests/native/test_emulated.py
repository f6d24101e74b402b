"""The NEON kernels, cross-compiled and run under an emulator where there is one."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import keras_blocksparse

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CHECK = Path(__file__).parent / "check.cc"


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder, compiler, *options):
    """libkbs and the check, for a machine."""
    native = next(Path(path, "native") for path in keras_blocksparse.__path__)
    run("cmake", "-S", native, "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler}", f"-DKBS_OUTPUT={folder}", *options)
    run("cmake", "--build", folder, "-j2")
    check = folder / "check"
    include = f"-I{native / 'include'}"
    run(
        compiler,
        "-std=c++17",
        "-O1",
        "-pthread",
        include,
        CHECK,
        "-o",
        check,
        f"-L{folder}",
        "-lkbs",
        f"-Wl,-rpath,{folder}",
    )
    return check


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}")
@pytest.mark.skipif(platform.machine() == "aarch64", reason="the kernels run here as they are")
def test_neon_under_an_emulator(tmp_path):
    check = build(tmp_path, COMPILER, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    system = ("-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={tmp_path}")
    assert run(EMULATOR, "-cpu", "max", *system, check) == "neondot: 0 wrong\n"
    assert run(EMULATOR, "-cpu", "max", *system, check, KBS_ISA="neon") == "neon: 0 wrong\n"
    # A CPU without the dot-product extension.
    assert run(EMULATOR, "-cpu", "cortex-a53", *system, check) == "neon: 0 wrong\n"
    assert run(EMULATOR, "-cpu", "max", *system, check, KBS_ISA="baseline") == "baseline: 0 wrong\n"
