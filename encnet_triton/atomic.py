"""Text files that are there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 file; one that was there before is replaced at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file."""
    write_text(json.dumps(document, indent=2) + "\n", path)
