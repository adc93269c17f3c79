"""Logits and labels for tests of the upsampling kernels, and the formula to compare with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.kernels.runtime import launch

DEVICE = "cpu" if launch.interpreting() else "cuda"


def example(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    ignored: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Logits, channels last, and uint8 labels, those of the first row and a share of all ignored.

    `shape`: B, C, h, w, H, W.
    """
    images, classes, low_height, low_width, height, width = shape
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(images, classes, low_height, low_width, generator=generator)
    target = torch.randint(classes, (images, height, width), generator=generator)
    if ignored:
        target[torch.rand(target.shape, generator=generator) < ignored] = 255
    if height > 1:
        target[:, 0] = 255
    logits = logits.to(dtype).to(memory_format=torch.channels_last)
    return logits.to(DEVICE), target.to(torch.uint8).to(DEVICE)


def formula(
    logits: Tensor, target: Tensor, *, align_corners: bool = True, reduction: str, **options: Any
) -> Tensor:
    """What people write: upsampled logits, their dtype kept, and torch's cross-entropy."""
    upsampled = F.interpolate(
        logits, target.shape[1:], mode="bilinear", align_corners=align_corners
    )
    if upsampled.dtype != torch.float64:
        upsampled = upsampled.float()
    weight = options.pop("weight", None)
    return F.cross_entropy(
        upsampled,
        target.long(),
        None if weight is None else weight.to(upsampled),
        ignore_index=options.pop("ignore_index", 255),
        reduction=reduction,
        **options,
    )
