"""Label maps of whole images, predicted in windows of the size the network was trained on.

E of the Encoding layer sums over the pixels of its input, so the batch normalisation over the
codewords has learned the statistics of one input size. Larger images are therefore covered with
overlapping windows of the training crop, whose class probabilities are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from encnet_triton.checkpoint import ModelInfo
from encnet_triton.kernels import upsample_argmax

WHOLE_IMAGE_WARNING = (
    "Whole images go through the network at once: the Encoding layer sums over more pixels than in "
    "training, so its batch normalisation sees other statistics. The default is windows."
)


def window_starts(size: int, window: int) -> list[int]:
    """Offsets of windows covering ``size`` pixels, about 2/3 of a window apart, the last flush."""
    if size <= window:
        return [0]
    stride = max(1, window * 2 // 3)
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def resized(height: int, width: int, base_size: int | None, scale_by: str) -> tuple[int, int]:
    """Size of an image whose short or long edge has been scaled to ``base_size`` pixels."""
    if base_size is None or scale_by == "image":
        return height, width
    edge = min(height, width) if scale_by == "short" else max(height, width)
    return max(1, round(height * base_size / edge)), max(1, round(width * base_size / edge))


class Predictor:
    """Predict the label map of one image at a time.

    Args:
        model: network in evaluation mode, on ``device``.
        info: normalisation, crop and scale it was trained with.
        device: where images are processed.
        whole_image: one pass over the whole image in place of windows (see `WHOLE_IMAGE_WARNING`).
        batch: windows that go through the network at once.
        autocast: compute type on the device (None: float32).
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        *,
        device: torch.device | str = "cpu",
        whole_image: bool = False,
        batch: int = 8,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.info = info
        self.device = torch.device(device)
        self.whole_image = whole_image
        self.batch = batch
        self.autocast = autocast
        self._mean = torch.tensor(info.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(info.std, device=self.device).view(1, 3, 1, 1) * 255
        self._align_corners = bool(model.align_corners)

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Label map of an H x W x 3 uint8 RGB image: an H x W integer tensor on the device."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"image must be H x W x 3 uint8 RGB, got {image.dtype} of shape {image.shape}"
            )
        height, width = image.shape[:2]
        pixels = torch.tensor(image, device=self.device).permute(2, 0, 1)[None]
        x = (pixels - self._mean) / self._std
        size = resized(height, width, self.info.base_size, self.info.scale_by)
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        crop = size if self.whole_image else (self.info.crop[0], self.info.crop[1])
        if size == crop:
            logits = self._logits(x)
            return upsample_argmax(logits, (height, width), align_corners=self._align_corners)[0]
        probability = self._averaged(x, crop)
        if size != (height, width):
            probability = F.interpolate(probability, size=(height, width), mode="bilinear")
        return probability.argmax(1)[0]

    def _averaged(self, x: Tensor, crop: tuple[int, int]) -> Tensor:
        """Class probabilities (unnormalised sums are enough for argmax only if every pixel had the
        same number of windows, so they are divided) of 1 x 3 x H x W, as 1 x n x H x W."""
        height, width = x.shape[2:]
        # Zero after normalisation is the mean colour, as the augmentation fills with.
        x = F.pad(x, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
        total: Tensor | None = None
        visits = torch.zeros(x.shape[2:], device=self.device)
        for places, logits in self._windows(x, crop):
            upsampled = F.interpolate(
                logits.float(), size=crop, mode="bilinear", align_corners=self._align_corners
            ).softmax(1)
            if total is None:
                total = upsampled.new_zeros(1, upsampled.shape[1], *x.shape[2:])
            for (top, left), window in zip(places, upsampled, strict=True):
                total[0, :, top : top + crop[0], left : left + crop[1]] += window
                visits[top : top + crop[0], left : left + crop[1]] += 1
        assert total is not None  # there is at least one window
        return (total / visits)[:, :, :height, :width]

    def _windows(
        self, x: Tensor, crop: tuple[int, int]
    ) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        places = [
            (top, left)
            for top in window_starts(x.shape[2], crop[0])
            for left in window_starts(x.shape[3], crop[1])
        ]
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            windows = [x[:, :, t : t + crop[0], left : left + crop[1]] for t, left in part]
            yield part, self._logits(torch.cat(windows))

    def _logits(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        context = (
            torch.autocast(self.device.type, dtype=self.autocast)
            if self.autocast is not None
            else nullcontext()
        )
        with context:
            output = self.model(x)
        logits: Tensor = output.logits
        return logits
