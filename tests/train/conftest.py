"""Small images that a CIFAR-10 network is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten classes of one colour each, and noise, as the files of CIFAR-10."""
    rng = np.random.default_rng(4)
    colours = rng.integers(40, 216, (10, 3, 1, 1))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(6):
        labels = rng.permutation(np.arange(20) % 10).astype(np.uint8)
        images = (colours[labels] + rng.integers(-30, 30, (20, 3, 32, 32))).astype(np.uint8)
        records = np.concatenate([labels[:, None], images.reshape(20, -1)], 1)
        records.tofile(folder / (f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"))
    return tmp_path
