"""Work in fresh processes, and what they printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class Failed(ValueError):
    """A process of a command ended with an error; the message is the last line of it."""


def first_line(text: object) -> str:
    """Of an error, or of what was printed; "no message" if there is none."""
    return (str(text).strip().splitlines() or ["no message"])[0][:300]


def last_line(text: object) -> str:
    """As `first_line`."""
    return (str(text).strip().splitlines() or ["no message"])[-1][:300]


def complaint(printed: str) -> str:
    """The first line about an error, else the last one."""
    lines = printed.splitlines()
    return next((line.strip()[:300] for line in lines if "rror" in line), last_line(printed))


def measured(arguments: Sequence[str]) -> dict[str, Any]:
    """What `python -m bench` with these arguments finds in a fresh process: its last line, JSON.

    Raises:
        Failed: it ended with an error.
    """
    command = [sys.executable, "-m", "bench", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        said = last_line(run.stderr) if run.stderr.strip() else f"status {run.returncode}"
        raise Failed(said.removeprefix("error: "))
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found
