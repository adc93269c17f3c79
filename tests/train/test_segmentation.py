"""What a segmentation run is built of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encnet_triton.train.class_weights import LIMITS, balanced_weights
from encnet_triton.train.config import ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.recipe import build
from encnet_triton.train.segmentation import make_model
from encnet_triton.train.task import initial


def labels(*rows: dict[int, int]) -> list[SimpleNamespace]:
    """Samples whose label has so many pixels of each value."""
    return [SimpleNamespace(label=np.repeat(list(row), list(row.values()))) for row in rows]


def test_balanced_weights_are_the_median_frequency_over_each() -> None:
    """Frequencies, each over the images that the class is in: 30/40, 10/40 + 30/60, 30/60."""
    found = balanced_weights(labels({0: 30, 1: 10}, {1: 30, 2: 30}), 4)
    frequency = np.array([30 / 40, 40 / 100, 30 / 60])
    np.testing.assert_allclose(found[:3], 0.5 / frequency, rtol=1e-6)
    assert found[3] == 1  # a class that is nowhere


def test_balanced_weights_stay_within_their_limits() -> None:
    common = balanced_weights(labels({0: 970, 1: 10, 2: 10, 3: 10}), 4)
    np.testing.assert_allclose(common, [0.2, 1, 1, 1], rtol=1e-6)  # 0.01 / 0.97 is less
    rare = balanced_weights(labels({0: 330, 1: 330, 2: 339, 3: 1}), 4)
    np.testing.assert_allclose(rare, [1, 1, 330 / 339, 5], rtol=1e-6)  # 330 / 1 is more
    assert LIMITS == (0.2, 5.0)


def test_balanced_weights_leave_ignored_pixels_out() -> None:
    with_ignored = balanced_weights(labels({0: 30, 1: 10, 255: 500}, {1: 5, 2: 9}), 3)
    without = balanced_weights(labels({0: 30, 1: 10}, {1: 5, 2: 9}), 3)
    np.testing.assert_array_equal(with_ignored, without)
    with pytest.raises(ConfigError, match="no pixel has a class"):
        balanced_weights(labels({255: 9}), 3)


def test_ranks_have_the_same_weights_and_drop_out_other_channels() -> None:
    config = build("scenes", {"sync_bn": "false"})
    weights, draws = [], []
    for rank in range(2):
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        model = initial(config, world, lambda: make_model(config, 5))
        weights.append(next(model.parameters()))
        draws.append(torch.rand(8))
    assert torch.equal(*weights)
    assert not torch.equal(*draws)
