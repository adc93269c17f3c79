"""`batch_norm_act` in PyTorch: the code of CPUs, of float64, and of GPUs without Triton.

x is B x C x N: images, channels, pixels. The maths are in operator.py.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..runtime.tiling import Scratch, accumulation_dtype, tiles


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, M2 and count, float64."""
    images, channels, pixels = x.shape
    if x.numel() == 0:
        mean, m2, count = x.new_zeros(2 * channels + 1, dtype=torch.float64).split(
            [channels, channels, 1]
        )
        return mean, m2, count
    scratch = Scratch(x, accumulation_dtype(x))
    # About the mean of a sample that is at least 1/32 of x: its distance from the mean is at most
    # sqrt(31) standard deviations whatever the data, so that M2 below cannot cancel badly.
    sample = x[:, :, : -(-pixels // 32)]
    about = sample.sum((0, 2), dtype=scratch.dtype) / (images * sample.shape[2])
    nought, one = torch.zeros_like(about), torch.ones_like(about)
    total, squares = x.new_zeros((2, channels), dtype=torch.float64)
    for b, n in tiles(x):
        tile = x[b, :, n]
        deviation = scratch.take("deviation", *tile.shape)
        if x.dtype == scratch.dtype:
            torch.sub(tile, about[:, None], out=deviation)
        else:  # an operation between two dtypes takes three times as long as a copy that converts
            deviation.copy_(tile).sub_(about[:, None])
        # Its sum of deviations would be less precise where the sample lies far off.
        squares += _sums(deviation, deviation, nought, one)[1]
        total += deviation.sum((0, 2))
    count = total.new_full((1,), float(images * pixels))
    rest = total / count
    return about.double() + rest, (squares - total * rest).clamp(min=0.0), count


def _sums(grad: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    """Sums of grad and of grad (x - mean) inv_std over each channel, float64, in one pass."""
    _, product, plain = torch.ops.aten.native_batch_norm_backward(
        grad.unsqueeze(2),
        x.unsqueeze(2),
        torch.ones_like(mean),
        mean,
        inv_std,
        mean,
        inv_std,
        True,
        0.0,
        [False, True, True],
    )
    return torch.stack([plain.double(), product.double()])


def move_running(
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    momentum: float,
) -> None:
    """Move the running statistics, in place, towards the mean and the unbiased variance."""
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = m2 / (count - 1).clamp(min=1.0)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _in_accumulation_dtype(x: Tensor, *tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    dtype = accumulation_dtype(x)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    relu: bool,
    eps: float,
) -> Tensor:
    weight, bias = _in_accumulation_dtype(x, weight, bias)
    # B x C x 1 x N: only with four dimensions does torch see channels_last.
    image = x.unsqueeze(2)
    y = torch.batch_norm(image, weight, bias, mean, var, False, 0.0, eps, False)
    # A view would have autograd refuse every in-place operation on what the operator returns.
    y = torch.ops.aten._unsafe_view(y, x.shape)
    if y.stride() != torch.empty_like(x).stride():
        y = torch.empty_like(x).copy_(y)
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def backward_sums(
    grad: Tensor, x: Tensor, y: Optional[Tensor], mean: Tensor, inv_std: Tensor
) -> tuple[Tensor, Tensor]:
    masked = x.new_empty(0)
    if y is not None:
        masked = torch.empty_like(x)
        grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=masked)
    elif grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    if x.numel() == 0:
        return x.new_zeros((2, x.shape[1]), dtype=torch.float64), masked
    return _sums(grad, x, mean, inv_std), masked


def backward_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Optional[Tensor],
    sums: Optional[Tensor],
    count: Optional[Tensor],
) -> Tensor:
    dtype = accumulation_dtype(x)
    factor = (inv_std if weight is None else inv_std * weight.to(dtype))[:, None]
    out = torch.empty_like(x)
    if sums is None or count is None:
        return torch.mul(grad, factor, out=out)
    share = (sums / count).to(dtype)[:, :, None]
    constant, slope = -factor * share[0], -factor * share[1] * inv_std[:, None]
    scratch = Scratch(out, dtype)
    for b, n in tiles(x):
        tile, part = x[b, :, n], grad[b, :, n]
        if x.dtype == dtype:
            target = torch.sub(tile, mean[:, None], out=out[b, :, n])
        else:
            target = scratch.take("out", *tile.shape).copy_(tile).sub_(mean[:, None])
            part = scratch.take("part", *tile.shape).copy_(part)
        torch.addcmul(constant, target, slope, out=target).addcmul_(part, factor)
        if x.dtype != dtype:
            out[b, :, n] = target
    return out
