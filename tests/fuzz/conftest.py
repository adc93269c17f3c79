"""Fuzzers: each makes cases from seeds for ENCNET_FUZZ_SECONDS seconds (1 if it is not set).

``ENCNET_FUZZ_SEED=123`` is the seed to begin with: that of a case that failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support import mutations


@pytest.fixture
def fuzz_seconds() -> float:
    return float(os.environ.get("ENCNET_FUZZ_SECONDS", "1"))


@pytest.fixture
def seeds(fuzz_seconds: float) -> Iterator[int]:
    """Seeds while there is time; at least one."""
    return mutations.seeds(fuzz_seconds, least=1)
