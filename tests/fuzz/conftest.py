"""Fuzzers: each makes cases from seeds for ENCNET_FUZZ_SECONDS seconds (1 if it is not set).

``ENCNET_FUZZ_SEED=123`` is the seed to begin with: that of a case that failed.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def fuzz_seconds() -> float:
    return float(os.environ.get("ENCNET_FUZZ_SECONDS", "1"))


@pytest.fixture
def seeds(fuzz_seconds: float) -> Iterator[int]:
    """Seeds while there is time; at least one."""
    return _seeds(int(os.environ.get("ENCNET_FUZZ_SEED", "0")), fuzz_seconds)


def _seeds(first: int, seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    for seed in itertools.count(first):
        yield seed
        if time.monotonic() > end:
            print(f"seeds {first} to {seed}")
            return
