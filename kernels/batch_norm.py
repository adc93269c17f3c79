"""Batch normalisation with its statistics, residual addition and ReLU, synchronised if asked.

    y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

Letters: B images, C channels, N everything else, n = number of values per channel (B N, summed
over the processes of a group). Gradients, with g = dy where act let it pass, u = x - mean,
s = 1 / sqrt(var + eps):

    dweight = sum g u s        dbias = sum g        dresidual = g
    dx = weight s (g - sum g / n - u s^2 (sum g u) / n)

and dx = weight s g where the statistics are frozen.

Statistics: every tile of x gives (mean, M2, count) about a mean of its own; they are merged in
float64 in a fixed order, so that a mean much larger than the spread costs no digits. Synchronised
(paper, appendix A, eq. 2): forward all-reduces the one float64 vector [sum x, sum x^2, count],
backward the one vector [sum g, sum g u s]; ranks may hold unequal shares or none. The collectives
stand between operators, where a compiler sees them.

Least bytes, in tensors of x's size. Forward: x twice, residual, y. Backward without a residual: dy
and x twice, dx (the ReLU's mask is made again from x). With one: the same and dresidual, and a mask
of one bit a value, which forward writes and either pass reads. Frozen statistics: one pass. Saved:
x, the mask if any, and two values a channel; the PyTorch code keeps y in place of the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from ._tiles import accumulation_dtype
from .batch_norm_ops import (
    all_reduce,
    check_op,
    moments,
    normalise,
    statistics_of,
    unpack,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_inputs(
    x: Tensor,
    per_channel: dict[str, Optional[Tensor]],
    residual: Optional[Tensor],
    activation: Optional[str],
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"batch_norm_act: x must be a tensor, got {type(x).__name__}.")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"batch_norm_act: x must be float32, bfloat16, float16 or float64, got {x.dtype}."
        )
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(
            "batch_norm_act: x needs a batch and a channel dimension with at least one channel, "
            f"got shape {tuple(x.shape)}."
        )
    if activation not in ("relu", None):
        raise ValueError(f'batch_norm_act: activation must be "relu" or None, got {activation!r}.')
    for name, tensor in {**per_channel, "residual": residual}.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(
                f"batch_norm_act: {name} must be a tensor or None, got {type(tensor).__name__}."
            )
    check_op(x, {**per_channel, "residual": residual})
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, x.dtype):
            raise TypeError(
                f"batch_norm_act: {name} must be float32 or have x's dtype {x.dtype}, "
                f"got {tensor.dtype}."
            )
        if tensor.dim() != 1 or tensor.shape[0] != x.shape[1]:
            raise ValueError(
                f"batch_norm_act: {name} must have one value for each of the {x.shape[1]} "
                f"channels of x, got shape {tuple(tensor.shape)}."
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm_act: residual must have x's shape {tuple(x.shape)} and dtype {x.dtype}, "
            f"got {tuple(residual.shape)} and {residual.dtype}."
        )


def _check_statistics(x: Tensor, statistics: Optional[tuple[Tensor, Tensor]]) -> None:
    if statistics is None:
        return
    if isinstance(statistics, Tensor) or len(statistics) != 2:
        raise TypeError(
            "batch_norm_act: statistics must be the pair (sum, M2), each B x C, or None."
        )
    for name, tensor in zip(("sum", "M2"), statistics):
        if tensor.shape != x.shape[:2] or tensor.device != x.device:
            raise ValueError(
                f"batch_norm_act: {name} of statistics must be B x C on x's device, "
                f"{tuple(x.shape[:2])} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}."
            )


def _pack_images(x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """The same from the sum and M2 of every image and channel."""
    total, m2 = (t.detach().double() for t in statistics)
    squares = m2 + total.square() / max(x.shape[2], 1)
    count = total.new_full((1,), float(x.shape[0] * x.shape[2]))
    return torch.cat([total.sum(0), squares.sum(0), count])


def _batch_moments(
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: float,
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over the group; moves the running statistics."""
    if running_mean is None and running_var is None:
        momentum = 0.0
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"batch_norm_act: momentum must be a number, got {momentum!r}.")
    momentum = float(momentum)
    if group is None and statistics is None:
        return moments(x, running_mean, running_var, momentum)
    packed = statistics_of(x) if statistics is None else _pack_images(x, statistics)
    if group is not None:
        packed = all_reduce(packed, group.group_name)
    return unpack(packed, x, running_mean, running_var, momentum)


def _check_batch(x: Tensor, group: Optional[ProcessGroup]) -> None:
    if group is None and x.numel() // x.shape[1] < 2:
        raise ValueError(
            "batch_norm_act: training needs more than one value per channel, got x of shape "
            f"{tuple(x.shape)}; the batch is too small."
        )


def _running_moments(
    x: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    if running_mean is None or running_var is None:
        raise ValueError(
            "batch_norm_act: running_mean and running_var are needed when training is False."
        )
    dtype = accumulation_dtype(x)
    return running_mean.to(dtype), running_var.to(dtype)


def batch_norm_act(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Optional[Tensor] = None,
    activation: Optional[str] = "relu",
    group: Optional[ProcessGroup] = None,
    statistics: Optional[tuple[Tensor, Tensor]] = None,
) -> Tensor:
    """Batch normalisation, residual addition and activation (paper, appendix A, eq. 2).

    Args:
        x: B x C x ..., at least two dimensions, any memory format; float32, bfloat16, float16 or
            float64. Contiguous and channels_last are read where they lie, other layouts copied.
        weight, bias: C or None; float32 or x's dtype.
        running_mean, running_var: C or None; float32 or x's dtype. Training moves them in place
            towards the mean and the unbiased variance of the batch.
        training: normalise with the statistics of the batch; otherwise with the running ones, as
            constants in the backward pass.
        momentum: weight of the new value in the running statistics. For a cumulative average pass
            1 / (number of batches seen); None, as a layer may hold it, is an error.
        eps: added to the variance.
        residual: added before the activation; shape and dtype of x.
        activation: "relu" or None.
        group: in training, the processes whose batches are normalised as one. Their shares may be
            unequal or empty, but each must call this, and its backward, as often as the others.
        statistics: in training, the sum and M2 of x over the dimensions after the channels, each
            B x C, as `encode` returns them with its codes: x is then not read for them. They count
            as part of x in the backward pass.

    Returns:
        y with the shape, dtype and memory format of x.

    Raises:
        TypeError: x is no tensor, or a dtype or `momentum` is not allowed.
        ValueError: shapes or devices do not fit, the activation is unknown, running statistics are
            missing in evaluation, or there is no more than one value per channel to train on.
    """
    per_channel = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    _check_inputs(x, per_channel, residual, activation)
    _check_statistics(x, statistics)
    features, added = _as_planes(x), None if residual is None else _as_planes(residual)
    if training:
        _check_batch(x, group)
        with torch.no_grad():
            mean, var, count = _batch_moments(
                features.detach(), running_mean, running_var, momentum, group, statistics
            )
    else:
        mean, var = _running_moments(x, running_mean, running_var)
        count = None
    relu = activation == "relu"
    y, _ = normalise(
        features,
        mean,
        var,
        count,
        weight,
        bias,
        added,
        relu,
        eps,
        relu and residual is not None and _needs_gradient(x, weight, bias, residual),
        "" if group is None else group.group_name,
    )
    return y.view(x.shape)


def _as_planes(x: Tensor) -> Tensor:
    """B x C x N."""
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


def _needs_gradient(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
