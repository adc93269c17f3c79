"""Weights of the classes in the cross-entropy, from how often each occurs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encnet_triton.data import Dataset
from encnet_triton.train.config import ConfigError

# Smallest and largest weight: without them a class with a handful of pixels would dominate the
# gradient of a whole batch.
LIMITS = (0.2, 5.0)
IMAGES = 500


def balanced_weights(dataset: Dataset, num_classes: int) -> Tensor:
    """Median-frequency weights of the classes, from at most `IMAGES` labels, evenly spaced.

    A class's frequency is its pixels over all labelled pixels of the images it occurs in; its
    weight is the median frequency over its own, kept within `LIMITS`. float32, n of them.

    Raises:
        ConfigError: no label has a class.
    """
    count = min(len(dataset), IMAGES)
    indices: Sequence[int] = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    pixels, around = np.zeros(num_classes), np.zeros(num_classes)
    for index in indices:
        label = dataset.open(index).label  # compares the sizes, decodes no image
        histogram = np.bincount(label.ravel(), minlength=256)[:num_classes]
        pixels += histogram
        around += np.where(histogram > 0, histogram.sum(), 0)
    seen = pixels > 0
    if not seen.any():
        raise ConfigError("class_weight = 'balanced' needs labels, but no pixel has a class")
    frequency = pixels[seen] / around[seen]
    weights = np.ones(num_classes)
    weights[seen] = np.clip(np.median(frequency) / frequency, *LIMITS)
    return torch.tensor(weights, dtype=torch.float32)
