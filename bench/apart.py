"""Run work in fresh processes and read what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class Failed(ValueError):
    """A process ended with an error; the message is the last line it printed."""


def first_line(text: object) -> str:
    """The first line of an error or of printed text; "no message" if there is none."""
    return (str(text).strip().splitlines() or ["no message"])[0][:300]


def last_line(text: object) -> str:
    """The last line; otherwise as `first_line`."""
    return (str(text).strip().splitlines() or ["no message"])[-1][:300]


def complaint(printed: str) -> str:
    """The first line that mentions an error, else the last line."""
    lines = printed.splitlines()
    return next((line.strip()[:300] for line in lines if "rror" in line), last_line(printed))


def measured(arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m bench` with these arguments in a fresh process; its last line is JSON.

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
