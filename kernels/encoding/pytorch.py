"""`encode` in PyTorch: for CPUs, float64, and whatever the kernels do not support.

x is B x C x N: images, channels, pixels; codewords d are K x C. The maths are in operator.py.

All of it runs as matrix products on tiles of pixels that stay in the cache. Forward: one for the
logits, one for E. Backward: one with 2K rows for distances and da together, one of inner size 2K
for dx, one for dd. Temporaries are those of one tile, b x C x n.

A tile is first shifted by the mean codeword. Distances and residuals stay the same, and the
expanded square |x|^2 - 2 x.d + |d|^2 no longer cancels when x and d share a large offset.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..runtime.tiling import Scratch, accumulation_dtype, tiles

# Pixels that one product adds up in sequence.
_RUN = 64


class _Workspace(Scratch):
    """Scratch memory, and the steps that forward and backward share."""

    def accumulator(self, images: int, channels: int, num: int) -> Tensor:
        """Zeros [B, C, K] in the memory order that products with these tiles write fastest."""
        if self.channels_last:
            return torch.zeros(
                images, num, channels, dtype=self.dtype, device=self.device
            ).transpose(1, 2)
        return torch.zeros(images, channels, num, dtype=self.dtype, device=self.device)

    def shift(self, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """The tile x - center [b, C, n] and its squared norms [b, 1, n]."""
        shifted = torch.sub(x, center[:, None], out=self.take("shifted", *x.shape))
        squares = torch.mul(shifted, shifted, out=self.take("spare", *x.shape))
        return shifted, squares.sum(1, keepdim=True)

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the codewords [b, K, n] of a tile."""
        if self.channels_last:
            weights = logits.transpose(1, 2).softmax(2).transpose(1, 2)
        else:
            weights = logits.softmax(1)
        # Products with subnormal operands take many times as long on a CPU, and sharp
        # assignments are full of them. Weights this small cannot change a sum with a total of 1.
        info = torch.finfo(weights.dtype)
        return torch.threshold_(weights, info.tiny / info.eps, 0.0)

    def softmax_backward(self, grad: Tensor, weights: Tensor) -> Tensor:
        """Gradient of the logits, weights (grad - sum_k weights grad), fused [b, K, n]."""
        if self.channels_last:
            grad, weights = grad.transpose(1, 2), weights.transpose(1, 2)
            return torch._softmax_backward_data(grad, weights, 2, grad.dtype).transpose(1, 2)
        return torch._softmax_backward_data(grad, weights, 1, grad.dtype)


