"""Colour jitter on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ColourJitter"]

_GREY = (0.299, 0.587, 0.114)
# The two colour axes of YIQ, each without grey.
_I, _Q = (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)


class ColourJitter:
    """Random brightness, contrast, saturation and hue, in one pass over the pixels.

    Each is drawn independently; a factor f is uniform in 1 +- its amount. In this order, f scales
    the image, its distance from its mean grey, and each pixel's distance from its own grey; then
    the colours are rotated about the grey axis of YIQ. All four are linear, so together they are
    one 3 x 3 matrix and a shift per image. Values are clamped to 0..255 once, at the end.

    Args:
        amounts: of brightness, contrast and saturation, each in [0, 1].
        hue: largest rotation either way, in full turns, in [0, 0.5].
        device: where the images are.
    """

    def __init__(self, amounts: Sequence[float], hue: float, device: torch.device | str) -> None:
        self.amounts, self.hue = tuple(amounts), hue
        to_yiq = torch.tensor([_GREY, _I, _Q], dtype=torch.float64)
        self._to_yiq = to_yiq.float().to(device)
        self._from_yiq = torch.linalg.inv(to_yiq).float().to(device)
        self._spread = torch.tensor([*amounts, 2 * math.pi * hue], device=device)

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return any(self.amounts) or self.hue > 0

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change the colours of a batch of images.

        Args:
            images: uint8, B x 3 x H x W.
            draws: B x 4 float32 in [0, 1): of the four changes, in order.

        Returns:
            float32 in 0..255, channels_last.
        """
        brightness, contrast, saturation, turn = ((2 * draws - 1) * self._spread).unbind(1)
        level = (1 + brightness) * (1 + contrast)
        grey = torch.zeros_like(turn)
        # Rows and columns of YIQ: grey stays, the colour plane turns and is scaled.
        cosine, sine = (1 + saturation) * turn.cos(), (1 + saturation) * turn.sin()
        rows = [grey + 1, grey, grey, grey, cosine, -sine, grey, sine, cosine]
        in_yiq = torch.stack(rows, 1).view(-1, 3, 3) * level[:, None, None]
        matrix = self._from_yiq @ in_yiq @ self._to_yiq
        pixels = images.permute(0, 2, 3, 1).flatten(1, 2).float()
        mean = (pixels.mean(1) * self._to_yiq[0]).sum(1) * (1 + brightness)
        shift = (-contrast * mean)[:, None, None].expand(-1, 1, 3)
        changed = torch.baddbmm(shift, pixels, matrix.mT).clamp_(0, 255)
        batch, _, height, width = images.shape
        return changed.view(batch, height, width, 3).permute(0, 3, 1, 2)
