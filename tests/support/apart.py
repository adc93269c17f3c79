"""Runs a function in its own process with a time limit: an error on a GPU ends only that process.

`python -m tests.support.apart MODULE FUNCTION ARGUMENTS`, the arguments as a JSON list.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def assert_passes_apart(function: Callable[..., None], *arguments: Any, limit: float = 180) -> None:
    """Fails with the sentence that the process ended with, or where it takes too long (seconds)."""
    told = [function.__module__, function.__name__, json.dumps(arguments)]
    try:
        run = subprocess.run(
            [sys.executable, "-m", "tests.support.apart", *told],
            capture_output=True, text=True, cwd=ROOT, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.fail(f"{function.__name__}{arguments}: no end after {limit:g} s", pytrace=False)
    if run.returncode < 0:
        pytest.fail(f"{function.__name__}{arguments}: killed by signal {-run.returncode}", False)
    if run.returncode:
        said = run.stderr.strip().splitlines() or ["no message"]
        pytest.fail(f"{function.__name__}{arguments}: {said[-1]}", pytrace=False)


def main(module: str, function: str, arguments: str) -> None:
    try:
        getattr(importlib.import_module(module), function)(*json.loads(arguments))
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        sys.exit(f"{type(error).__name__}: {lines[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
