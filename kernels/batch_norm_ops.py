"""The operators that `batch_norm_act` is made of, what they return for fake tensors, autograd.

Letters as in batch_norm.py; x is B x C x N.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import batch_norm_pytorch
from ._inductor import register_fake
from ._namespace import add_op_namespace_prefix
from ._tiles import accumulation_dtype
from .launch import takes_triton


def check_op(x: Tensor, others: dict[str, Optional[Tensor]]) -> None:
    """What fake tensors do not notice by themselves: every operand is on x's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"batch_norm_act: {name} must be on x's device {x.device}, got {tensor.device}."
            )


def _pack(mean: Tensor, m2: Tensor, count: Tensor) -> Tensor:
    """[sum x, sum x^2, count] in float64; from it the variance loses no digits that x has."""
    total = mean * count
    return torch.cat([total, m2 + mean * total, count])


def _triton(x: Tensor) -> Any:
    """The module that launches the Triton kernels, where x goes to them; else None."""
    if not takes_triton(x) or x.numel() == 0:
        return None
    from . import batch_norm_triton

    return batch_norm_triton


def _empty_moments(x: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x)
    mean, var = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
    return mean, var, x.new_empty(1, dtype=torch.float64)


@torch.library.custom_op(
    add_op_namespace_prefix("batch_norm_moments"), mutates_args=("running_mean", "running_var")
)
def moments(
    x: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of x [B, C, N]; moves the running statistics."""
    if kernels := _triton(x):
        running = kernels.Running(running_mean, running_var, momentum)
        made: tuple[Tensor, Tensor, Tensor] = kernels.statistics(x, running)
        return made
    mean, m2, count = batch_norm_pytorch.statistics(x)
    batch_norm_pytorch.move_running(running_mean, running_var, mean, m2, count, momentum)
    dtype = accumulation_dtype(x)
    return mean.to(dtype, copy=True), (m2 / count).to(dtype), count.clone()


@register_fake(moments)
def _moments_fake(
    x: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_moments(x, x.shape[1])


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_statistics"), mutates_args=())
def statistics_of(x: Tensor) -> Tensor:
    """[sum x, sum x^2, count] of x [B, C, N]: 2 C + 1 float64 values."""
    if kernels := _triton(x):
        made: tuple[Tensor] = kernels.statistics(x, None)
        return made[0]
    return _pack(*batch_norm_pytorch.statistics(x))


@register_fake(statistics_of)
def _statistics_fake(x: Tensor) -> Tensor:
    return x.new_empty((2 * x.shape[1] + 1,), dtype=torch.float64)


@torch.library.custom_op(
    add_op_namespace_prefix("batch_norm_unpack"), mutates_args=("running_mean", "running_var")
)
def unpack(
    packed: Tensor,
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count from [sum x, sum x^2, count]; moves the running statistics.

    x gives the dtype alone: it may be empty on this rank.
    """
    if takes_triton(x):
        from . import batch_norm_triton as kernels

        made = kernels.moments(packed, kernels.Running(running_mean, running_var, momentum))
        return made
    channels = packed.shape[0] // 2
    total, squares, count = packed.split([channels, channels, 1])
    count = count.clamp(min=1.0)
    mean = total / count
    m2 = (squares - mean * total).clamp(min=0.0)
    batch_norm_pytorch.move_running(running_mean, running_var, mean, m2, count, momentum)
    dtype = accumulation_dtype(x)
    return mean.to(dtype, copy=True), (m2 / count).to(dtype), count


@register_fake(unpack)
def _unpack_fake(
    packed: Tensor,
    x: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_moments(x, packed.shape[0] // 2)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_normalise"), mutates_args=())
def normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    relu: bool,
    eps: float,
    pack: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """y of x [B, C, N], and which values the ReLU let pass, a bit each, or empty.

    `pack` asks for them; the PyTorch code makes none, for it keeps y. `count` (None: frozen
    statistics) and `group_name` serve the backward pass.
    """
    check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    if kernels := _triton(x):
        affine = kernels.Affine(mean, var, weight, bias, eps)
        made: tuple[Tensor, Tensor] = kernels.normalise(
            x, affine, residual, relu, pack, fold=count is None
        )
        return made
    y = batch_norm_pytorch.normalise(x, mean, var, weight, bias, residual, relu, eps)
    return y, x.new_empty(0, dtype=torch.uint8)


@register_fake(normalise)
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
    pack: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    kernels = _triton(x) if pack else None
    size = kernels.mask_bytes(x) if kernels else 0
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_sums"), mutates_args=())
def backward_sums(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[sum g, sum g u s] of this process, 2 x C in float64; dweight, dbias; g (or empty).

    `kept` is the mask as `normalise` packed it, or y, or None where g is made again from x.
    """
    if kernels := _triton(x):
        affine = kernels.Affine(mean, var, weight, bias, eps)
        sums, grad_weight, grad_bias, _, masked = kernels.backward_sums(
            grad, x, kept, affine, relu, frozen=False, need_residual=False
        )
        return sums, grad_weight, grad_bias, masked
    sums, masked = batch_norm_pytorch.backward_sums(grad, x, kept, mean, (var + eps).rsqrt())
    return (sums, *_parameter_gradients(x, sums, weight, bias), masked)


@register_fake(backward_sums)
def _backward_sums_fake(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    masked = x.new_empty(0) if kept is None or _triton(x) else torch.empty_like(x)
    return (sums, *_parameter_gradients(x, sums, weight, bias), masked)


def _parameter_gradients(
    x: Tensor, sums: Tensor, weight: Optional[Tensor], bias: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """dweight and dbias, empty where there is no parameter."""
    grad_weight = x.new_empty(0) if weight is None else sums[1].to(weight.dtype, copy=True)
    grad_bias = x.new_empty(0) if bias is None else sums[0].to(bias.dtype, copy=True)
    return grad_weight, grad_bias


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_input"), mutates_args=())
def backward_input(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    sums: Tensor,
    count: Tensor,
    relu: bool,
    eps: float,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    """dx from the sums over all processes; the residual's gradient, if needed, or empty.

    `grad` is dL/dy with `kept` as in `backward_sums`, or g with `relu` False.
    """
    if kernels := _triton(x):
        affine = kernels.Affine(mean, var, weight, bias, eps)
        made: tuple[Tensor, Tensor] = kernels.backward_input(
            grad, x, kept, affine, sums, count, relu, need_residual
        )
        return made
    inv_std = (var + eps).rsqrt()
    grad_x = batch_norm_pytorch.backward_input(grad, x, mean, inv_std, weight, sums, count)
    return grad_x, x.new_empty(0)


@register_fake(backward_input)
def _backward_input_fake(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    sums: Tensor,
    count: Tensor,
    relu: bool,
    eps: float,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if need_residual else x.new_empty(0)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_frozen"), mutates_args=())
def backward_frozen(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the residual's gradient (or empty) with frozen statistics."""
    if kernels := _triton(x):
        affine = kernels.Affine(mean, var, weight, bias, eps)
        _, grad_weight, grad_bias, grad_x, grad_residual = kernels.backward_sums(
            grad, x, kept, affine, relu, frozen=True, need_residual=need_residual
        )
        return grad_x, grad_weight, grad_bias, grad_residual
    inv_std = (var + eps).rsqrt()
    sums, masked = batch_norm_pytorch.backward_sums(grad, x, kept, mean, inv_std)
    grad = grad if kept is None else masked
    grad_x = batch_norm_pytorch.backward_input(grad, x, mean, inv_std, weight, None, None)
    return (grad_x, *_parameter_gradients(x, sums, weight, bias), masked)


@register_fake(backward_frozen)
def _backward_frozen_fake(
    grad: Tensor,
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    written = need_residual if _triton(x) else kept is not None
    grad_residual = torch.empty_like(x) if written else x.new_empty(0)
    return torch.empty_like(x), *_parameter_gradients(x, sums, weight, bias), grad_residual


def all_reduce(packed: Tensor, group_name: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(packed, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mean, var, count, weight, bias, _, ctx.relu, ctx.eps, pack, ctx.group_name = inputs
    y, mask = output
    ctx.mark_non_differentiable(mask)
    kept = None
    if ctx.relu and not _triton(x):
        kept = y
    elif pack:
        kept = mask
    ctx.save_for_backward(x, mean, var, count, weight, bias, kept)


def _autograd_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Optional[Tensor], ...]:
    x, mean, var, count, weight, bias, kept = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = (ctx.needs_input_grad[i] for i in (0, 4, 5, 6))
    # Without a ReLU the residual's gradient is dy itself.
    write_residual = need_residual and ctx.relu
    call = (x, kept, mean, var, weight, bias)
    grad_x = grad_residual = None
    if count is None:
        grad_x, grad_weight, grad_bias, grad_residual = backward_frozen(
            grad, *call, ctx.relu, ctx.eps, write_residual
        )
    else:
        sums, grad_weight, grad_bias, masked = backward_sums(grad, *call, ctx.relu, ctx.eps)
        if need_x or write_residual:
            if ctx.group_name:
                sums = all_reduce(sums, ctx.group_name)
            if kept is not None and not _triton(x):  # the PyTorch code has made g
                grad_x, _ = backward_input(
                    masked, x, None, *call[2:], sums, count, False, ctx.eps, False
                )
                grad_residual = masked
            else:
                grad_x, grad_residual = backward_input(
                    grad, *call, sums, count, ctx.relu, ctx.eps, write_residual
                )
    return (
        grad_x if need_x else None,
        None,
        None,
        None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (grad_residual if write_residual else grad) if need_residual else None,
        None,
        None,
        None,
        None,
    )


normalise.register_autograd(_autograd_backward, setup_context=_setup_context)
