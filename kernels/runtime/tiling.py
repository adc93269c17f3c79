"""Tiles of a B x C x N tensor for operators written in PyTorch: part of its pixels, all channels.

B images have C channels of N pixels; b and n are the images and pixels of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one tile, 4 MiB in fp32: smaller ones lose more to call overhead than the cache gives
# back. A GPU wants fewer, larger launches.
_ELEMENTS_CPU = 1 << 20
_ELEMENTS_GPU = 1 << 25


def tiles(x: Tensor, extra_rows: int = 0) -> Iterator[tuple[slice, slice]]:
    """Slices of images and pixels that cover x [B, C, N], in a fixed order; none if x is empty.

    A tile is a run of pixels of one image or, where images are small, several whole images.
    `extra_rows` counts what an operator holds for each pixel besides the C channels.
    """
    images, channels, pixels = x.shape
    if pixels == 0:
        return
    elements = _ELEMENTS_CPU if x.device.type == "cpu" else _ELEMENTS_GPU
    fit = max(elements // (channels + extra_rows), 16)
    if pixels <= fit:
        step = fit // pixels
        for b in range(0, images, step):
            yield slice(b, min(b + step, images)), slice(0, pixels)
        return
    count = -(-pixels // fit)
    step = -(-pixels // (16 * count)) * 16
    for b in range(images):
        for n in range(0, pixels, step):
            yield slice(b, b + 1), slice(n, min(n + step, pixels))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def laid_out_as(x: Tensor, made: Tensor) -> Tensor:
    """What was made, or a copy of it, in the memory layout of a new tensor like x."""
    # The meta device gives that layout and allocates nothing.
    if made.stride() == torch.empty_like(x, device="meta").stride():
        return made
    return torch.empty_like(x).copy_(made)


class Scratch:
    """Work space reused from tile to tile, so that its pages stay mapped and in the cache.

    Every buffer is seen as b x rows x n. In memory it follows x: pixels innermost for a contiguous
    x, channels innermost for channels_last, so that a copy between them is one stream.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self.channels_last = bool(x.stride(1) < x.stride(2))
        self.dtype = dtype
        self.device = x.device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, images: int, rows: int, pixels: int) -> Tensor:
        """The buffer called `name`, [b, rows, n], not initialised."""
        size = images * rows * pixels
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        flat = self._flat[name][:size]
        if self.channels_last:
            return flat.view(images, pixels, rows).transpose(1, 2)
        return flat.view(images, rows, pixels)
