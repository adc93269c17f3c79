"""The compile report, made in its own process, and its rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bench.static.compile import bad

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_apart(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A Python process at the root of the checkout, not interpreting kernels unless asked."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | extra
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def compiled(factory: pytest.TempPathFactory, *arguments: str) -> list[Row]:
    """Rows of ``python -m bench static compile``, made once for all processes of a test run."""
    base = factory.getbasetemp()
    # Processes of pytest-xdist have folders of their own beside one another.
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = folder / ("compile " + " ".join(arguments).strip("-") + ".json")
    with FileLock(f"{file}.lock"):
        if file.exists():
            found: list[Row] = json.loads(file.read_text())
            return found
        return _compile(file, arguments)


def _compile(file: Path, arguments: tuple[str, ...]) -> list[Row]:
    """The command's exit status says whether any row is bad."""
    run = run_apart("-m", "bench", "static", "compile", *arguments, "--json", str(file))
    assert file.exists(), run.stderr
    found: list[Row] = json.loads(file.read_text())
    wrong = any(map(bad, found))
    assert run.returncode == int(wrong), run.stdout
    assert "not run" in run.stdout.splitlines()[0]
    return found


def faults(rows: list[Row]) -> dict[str, str]:
    """What is wrong with the kernels that are bad, by kernel, shape and configuration."""
    return {
        row["config"]: row["note"]
        or f"a stack of {row['stack_bytes']} bytes, {row['spill_bytes']} bytes spilled"
        for row in rows
        if bad(row)
    }


def select(rows: list[Row], op: str, direction: str, *dtypes: str) -> list[Row]:
    """Rows of one operator's calls; every one is of a default configuration."""
    wanted = (op, direction)
    found = [r for r in rows if (r["op"], r["direction"]) == wanted and r["dtype"] in dtypes]
    assert found
    assert all(row["default"] for row in found)
    return found
