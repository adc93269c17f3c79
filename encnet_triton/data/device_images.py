"""A small data set that lives on the device and is augmented there in batches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.data.cifar10 import Images
from encnet_triton.data.loader import epoch_order

__all__ = ["DeviceImages"]

PADDING = 4
_AUGMENT = 1002


class DeviceImages:
    """Images and labels as uint8 on a device; batches are cropped and mirrored there.

    Each image is padded with 4 black pixels, cut to its own size anywhere in that, and mirrored in
    one of two cases. How an image is augmented in an epoch depends only on (seed, epoch, index),
    and which images a step gets only on (seed, epoch, step), not on the number of processes.

    Args:
        split: the images, uint8 N x 3 x H x W, and labels.
        device: where they live.
        seed: of order and augmentation.
    """

    def __init__(self, split: Images, device: torch.device, seed: int) -> None:
        self.device = device
        self.seed = seed
        self.height, self.width = split.images.shape[2:]
        images = torch.from_numpy(np.ascontiguousarray(split.images)).to(device)
        self._padded = F.pad(images, [PADDING] * 4)
        self.labels = torch.from_numpy(split.labels.astype(np.int64)).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images start..stop as they are, uint8 B x 3 x H x W, and their labels, int64."""
        inside = self._padded[start:stop, :, PADDING:-PADDING, PADDING:-PADDING]
        return inside, self.labels[start:stop]

    def epoch(self, epoch: int) -> Epoch:
        """The order and the augmentation of an epoch."""
        return Epoch(self, epoch)

    def cut(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Augmented images.

        Args:
            indices: B of them, int64.
            draws: B x 3, int64: row and column of the first pixel in the padded image, 0..8, and
                1 to mirror it.
        """
        rows = draws[:, :1] + torch.arange(self.height, device=self.device)
        columns = torch.arange(self.width, device=self.device)
        columns = torch.where(draws[:, 2:] > 0, self.width - 1 - columns, columns) + draws[:, 1:2]
        channels = torch.arange(self._padded.shape[1], device=self.device)
        return self._padded[
            indices[:, None, None, None],
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


class Epoch:
    """One pass over a `DeviceImages`."""

    def __init__(self, data: DeviceImages, epoch: int) -> None:
        self._data = data
        order = epoch_order(data.seed, epoch, len(data))
        rng = np.random.default_rng((data.seed, _AUGMENT, epoch))
        high = [2 * PADDING + 1, 2 * PADDING + 1, 2]
        draws = rng.integers(0, high, (len(data), 3))
        self._order = torch.from_numpy(order).to(data.device)
        self._draws = torch.from_numpy(draws).to(data.device)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Samples start..stop of the order: uint8 images B x 3 x H x W, and labels."""
        indices = self._order[start:stop]
        return self._data.cut(indices, self._draws[indices]), self._data.labels[indices]
