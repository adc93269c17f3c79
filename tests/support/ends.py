"""Functions that end in every possible way; run in their own process, quick to import."""

from __future__ import annotations

import os
import time


def good() -> None:
    print("a line")


def bad(what: str) -> None:
    raise ValueError(f"{what} is wrong.\nMore that nobody reads.")


def endless() -> None:
    time.sleep(60)


def crash() -> None:
    os.kill(os.getpid(), 6)
