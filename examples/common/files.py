"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename, so that no half-written file is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path


def write_json(path: Path, facts: Any) -> Path:
    """Write facts as JSON, by `replace`."""
    return replace(path, (json.dumps(facts, indent=2) + "\n").encode())
