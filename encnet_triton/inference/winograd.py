"""3x3 convolutions on a CPU with four tenths of the multiplications or fewer.

Winograd's F(4x4, 3x3): a tile of 4 x 4 outputs is A^T ((G w G^T) * (B^T x B)) A, where x is the
tile of 6 x 6 inputs that it depends on, w the 3 x 3 weights and * elementwise: 36 products in place
of 144. Over many tiles and channels the elementwise products are 36 matrix products. A convolution
with dilation d is d x d of them without, one on each grid of pixels that lie d apart.

The interpolation points decide on what is lost to rounding. With 0, +-1/sqrt(2), +-sqrt(2) and
infinity the worst error is that of a direct sum in float32 (2e-6 of the largest output, 512
channels); with the common 0, +-1, +-2 it is five times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import prod, sqrt
from typing import TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["fewer_products"]

_OUT, _TAPS = 4, 3
_IN = _OUT + _TAPS - 1
_POINTS = (0.0, sqrt(0.5), -sqrt(0.5), sqrt(2.0), -sqrt(2.0))
# Below this many pairs of channels the transforms take longer than the products they save.
_LEAST_PAIRS = 256 * 256
# Channels of inputs and outputs, and tiles, that are transformed at once. This bounds the memory:
# 36 x 256 inputs x 256 tiles (those of a window of 480) or 128 outputs x 4 bytes are 9 and 4.5 MiB.
_INPUTS, _OUTPUTS, _TILES = 256, 128, 512
# Outputs computed for each that is kept, where the tiles do not divide the map.
_MOST_SURPLUS = 1.4


@contextmanager
def fewer_products(model: nn.Module) -> Iterator[None]:
    """Inside, the large 3x3 convolutions of a model on a CPU are computed this way.

    For evaluation: there is no backward pass. A convolution whose input is not float32, or that
    autocast casts, is computed as ever.
    """
    found = [module for module in model.modules() if _takes(module)]
    for conv in found:
        conv.forward = partial(_forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in found:
            del conv.forward


def _takes(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)  # somebody else's
        and module.kernel_size == (_TAPS, _TAPS)
        and module.stride == (1, 1)
        and module.dilation[0] == module.dilation[1]
        and module.padding == module.dilation
        and module.padding_mode == "zeros"
        and module.groups == 1
        and module.in_channels * module.out_channels >= _LEAST_PAIRS
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    step = _OUT * conv.dilation[0]
    computed = prod(-(-size // step) * step for size in x.shape[2:])
    small = computed > _MOST_SURPLUS * prod(x.shape[2:])
    if small or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.Conv2d.forward(conv, x)
    each = [_image(one, conv.weight, conv.dilation[0]) for one in torch.split(x, 1)]
    y = each[0] if len(each) == 1 else torch.cat(each)
    return y if conv.bias is None else y.add_(conv.bias[:, None, None])


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B^T x B, G w G^T and A^T m A as matrices 36 x 36, 36 x 9 and 16 x 36 on flattened tiles."""
    points = torch.tensor(_POINTS, dtype=torch.float64)

    def values(degree: int) -> Tensor:
        """Of the powers below a degree at the points, and at infinity."""
        at_infinity = torch.zeros(1, degree, dtype=torch.float64)
        at_infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(degree), at_infinity])

    # Each point's scale is taken from the inputs to the weights.
    apart = (points[:, None] - points).fill_diagonal_(1).prod(1)
    scale = torch.cat([apart, apart.new_ones(1)])[:, None]
    to_inputs = values(_IN).inverse().t() * scale
    to_weights, from_products = values(_TAPS) / scale, values(_OUT).t()
    inputs, weights, outputs = (
        torch.kron(one.contiguous(), one.contiguous()).float()
        for one in (to_inputs, to_weights, from_products)
    )
    return inputs, weights, outputs


def _image(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The convolution of 1 x C x H x W with O x C x 3 x 3, 1 x O x H x W in channels_last."""
    height, width = x.shape[2:]
    d = dilation
    down, across = (-(-size // (_OUT * d)) for size in (height, width))
    tiles = _tiles(x, d, down, across)
    y = x.new_empty(1, height, width, len(weight))
    step = max(1, _TILES // (d * across * d))
    for start in range(0, down, step):
        rows = slice(start * _OUT * d, (start + step) * _OUT * d)
        for part, products in _products(tiles[:, :, start : start + step], weight):
            outputs = (_matrices()[2] @ products.flatten(1)).view(
                _OUT, _OUT, -1, d, across, d, products.shape[2]
            )
            found = outputs.permute(2, 0, 3, 4, 1, 5, 6).flatten(3, 5).flatten(0, 2)
            target = y[0, rows, :, part]
            target.copy_(found[: len(target), :width])
    return y.permute(0, 3, 1, 2)


def _tiles(x: Tensor, d: int, down: int, across: int) -> Tensor:
    """[6, 6, down, d, across, d, C]: the places in a tile, and the tiles of all grids."""
    _, channels, height, width = x.shape
    padded = x.new_zeros(d * (_OUT * down + 2), d * (_OUT * across + 2), channels)
    padded[d : d + height, d : d + width] = x[0].permute(1, 2, 0)
    row, pixel, _ = padded.stride()
    return padded.as_strided(
        (_IN, _IN, down, d, across, d, channels),
        (d * row, d * pixel, _OUT * d * row, row, _OUT * d * pixel, pixel, 1),
    )


def _products(tiles: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Sums over the channels of transformed tiles and weights, [36, tiles, outputs] for each part
    of the outputs."""
    taps = weight.permute(2, 3, 0, 1).flatten(0, 1)  # [9, O, C]
    sums: dict[int, Tensor] = {}
    for start in range(0, weight.shape[1], _INPUTS):
        own = slice(start, start + _INPUTS)
        transformed = _transformed_tiles(tiles[..., own])
        for output in range(0, len(weight), _OUTPUTS):
            weights = _transformed_weights(taps[:, output : output + _OUTPUTS, own])
            if start == 0:
                sums[output] = torch.bmm(transformed, weights)
            else:
                sums[output].baddbmm_(transformed, weights)
    del transformed, weights  # the results of the caller take their place
    for output in list(sums):
        yield slice(output, output + _OUTPUTS), sums.pop(output)


def _transformed_tiles(tiles: Tensor) -> Tensor:
    """B^T x B of [6, 6, down, d, across, d, C] tiles: [36, tiles, C]."""
    *_, down, d, across, _, channels = tiles.shape
    found = tiles.new_empty(_IN * _IN, down, d, across * d * channels)
    copied = tiles.new_empty(_IN, _IN, across, d, channels)  # one row, which stays in the cache
    for i in range(down):
        for j in range(d):
            copied.copy_(tiles[:, :, i, j])
            torch.mm(_matrices()[0], copied.view(_IN * _IN, -1), out=found[:, i, j])
    return found.view(_IN * _IN, -1, channels)


def _transformed_weights(taps: Tensor) -> Tensor:
    """G w G^T of [9, O, C] weights: [36, C, O]."""
    found = _matrices()[1] @ taps.flatten(1)
    return found.view(_IN * _IN, *taps.shape[1:]).transpose(1, 2)
