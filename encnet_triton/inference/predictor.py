"""Label maps of whole images, predicted in windows of the size the network was trained on.

E of the Encoding layer sums over the pixels of its input, so the batch normalisation over the
codewords has learned the statistics of one input size. Larger images are therefore covered with
overlapping windows of the training crop, whose class probabilities are averaged; so are those of
several scales and of the mirrored image, where they are asked for (paper, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from encnet_triton.data.base import DataError
from encnet_triton.data.normalisation import Normalise
from encnet_triton.inference.views import SINGLE_VIEW, Views
from encnet_triton.inference.windows import filled, resized, window_starts
from encnet_triton.kernels import upsample_argmax
from encnet_triton.weights.checkpoint import ModelInfo

# What a line of a few pixels by thousands would exceed, where its short edge has to fit.
MOST_PIXELS = 178_956_970


class Predictor:
    """Predict the label map of one image at a time.

    Args:
        model: network in evaluation mode, on ``device``.
        info: normalisation, crop and scale it was trained with.
        device: where images are processed.
        whole_image: one pass over the whole image in place of windows (see
            `windows.WHOLE_IMAGE_WARNING`).
        views: scales and mirror images whose predictions are averaged.
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
        views: Views = SINGLE_VIEW,
        batch: int = 8,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.info = info
        self.device = torch.device(device)
        self.whole_image = whole_image
        self.views = views
        self.batch = batch
        self.autocast = autocast
        self._normalise = Normalise(info.mean, info.std, self.device)
        self._align_corners = bool(model.align_corners)
        # What lies outside the image is filled as in training: the published code has it black.
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
        pixels = torch.tensor(image, device=self.device).permute(2, 0, 1)[None]
        x = self._normalise(pixels)
        if self.views == SINGLE_VIEW:
            size = self._size(height, width, 1.0)
            if self.whole_image or size == tuple(self.info.crop):
                logits = self._logits(self._resize(x, size))
                return upsample_argmax(logits, (height, width), align_corners=self._align_corners)[
                    0
                ]
        total: Tensor | None = None
        for scale in self.views.scales:
            view = self._resize(x, self._size(height, width, scale))
            scores = self._averaged(view)
            if scores.shape[2:] != (height, width):
                corners = self.views.released
                scores = F.interpolate(
                    scores, size=(height, width), mode="bilinear", align_corners=corners
                )
            total = scores if total is None else total.add_(scores)
        assert total is not None  # there is at least one scale
        return total.argmax(1)[0]

    def describe(self) -> str:
        """How it looks at an image, in words."""
        crop, views = self.info.crop, self.views
        text = "whole images" if self.whole_image else f"windows of {crop[0]}x{crop[1]}"
        if views.scales != (1.0,):
            text += ", scales " + " ".join(f"{scale:g}" for scale in views.scales)
        if views.flip:
            text += ", mirrored too"
        return text + (", released protocol" if views.released else "")

    def _size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        info = self.info
        if not self.views.released:
            return resized(height, width, info.base_size, info.scale_by, scale)
        long = ceil((info.base_size or max(height, width)) * scale)
        if height > width:
            return long, int(width * long / height + 0.5)
        return int(height * long / width + 0.5), long

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size == x.shape[2:]:
            return x
        if size[0] * size[1] > MOST_PIXELS:
            raise DataError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels would be scaled to {size[0]:,} x "
                f"{size[1]:,} by the network's base_size ({self.info.base_size})"
            )
        if self.views.released:
            return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return F.interpolate(x, size=size, mode="bilinear", antialias=True)

    def _averaged(self, x: Tensor) -> Tensor:
        """Class scores of 1 x 3 x H x W, averaged over the windows at each pixel: 1 x n x H x W."""
        height, width = x.shape[2:]
        crop = (height, width) if self.whole_image else (self.info.crop[0], self.info.crop[1])
        x = filled(x, crop, self._outside)
        total: Tensor | None = None
        visits = torch.zeros(x.shape[2:], device=self.device)
        for places, windows in self._windows(x, crop):
            scores = self._scores(windows)
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], *x.shape[2:])
            for (top, left), window in zip(places, scores, strict=True):
                place = (slice(top, top + crop[0]), slice(left, left + crop[1]))
                inside = total[0][:, *place]
                inside += window[:, : inside.shape[1], : inside.shape[2]]
                visits[place] += 1
        assert total is not None  # there is at least one window
        return total.div_(visits)[:, :, :height, :width]

    def _windows(
        self, x: Tensor, crop: tuple[int, int]
    ) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        flush = not self.views.released
        places = [
            (top, left)
            for top in window_starts(x.shape[2], crop[0], flush)
            for left in window_starts(x.shape[3], crop[1], flush)
        ]
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            windows = [x[:, :, t : t + crop[0], left : left + crop[1]] for t, left in part]
            yield part, torch.cat([filled(w, crop, self._outside) for w in windows])

    def _scores(self, windows: Tensor) -> Tensor:
        """Scores of B x 3 x h x w windows, and of their mirror images: B x n x h x w."""
        upsampled = [self._upsampled(windows)]
        if self.views.flip:
            upsampled.append(self._upsampled(windows.flip(3)).flip(3))
        if self.views.released:
            # In float64, because the published code's float32 overflows for large logits.
            return torch.stack(upsampled).double().sum(0).exp()
        scores = upsampled[0].softmax(1)
        for other in upsampled[1:]:
            scores = scores + other.softmax(1)
        return scores

    def _upsampled(self, windows: Tensor) -> Tensor:
        return F.interpolate(
            self._logits(windows).float(),
            size=windows.shape[2:],
            mode="bilinear",
            align_corners=self._align_corners,
        )

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
