"""Label maps of whole images, predicted in windows of the size the network was trained on.

E of the Encoding layer sums over the pixels of its input, so the batch normalisation over the
codewords has learned the statistics of one input size. Larger images are therefore covered with
overlapping windows of the training crop, whose class probabilities are averaged; so are those of
several scales and of the mirrored image, where they are asked for (paper, section 3.1).
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from encnet_triton.data.base import DataError
from encnet_triton.data.images import MOST_PIXELS
from encnet_triton.data.normalisation import Normalise
from encnet_triton.inference.merging import View, merged_labels
from encnet_triton.inference.views import SINGLE_VIEW, Views
from encnet_triton.inference.windows import filled, resized, window_starts
from encnet_triton.kernels import upsample_argmax
from encnet_triton.weights.checkpoint import ModelInfo


class Predictor:
    """Predict the label map of one image at a time.

    Args:
        model: network in evaluation mode, on ``device``; its weights are put into channels_last.
        info: normalisation, crop and scale it was trained with.
        device: where images are processed.
        whole_image: one pass over the whole image instead of windows (see
            `windows.WHOLE_IMAGE_WARNING`).
        views: scales and mirror images whose predictions are averaged.
        batch: windows that go through the network at once; None for 8, and for 1 on a CPU, where
            more take memory and are not faster.
        autocast: compute type on the device (None: float32).
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        *,
        device: torch.device | str = "cpu",
        whole_image: bool = False,
        views: Views = SINGLE_VIEW,
        batch: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.info = info
        self.device = torch.device(device)
        self.whole_image = whole_image
        self.views = views
        self.batch = batch or (1 if self.device.type == "cpu" else 8)
        self.autocast = autocast
        self._normalise = Normalise(info.mean, info.std, self.device)
        self._align_corners = bool(model.align_corners)
        # Outside the image, the fill is that of training; the published code's is black.
        black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=self.device)
        self._outside = self._normalise(black) if views.released else None

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Label map of an H x W x 3 uint8 RGB image: an H x W integer tensor on the device."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"image must be H x W x 3 uint8 RGB, got {image.dtype} of shape {image.shape}"
            )
        height, width = image.shape[:2]
        x = self._normalise(moved(image, self.device).permute(2, 0, 1)[None])
        if self.views == SINGLE_VIEW:
            size = self._size(height, width, 1.0)
            if self.whole_image or size == tuple(self.info.crop):
                logits = self._logits(self._resize(x, size))
                found = upsample_argmax(logits, image.shape[:2], align_corners=self._align_corners)
                return found[0]
        views = [
            self._view(self._resize(x, self._size(height, width, scale)))
            for scale in self.views.scales
        ]
        return merged_labels(
            views,
            (height, width),
            align_corners=self._align_corners,
            released=self.views.released,
        )

    def describe(self) -> str:
        """How images are predicted, in words."""
        crop, views = self.info.crop, self.views
        text = "whole images" if self.whole_image else f"windows of {crop[0]}x{crop[1]}"
        if views.scales != (1.0,):
            text += ", scales " + " ".join(f"{scale:g}" for scale in views.scales)
        if views.flip:
            text += ", with mirror images"
        if self.autocast is not None:
            text += f", {str(self.autocast).removeprefix('torch.')}"
        return text + (", released protocol" if views.released else "")

    def _size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        info = self.info
        if not self.views.released:
            return resized(height, width, info.base_size, info.scale_by, scale)
        long = ceil((info.base_size or max(height, width)) * scale)
        if height > width:
            return long, max(1, int(width * long / height + 0.5))
        return max(1, int(height * long / width + 0.5)), long

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size == x.shape[2:]:
            return x
        # Such as a line of a few by thousands of pixels whose short edge is scaled.
        if size[0] * size[1] > MOST_PIXELS:
            raise DataError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels would be scaled to {size[0]:,} x "
                f"{size[1]:,} by the network's base_size ({self.info.base_size})"
            )
        if self.views.released:
            return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return F.interpolate(x, size=size, mode="bilinear", antialias=True)

    def _view(self, x: Tensor) -> View:
        """The logits of all windows of 1 x 3 x H x W."""
        height, width = x.shape[2:]
        crop = (height, width) if self.whole_image else (self.info.crop[0], self.info.crop[1])
        flush = not self.views.released
        tops, lefts = (window_starts(x.shape[2 + i], crop[i], flush) for i in range(2))
        places = list(product(tops, lefts))
        windows: dict[tuple[int, int], list[Tensor]] = {}
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            cut = [x[:, :, t : t + crop[0], left : left + crop[1]] for t, left in part]
            maps = self._maps(torch.cat([filled(w, crop, self._outside) for w in cut]))
            windows |= zip(part, map(list, zip(*maps, strict=True)), strict=True)
        return View((height, width), crop, tops, lefts, windows)

    def _maps(self, windows: Tensor) -> list[Tensor]:
        """What each of B x 3 x h x w windows is made of, B x h x w x n each; see `View`."""
        maps = [_classes_last(self._logits(windows))]
        if self.views.flip:
            maps.append(_classes_last(self._logits(windows.flip(3)).flip(3)))
        if self.views.released:
            # In float64, because the published code's float32 overflows for large logits. The sum
            # of the upsampled logits is the upsampled sum.
            return [torch.stack(maps).double().sum(0)]
        return maps

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


def moved(array: NDArray[np.uint8], device: torch.device) -> Tensor:
    """A copy of an array on a device, which is not waited for."""
    copy = torch.tensor(array)
    if device.type == "cuda":
        return copy.pin_memory().to(device, non_blocking=True)
    return copy.to(device)


def _classes_last(logits: Tensor) -> Tensor:
    """B x n x h x w -> B x h x w x n in float32, always a copy: a network that is replayed as a
    CUDA graph writes its next logits where these are."""
    turned = logits.permute(0, 2, 3, 1)
    return torch.empty(turned.shape, dtype=torch.float32, device=logits.device).copy_(turned)
