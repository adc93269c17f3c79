"""Fuzzers: each makes cases from seeds for ENCNET_FUZZ_SECONDS seconds (0.5 if it is not set).

``ENCNET_FUZZ_SEED=123`` is the seed to begin with: that of a case that failed.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def seeds() -> Iterator[int]:
    """Seeds while there is time; at least one."""
    return _seeds()


def _seeds() -> Iterator[int]:
    end = time.monotonic() + float(os.environ.get("ENCNET_FUZZ_SECONDS", "0.5"))
    for seed in itertools.count(int(os.environ.get("ENCNET_FUZZ_SEED", "0"))):
        print(f"seed {seed}")  # pytest shows it where the case fails
        yield seed
        if time.monotonic() > end:
            return
