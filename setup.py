"""Everything static is in pyproject.toml; this file builds the native core, libkbs, by CMake.

The library has a plain C interface and links neither Python nor TensorFlow, so one wheel serves every Python 3 of a
platform.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "keras_blocksparse" / "native"


class BuildNative(build_py):
    """Builds libkbs into the package: beside the sources for an editable install, else into the build folder."""

    def run(self) -> None:
        """Runs CMake after the Python files are in place."""
        super().run()
        package = NATIVE.parent if self.editable_mode else Path(self.build_lib, "keras_blocksparse")
        build_native(package.resolve() / "native" / "lib", ROOT / "build" / "native")


def build_native(output: Path, folder: Path) -> None:
    """Configures and builds; says what is missing where it cannot."""
    if not shutil.which("cmake"):
        raise SystemExit("keras_blocksparse needs CMake 3.18 or newer to build its native core: pip install cmake")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise SystemExit(
            f"keras_blocksparse needs a C++17 compiler, such as g++ (Debian: apt install g++). Not found: {compiler!r}"
        )
    subprocess.run(["cmake", "-S", str(NATIVE), "-B", str(folder), f"-DKBS_OUTPUT={output}"], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)


class PlatformDistribution(Distribution):
    """Has a library for one platform, although nothing in it is a Python extension module."""

    def has_ext_modules(self) -> bool:
        """See the class."""
        return True


class Python3Wheel(bdist_wheel):
    """A wheel for any Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """See the class."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildNative, "bdist_wheel": Python3Wheel})
