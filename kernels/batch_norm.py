"""Batch normalisation with its statistics, residual addition and ReLU, synchronised if asked.

    y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

Letters: B images, C channels, N everything else, n = number of values per channel (B N, summed
over the processes of a group). Gradients, with g = dy where act let it pass, u = x - mean,
s = 1 / sqrt(var + eps):

    dweight = sum g u s        dbias = sum g        dresidual = g
    dx = weight s (g - sum g / n - u s^2 (sum g u) / n)

and dx = weight s g where the statistics are frozen.

Statistics: every tile of x gives (mean, M2, count) about its own mean; they are merged in float64
in a fixed order by Chan's formula, so that a mean much larger than the spread costs no digits.
Synchronised (paper, appendix A, eq. 2): forward all-reduces the one float64 vector
[sum x, sum x^2, count], backward the one vector [sum g, sum g u s]; ranks may hold unequal shares
or none. The collectives stand between operators, where a compiler sees them.

Least bytes: forward reads x twice and residual once and writes y once; backward reads dy, x, y (the
mask is y > 0) and writes g, then reads g and x and writes dx. Saved: x, y (with ReLU only) and two
values per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from ._namespace import add_op_namespace_prefix
from ._tiles import Scratch, accumulation_dtype, tiles

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _tile_statistics(tile: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Mean and M2 of one tile, float64."""
    count = tile.shape[0] * tile.shape[2]
    # About the mean of a sample that is at least 1/32 of the tile: its distance from the mean is
    # at most sqrt(31) standard deviations whatever the data, so that M2 below cannot cancel badly.
    sample = tile[:, :, : -(-tile.shape[2] // 32)]
    about = sample.sum((0, 2), dtype=scratch.dtype) / (sample.shape[0] * sample.shape[2])
    deviation = scratch.take("deviation", *tile.shape)
    if tile.dtype == scratch.dtype:
        torch.sub(tile, about[:, None], out=deviation)
    else:  # an operation between two dtypes takes three times as long as a copy that converts
        deviation.copy_(tile).sub_(about[:, None])
    rest = deviation.sum((0, 2)).double() / count
    squares = deviation.square_().sum((0, 2)).double()
    return about.double() + rest, squares - count * rest.square()


def _statistics_body(x: Tensor) -> Tensor:
    channels = x.shape[1]
    scratch = Scratch(x, accumulation_dtype(x))
    counts, means, squares = [], [], []
    for b, n in tiles(x):
        mean, m2 = _tile_statistics(x[b, :, n], scratch)
        counts.append((b.stop - b.start) * (n.stop - n.start))
        means.append(mean)
        squares.append(m2)
    if not counts:
        return torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    total = float(sum(counts))
    share = torch.tensor(counts, dtype=torch.float64, device=x.device)[:, None]
    of_tile = torch.stack(means)  # [tiles, C]
    mean = (of_tile * share).sum(0) / total
    m2 = torch.stack(squares).sum(0) + ((of_tile - mean).square() * share).sum(0)
    return torch.cat([mean, m2, m2.new_full((1,), total)])


def _in_accumulation_dtype(x: Tensor, *tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    dtype = accumulation_dtype(x)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _normalise_body(
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
    y = torch.batch_norm(image, weight, bias, mean, var, False, 0.0, eps, False).squeeze(2)
    if y.stride() != torch.empty_like(x).stride():
        y = torch.empty_like(x).copy_(y)
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def _backward_sums_body(
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
    return torch.stack([plain.double(), product.double()]), masked


def _backward_input_body(
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


def _check_op(x: Tensor, others: dict[str, Optional[Tensor]]) -> None:
    """What fake tensors do not notice by themselves: every operand is on x's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"batch_norm_act: {name} must be on x's device {x.device}, got {tensor.device}."
            )


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_statistics"), mutates_args=())
def _statistics(x: Tensor) -> Tensor:
    """[mean, M2, count] of x [B, C, N]: 2 C + 1 float64 values."""
    return _statistics_body(x)


@_statistics.register_fake
def _statistics_fake(x: Tensor) -> Tensor:
    return x.new_empty((2 * x.shape[1] + 1,), dtype=torch.float64)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_normalise"), mutates_args=())
def _normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    relu: bool,
    eps: float,
    group_name: str,
) -> Tensor:
    """y of x [B, C, N]; `count` (None: frozen statistics) and `group_name` serve the backward."""
    _check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    return _normalise_body(x, mean, var, weight, bias, residual, relu, eps)


@_normalise.register_fake
def _normalise_fake(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    relu: bool,
    eps: float,
    group_name: str,
) -> Tensor:
    _check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    return torch.empty_like(x)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_sums"), mutates_args=())
def _backward_sums(
    grad: Tensor, x: Tensor, y: Optional[Tensor], mean: Tensor, inv_std: Tensor
) -> tuple[Tensor, Tensor]:
    """[sum g, sum g u s] of this process, 2 x C in float64, and g (empty without y: it is dy)."""
    return _backward_sums_body(grad, x, y, mean, inv_std)


@_backward_sums.register_fake
def _backward_sums_fake(
    grad: Tensor, x: Tensor, y: Optional[Tensor], mean: Tensor, inv_std: Tensor
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    return sums, x.new_empty(0) if y is None else torch.empty_like(x)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_input"), mutates_args=())
def _backward_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Optional[Tensor],
    sums: Optional[Tensor],
    count: Optional[Tensor],
) -> Tensor:
    """dx from g and the sums over all processes; `sums`, `count` are None if x was frozen."""
    return _backward_input_body(grad, x, mean, inv_std, weight, sums, count)


@_backward_input.register_fake
def _backward_input_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Optional[Tensor],
    sums: Optional[Tensor],
    count: Optional[Tensor],
) -> Tensor:
    return torch.empty_like(x)


def _all_reduce(packed: Tensor, group_name: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(packed, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, count, weight, bias, _, relu, ctx.eps, ctx.group_name = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, mean, var, count, weight, output if relu else None)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    x, mean, var, count, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = (ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
    inv_std = (var + ctx.eps).rsqrt()
    sums, masked = _backward_sums(grad, x, y, mean, inv_std)
    grad = grad if y is None else masked
    grad_x = None
    if need_x:
        total = None if count is None else sums
        if total is not None and ctx.group_name:
            total = _all_reduce(total, ctx.group_name)
        grad_x = _backward_input(grad, x, mean, inv_std, weight, total, count)
    return (
        grad_x,
        None,
        None,
        None,
        sums[1].to(weight.dtype) if need_weight else None,
        sums[0].to(ctx.bias_dtype) if need_bias else None,
        grad if need_residual else None,
        None,
        None,
        None,
    )


_normalise.register_autograd(_autograd_backward, setup_context=_setup_context)


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
    _check_op(x, {**per_channel, "residual": residual})
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


def _merge(x: Tensor, statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, M2 and count, float64, from the sum and M2 of every image and channel."""
    total, m2 = (t.detach().double() for t in statistics)
    count = total.new_full((1,), float(x.shape[0] * x.shape[2]))
    mean = total.sum(0) / count.clamp(min=1.0)
    apart = (total / max(x.shape[2], 1) - mean).square().sum(0)
    return mean, m2.sum(0) + x.shape[2] * apart, count


def _moments(
    x: Tensor, group: Optional[ProcessGroup], statistics: Optional[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, M2 and count over the group, float64."""
    channels = x.shape[1]
    if statistics is None:
        mean, m2, count = _statistics(x.detach()).split([channels, channels, 1])
    else:
        mean, m2, count = _merge(x, statistics)
    if group is None:
        return mean, m2, count
    total = mean * count
    packed = torch.cat([total, m2 + mean * total, count])
    total, squares, count = _all_reduce(packed, group.group_name).split([channels, channels, 1])
    count = count.clamp(min=1.0)
    mean = total / count
    return mean, (squares - mean * total).clamp(min=0.0), count


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
    for name, tensor in zip(("sum", "M2"), statistics or ()):
        if tensor.shape != x.shape[:2] or tensor.device != x.device:
            raise ValueError(
                f"batch_norm_act: {name} of statistics must be B x C on x's device, "
                f"{tuple(x.shape[:2])} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}."
            )
    features = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    added = residual
    if residual is not None:
        added = residual.flatten(2) if x.dim() > 2 else residual[:, :, None]
    dtype = accumulation_dtype(x)
    count = None
    if training:
        if group is None and x.numel() // x.shape[1] < 2:
            raise ValueError(
                "batch_norm_act: training needs more than one value per channel, got x of shape "
                f"{tuple(x.shape)}; the batch is too small."
            )
        with torch.no_grad():
            mean, m2, count = _moments(features, group, statistics)
            var = m2 / count
            _update_running(running_mean, running_var, mean, m2, count, momentum)
    elif running_mean is None or running_var is None:
        raise ValueError(
            "batch_norm_act: running_mean and running_var are needed when training is False."
        )
    else:
        mean, var = running_mean, running_var
    y = _normalise(
        features,
        mean.to(dtype),
        var.to(dtype),
        count,
        weight,
        bias,
        added,
        activation == "relu",
        eps,
        "" if group is None else group.group_name,
    )
    return y.view(x.shape)


def _update_running(
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    momentum: float,
) -> None:
    if running_mean is None and running_var is None:
        return
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"batch_norm_act: momentum must be a number, got {momentum!r}.")
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        unbiased = m2 / (count - 1).clamp(min=1.0)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
