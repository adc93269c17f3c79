"""The normalisation of images, in training and after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Normalise"]


class Normalise:
    """uint8 images B x 3 x H x W -> float32, channels last, by mean and std of values in 0..1.

    Args:
        mean, std: one per channel.
        device: where the images are.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str
    ) -> None:
        spread = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._scale = 1 / (255 * spread)
        self._shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / spread

    def __call__(self, images: Tensor) -> Tensor:
        x = torch.addcmul(self._shift, images, self._scale)
        return x.contiguous(memory_format=torch.channels_last)
