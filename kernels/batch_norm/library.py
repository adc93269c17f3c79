"""The torch.library operators that a batch normalisation is made of; see operator.py.

The collectives of a synchronised one stand between them, where a compiler sees them.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..runtime.dispatch import plan_of
from ..runtime.eager import Direct
from ..runtime.inductor import fake_of
from ..runtime.launch import run
from ..runtime.tiling import accumulation_dtype
from . import pytorch
from .checks import check_devices


def _pack(mean: Tensor, m2: Tensor, count: Tensor) -> Tensor:
    """[sum x, sum x^2, count] in float64; from it the variance loses no digits that x has."""
    total = mean * count
    return torch.cat([total, m2 + mean * total, count])


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor, or a copy of it, as a new tensor like x would lie in memory."""
    if tensor.numel() == 0 or tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _rows(*per_channel: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Contiguous, as the kernels read them."""
    return [None if tensor is None else tensor.contiguous() for tensor in per_channel]


def _affine(
    plan: Any,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
) -> Any:
    return plan.Affine(*_rows(mean, var, weight, bias), eps)


def _residual(
    plan: Any,
    dense: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    weight: Optional[Tensor],
    eps: float,
) -> Any:
    """A residual that is normalised, for the backward pass."""
    if residual is None or mean is None or var is None:
        return None
    return plan.Residual(_like(residual, dense), _affine(plan, mean, var, weight, None, eps))


def _write_back(moved: Any, mean: Optional[Tensor], var: Optional[Tensor]) -> None:
    """Copy running statistics back where the kernel moved a contiguous copy of them."""
    for tensor, row in ((mean, moved.mean), (var, moved.var)):
        if tensor is not None and tensor is not row:
            tensor.copy_(row)


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
    if plan := plan_of(__package__, x):
        running = plan.Running(*_rows(running_mean, running_var), momentum)
        made: tuple[Tensor, Tensor, Tensor] = run(plan.Statistics(plan.dense(x), running))
        _write_back(running, running_mean, running_var)
        return made
    mean, m2, count = pytorch.statistics(x)
    pytorch.move_running(running_mean, running_var, mean, m2, count, momentum)
    dtype = accumulation_dtype(x)
    return mean.to(dtype, copy=True), (m2 / count).to(dtype), count.clone()


@fake_of(moments)
def _moments_fake(
    x: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_moments(x, x.shape[1])


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_statistics"), mutates_args=())
def statistics_of(x: Tensor) -> Tensor:
    """[sum x, sum x^2, count] of x [B, C, N]: 2 C + 1 float64 values."""
    if plan := plan_of(__package__, x):
        return run(plan.Statistics(plan.dense(x), None))[0]
    return _pack(*pytorch.statistics(x))


@fake_of(statistics_of)
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

    Only x's dtype is used: it may be empty on this rank.
    """
    if plan := plan_of(__package__, x, read=False):
        running = plan.Running(*_rows(running_mean, running_var), momentum)
        made: tuple[Tensor, Tensor, Tensor] = run(plan.Moments(packed, running))
        _write_back(running, running_mean, running_var)
        return made
    channels = packed.shape[0] // 2
    total, squares, count = packed.split([channels, channels, 1])
    count = count.clamp(min=1.0)
    mean = total / count
    m2 = (squares - mean * total).clamp(min=0.0)
    pytorch.move_running(running_mean, running_var, mean, m2, count, momentum)
    dtype = accumulation_dtype(x)
    return mean.to(dtype, copy=True), (m2 / count).to(dtype), count


@fake_of(unpack)
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
    forked: bool,
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
    res_bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """y of x [B, C, N]; the ReLU's mask, one bit per value, or empty; y's twin, or empty.

    `pack` asks for the mask; the PyTorch code makes none because it keeps y. `count` (None: frozen
    statistics) and `group_name` are for the backward pass. `forked` asks for the twin: an operator
    must not return y twice, so the twin has y's shape, no values, and takes a gradient as y does.
    `res_mean` and the others, if given, normalise the residual; not with frozen statistics.
    """
    check_devices(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        added = None if residual is None else _like(residual, dense)
        affine, of_residual = _affine(plan, mean, var, weight, bias, eps), None
        if res_mean is not None and res_var is not None:
            of_residual = _affine(plan, res_mean, res_var, res_weight, res_bias, eps)
        call = plan.Normalise(dense, affine, added, relu, pack, count is None, of_residual)
        y, mask = run(call)
        return _like(y, x), mask, _twin(x, forked)
    if residual is not None and res_mean is not None and res_var is not None:
        of_residual = res_mean, res_var, res_weight, res_bias
        residual = pytorch.normalise(residual, *of_residual, None, False, eps)
    y = pytorch.normalise(x, mean, var, weight, bias, residual, relu, eps)
    return y, x.new_empty(0, dtype=torch.uint8), _twin(x, forked)


def _twin(x: Tensor, forked: bool) -> Tensor:
    return x.new_empty(1).expand(x.shape) if forked else x.new_empty(0)


@fake_of(normalise)
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
    forked: bool,
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
    res_bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    plan = plan_of(__package__, x) if pack else None
    mask = x.new_empty(plan.mask_shape(x) if plan else 0, dtype=torch.uint8)
    return torch.empty_like(x), mask, _twin(x, forked)


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward_sums"), mutates_args=())
def backward_sums(
    grad: Tensor,
    other: Optional[Tensor],
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
    residual: Optional[Tensor],
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[sum g, sum g u s] of this process, 2 x C in float64; dweight, dbias; g (or empty); empty.

    Where `residual`, which was normalised, is given, the sums have its sum g u s for a third row,
    and the last output is the gradient of its weight. `kept` is the mask as `normalise` packed it,
    or y, or None where x alone gives the mask. `other` is the gradient of y's twin, to be added to
    `grad`: g is then always returned.
    """
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = _like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu
        twin = None if other is None else _like(other, dense)
        normalised = _residual(plan, dense, residual, res_mean, res_var, res_weight, eps)
        call = plan.BackwardSums(dense, *given, False, False, twin, normalised)
        sums, grad_weight, grad_bias, _, masked, grad_res_weight = run(call)
        return sums, grad_weight, grad_bias, _like(masked, x), grad_res_weight
    if other is not None:
        grad = torch.add(grad, other, out=torch.empty_like(x))
    sums, masked = pytorch.backward_sums(grad, x, kept, mean, (var + eps).rsqrt())
    if other is not None and kept is None:
        masked = grad
    if residual is not None and res_mean is not None and res_var is not None:
        g = grad if kept is None else masked
        found, _ = pytorch.backward_sums(g, residual, None, res_mean, (res_var + eps).rsqrt())
        sums = torch.cat([sums, found[1:]])
    grad_weight, grad_bias, grad_res = _parameter_gradients(x, sums, weight, bias, res_weight)
    return sums, grad_weight, grad_bias, masked, grad_res


@fake_of(backward_sums)
def _backward_sums_fake(
    grad: Tensor,
    other: Optional[Tensor],
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
    residual: Optional[Tensor],
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = 2 if residual is None else 3
    sums = x.new_empty((rows, x.shape[1]), dtype=torch.float64)
    made = other is not None or not (kept is None or plan_of(__package__, x))
    masked = torch.empty_like(x) if made else x.new_empty(0)
    grad_weight, grad_bias, grad_res = _parameter_gradients(x, sums, weight, bias, res_weight)
    return sums, grad_weight, grad_bias, masked, grad_res


def _parameter_gradients(x: Tensor, sums: Tensor, *parameters: Optional[Tensor]) -> list[Tensor]:
    """Of weight, bias and, with three rows of sums, res_weight; empty where there is none."""
    return [
        x.new_empty(0) if parameter is None else sums[row].to(parameter.dtype, copy=True)
        for row, parameter in zip((1, 0, 2), parameters)
    ]


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
    residual: Optional[Tensor],
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """dx from the sums over all processes; the residual's gradient, if needed, or empty.

    `grad` is dL/dy with `kept` as in `backward_sums`, or g with `relu` False. `residual` is given
    where it was normalised.
    """
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = (_like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu)
        normalised = _residual(plan, dense, residual, res_mean, res_var, res_weight, eps)
        call = plan.BackwardInput(dense, *given, sums, count, need_residual, normalised)
        made = run(call)
        return _like(made[0], x), _like(made[1], x)
    inv_std = (var + eps).rsqrt()
    grad_x = pytorch.backward_input(grad, x, mean, inv_std, weight, sums[:2], count)
    if not need_residual or residual is None or res_mean is None or res_var is None:
        return grad_x, x.new_empty(0)
    of_residual = res_mean, (res_var + eps).rsqrt(), res_weight, sums[::2], count
    return grad_x, _like(pytorch.backward_input(grad, residual, *of_residual), x)


@fake_of(backward_input)
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
    residual: Optional[Tensor],
    res_mean: Optional[Tensor],
    res_var: Optional[Tensor],
    res_weight: Optional[Tensor],
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
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = (_like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu)
        call = plan.BackwardSums(dense, *given, frozen=True, need_residual=need_residual)
        _, grad_weight, grad_bias, grad_x, grad_residual, _ = run(call)
        return _like(grad_x, x), grad_weight, grad_bias, _like(grad_residual, x)
    inv_std = (var + eps).rsqrt()
    sums, masked = pytorch.backward_sums(grad, x, kept, mean, inv_std)
    grad = grad if kept is None else masked
    grad_x = pytorch.backward_input(grad, x, mean, inv_std, weight, None, None)
    grad_weight, grad_bias = _parameter_gradients(x, sums, weight, bias)
    return grad_x, grad_weight, grad_bias, masked


@fake_of(backward_frozen)
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
    written = need_residual if plan_of(__package__, x) else kept is not None
    grad_residual = torch.empty_like(x) if written else x.new_empty(0)
    grad_weight, grad_bias = _parameter_gradients(x, sums, weight, bias)
    return torch.empty_like(x), grad_weight, grad_bias, grad_residual


def all_reduce(packed: Tensor, group_name: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(packed, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


# The operators as eager code calls them.
direct_moments, direct_unpack = Direct(moments, changes=(1, 2)), Direct(unpack, changes=(2, 3))
direct_statistics_of, direct_normalise = Direct(statistics_of), Direct(normalise)
direct_backward_sums = Direct(backward_sums)
direct_backward_input = Direct(backward_input)
direct_backward_frozen = Direct(backward_frozen)
