"""How long each fuzzer of this folder runs: ENCNET_FUZZ_SECONDS, 2 seconds by default."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def fuzz_seconds() -> float:
    return float(os.environ.get("ENCNET_FUZZ_SECONDS", "2"))
