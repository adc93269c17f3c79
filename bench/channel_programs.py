"""A peer: batch norm + residual + ReLU, one Triton program per channel, as attorch publishes it.

Written from its description, not from its code. A program owns a channel of a contiguous
B x C x H x W and walks it twice: the first pass merges mean and variance tile by tile in float32
(Welford), the second normalises, adds and activates. The backward pass makes its sums first, then
the gradients. There is one launch each way, and it uses as many multiprocessors as there are
channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _WARPS = 4096, 8


@triton.jit
def _offsets(t, channel, B, C, N, TILE: tl.constexpr):
    """Offsets of values t .. t + TILE of a channel, image after image, and which exist."""
    at = t + tl.arange(0, TILE).to(tl.int64)
    return at // N * C * N + channel * N + at % N, at < B * N


@triton.jit
def _forward_kernel(
    X, R, Y, Weight, Bias, Mean, InvStd, RunningMean, RunningVar, momentum, eps, B, C, N,
    RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, values = tl.program_id(0), B * N
    mean, m2, count = 0.0, 0.0, 0
    for t in range(0, values, TILE):
        offsets, inside = _offsets(t, channel, B, C, N, TILE)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        n = tl.minimum(TILE, values - t)
        here = tl.sum(x, 0) / n
        deviation = tl.where(inside, x - here, 0.0)
        step = here - mean
        m2 += tl.sum(deviation * deviation, 0) + step * step * count * n / (count + n)
        count += n
        mean += step * n / count
    inv_std = 1 / tl.sqrt(m2 / count + eps)
    tl.store(Mean + channel, mean)
    tl.store(InvStd + channel, inv_std)
    old, var = tl.load(RunningMean + channel), tl.load(RunningVar + channel)
    tl.store(RunningMean + channel, old + momentum * (mean - old))
    tl.store(RunningVar + channel, var + momentum * (m2 / (count - 1) - var))
    factor = inv_std * tl.load(Weight + channel)
    bias = tl.load(Bias + channel)
    for t in range(0, values, TILE):
        offsets, inside = _offsets(t, channel, B, C, N, TILE)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * factor + bias
        if RESIDUAL:
            y += tl.load(R + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + offsets, tl.maximum(y, 0.0).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dY, X, Y, Weight, Mean, InvStd, dX, dR, dWeight, dBias, B, C, N,
    RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, values = tl.program_id(0), B * N
    mean, inv_std = tl.load(Mean + channel), tl.load(InvStd + channel)
    total, product = 0.0, 0.0
    for t in range(0, values, TILE):
        offsets, inside = _offsets(t, channel, B, C, N, TILE)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dY + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(tl.load(Y + offsets, mask=inside, other=0.0) > 0, grad, 0.0)
        total += tl.sum(grad, 0)
        product += tl.sum(grad * (x - mean), 0) * inv_std
    tl.store(dBias + channel, total)
    tl.store(dWeight + channel, product)
    factor = inv_std * tl.load(Weight + channel)
    constant, slope = total / values, product / values * inv_std
    for t in range(0, values, TILE):
        offsets, inside = _offsets(t, channel, B, C, N, TILE)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dY + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(tl.load(Y + offsets, mask=inside, other=0.0) > 0, grad, 0.0)
        if RESIDUAL:
            tl.store(dR + offsets, grad.to(dR.dtype.element_ty), mask=inside)
        dx = factor * (grad - constant - (x - mean) * slope)
        tl.store(dX + offsets, dx.to(dX.dtype.element_ty), mask=inside)


class _BatchNormAddReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, (batch_mean, inv_std) = torch.empty_like(x), torch.empty_like(mean.expand(2, -1))
        sizes = len(x), x.shape[1], x[0, 0].numel()
        ctx.residual = residual is not None
        _forward_kernel[(x.shape[1],)](
            x, x if residual is None else residual, y, weight, bias, batch_mean, inv_std, mean,
            var, 0.1, 1e-5, *sizes, RESIDUAL=ctx.residual, TILE=_TILE, num_warps=_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(x, y, weight, batch_mean, inv_std)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, y, weight, mean, inv_std = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if ctx.residual else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        _backward_kernel[(x.shape[1],)](
            grad, x, y, weight, mean, inv_std, grad_x, grad_x if grad_residual is None else
            grad_residual, grad_weight, grad_bias, len(x), x.shape[1], x[0, 0].numel(),
            RESIDUAL=ctx.residual, TILE=_TILE, num_warps=_WARPS,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, None, None, grad_residual


def batch_norm_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None
) -> Tensor:
    """x and residual are contiguous, the rest holds C float32 values; momentum 0.1, eps 1e-5."""
    return _BatchNormAddReLU.apply(x, weight, bias, mean, var, residual)  # type: ignore[no-any-return, no-untyped-call]