def _products(bias: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out [b, r, n] = bias + left [b, r, m] right [b, m, n]; bias is broadcast, or is out.

    For many small images, one call multiplies all of them if the result is contiguous; otherwise
    there is one call an image. Hence the transposed product where that one is contiguous.
    """
    turned = out.transpose(1, 2)
    if out.shape[0] > 1 and turned.is_contiguous():
        bias, left, right = (t.transpose(1, 2) for t in (bias, right, left))
        torch.baddbmm(bias, left, right, out=turned)
    else:
        torch.baddbmm(bias, left, right, out=out)
    return out


def _add_in_runs(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [b, C, K] += left [b, C, n] right^T [b, n, K], in runs of pixels summed by torch.sum.

    E adds up weights and features that may all be positive. One long product adds one pixel after
    another, so its error grows with their number; the plain formula's sum does not. (The products
    of the backward pass have terms of both signs and need no such care.)
    """
    images, channels, pixels = left.shape
    runs = pixels // _RUN
    if runs < 4:
        _products(total, left, right.transpose(1, 2), total)
        return
    whole = runs * _RUN
    step = images if whole == pixels else 1  # images whose runs lie at equal distances
    for start in range(0, images, step):
        part = slice(start, start + step)
        a = left[part, :, :whole].transpose(1, 2).reshape(-1, _RUN, channels)  # [b runs, RUN, C]
        b = right[part, :, :whole].transpose(1, 2).reshape(-1, _RUN, right.shape[1])
        if left.stride(1) == 1:
            products = torch.bmm(b.transpose(1, 2), a)  # [b runs, K, C]
            total[part] += products.unflatten(0, (-1, runs)).sum(1).transpose(1, 2)
        else:
            products = torch.bmm(a.transpose(1, 2), b)
            total[part] += products.unflatten(0, (-1, runs)).sum(1)
    if whole < pixels:
        _products(total, left[:, :, whole:], right[:, :, whole:].transpose(1, 2), total)


def forward(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """E, B x K x C in the accumulation dtype, of x B x C x N."""
    images, channels, pixels = x.shape
    dtype, num = accumulation_dtype(x), codewords.shape[0]
    d = codewords.to(dtype)
    center = d.mean(0)
    shifted_d = d - center
    left = (-2 * shifted_d).expand(images, num, channels)
    bias = shifted_d.square().sum(1)[None, :, None]
    factor = scale.to(dtype)[:, None]

    scratch = _Workspace(x, dtype)
    code = scratch.accumulator(images, channels, num)
    mass = torch.zeros(images, num, dtype=dtype, device=x.device)
    for b, n in tiles(x, num):
        tile = x[b, :, n]
        shifted, squares = scratch.shift(tile, center)
        logits = scratch.take("products", tile.shape[0], num, tile.shape[2])
        _products(bias, left[b], shifted, logits)
        weights = scratch.softmax(logits.add_(squares).mul_(factor))
        _add_in_runs(code[b], shifted, weights)
        mass[b] += weights.sum(2)
    out = torch.empty(images, num, channels, dtype=dtype, device=x.device)
    return torch.sub(code.transpose(1, 2), mass[:, :, None] * shifted_d, out=out)


def statistics(code: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and M2 (sum of squares about the mean) of E over its channels, B x K each."""
    mean = code.mean(2, keepdim=True)
    return code.sum(2), (code - mean).square().sum(2)


def backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    need_x: bool,
    need_codewords: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless needed), codewords and scale; grad is dE, B x K x C."""
    images, channels, pixels = x.shape
    dtype, num = accumulation_dtype(x), codewords.shape[0]
    d = codewords.to(dtype)
    center = d.mean(0)
    offset = d - center
    shifted_d = offset.expand(images, num, channels)
    left = torch.cat([-2 * shifted_d, grad], 1)  # [B, 2K, C]: distances and da
    bias = torch.cat([shifted_d.square().sum(2), -(grad * shifted_d).sum(2)], 1)[:, :, None]
    right = torch.cat([grad, -shifted_d], 1).transpose(1, 2)  # [B, C, 2K]: dx out of a and w
    factor = scale.to(dtype)[:, None]
    residual_factor = factor if backward_scale is None else backward_scale.to(dtype)[:, None]

    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    scratch = _Workspace(x, dtype)
    moment = scratch.accumulator(images, channels, num)
    mass = torch.zeros(images, 2 * num, dtype=dtype, device=x.device)
    grad_scale = torch.zeros(num, dtype=dtype, device=x.device)
    for b, n in tiles(x, num):
        tile = x[b, :, n]
        shifted, squares = scratch.shift(tile, center)
        products = scratch.take("products", tile.shape[0], 2 * num, tile.shape[2])
        _products(bias[b], left[b], shifted, products)
        distances = products[:, :num].add_(squares)
        weights = scratch.softmax(distances * factor)
        grad_logits = scratch.softmax_backward(products[:, num:], weights)
        both = scratch.take("both", tile.shape[0], 2 * num, tile.shape[2])  # [b, 2K, n]: a and w
        both[:, :num] = weights
        torch.mul(grad_logits, 2 * residual_factor, out=both[:, num:])
        mass[b] += both.sum(2)
        grad_scale += distances.mul_(grad_logits).sum((0, 2))
        if need_codewords:
            _products(moment[b], shifted, both[:, num:].transpose(1, 2), moment[b])
        if need_x:
            total = both[:, num:].sum(1, keepdim=True)
            target = grad_x[b, :, n] if x.dtype == dtype else scratch.take("spare", *tile.shape)
            _products(torch.mul(shifted, total, out=target), right[b], both, target)
            if x.dtype != dtype:
                grad_x[b, :, n] = target
    # E contributes -sum_i a G, the distances -sum_i w (x - d); both sums over i are already taken.
    grad_codewords = -(mass[:, :num, None] * grad).sum(0)
    grad_codewords -= moment.sum(0).t() - mass[:, num:].sum(0)[:, None] * offset
    return grad_x, grad_codewords.to(codewords.dtype), grad_scale.to(scale.dtype)
