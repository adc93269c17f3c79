"""Batch normalisation with its statistics, residual addition and ReLU, synchronised if asked.

    y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

B images have C channels, N is everything else, n the number of values per channel (B N, summed
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

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from .._namespace import add_op_namespace_prefix
from ..runtime.arguments import (
    check_dense,
    check_derivatives,
    check_flag,
    check_no_vmap,
    check_number,
)
from ..runtime.dispatch import plan_of
from ..runtime.eager import Direct, applied, changed, quiet, undisturbed
from ..runtime.inductor import register_fake
from ..runtime.launch import run
from ..runtime.replay import Repeated
from ..runtime.tiling import accumulation_dtype
from . import pytorch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_op(x: Tensor, others: dict[str, Optional[Tensor]]) -> None:
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


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor, or a copy of it, as a new tensor like x would lie in memory."""
    if tensor.numel() == 0 or tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _rows(*per_channel: Optional[Tensor]) -> list[Optional[Tensor]]:
    """As the kernels read them: one value behind the other."""
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


def _write_back(moved: Any, mean: Optional[Tensor], var: Optional[Tensor]) -> None:
    """Running statistics that were copied to be moved."""
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


@register_fake(moments)
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
    forked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of x [B, C, N]; which values the ReLU let pass, a bit each, or empty; y's twin, or empty.

    `pack` asks for the bits; the PyTorch code makes none, for it keeps y. `count` (None: frozen
    statistics) and `group_name` serve the backward pass. `forked` asks for the twin: it has y's
    shape and no values, for an operator must not return y twice, and takes a gradient like y.
    """
    _check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        added = None if residual is None else _like(residual, dense)
        affine = _affine(plan, mean, var, weight, bias, eps)
        y, mask = run(plan.Normalise(dense, affine, added, relu, pack, fold=count is None))
        return _like(y, x), mask, _twin(x, forked)
    y = pytorch.normalise(x, mean, var, weight, bias, residual, relu, eps)
    return y, x.new_empty(0, dtype=torch.uint8), _twin(x, forked)


def _twin(x: Tensor, forked: bool) -> Tensor:
    return x.new_empty(1).expand(x.shape) if forked else x.new_empty(0)


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
    forked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(x, {"mean": mean, "weight": weight, "bias": bias, "residual": residual})
    plan = plan_of(__package__, x) if pack else None
    size = plan.mask_bytes(x) if plan else 0
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8), _twin(x, forked)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[sum g, sum g u s] of this process, 2 x C in float64; dweight, dbias; g (or empty).

    `kept` is the mask as `normalise` packed it, or y, or None where g is made again from x. `other`
    is a gradient of y's twin, which is added to `grad`: g is then always made.
    """
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = _like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu
        twin = None if other is None else _like(other, dense)
        call = plan.BackwardSums(dense, *given, False, False, twin)
        sums, grad_weight, grad_bias, _, masked = run(call)
        return sums, grad_weight, grad_bias, _like(masked, x)
    if other is not None:
        grad = torch.add(grad, other, out=torch.empty_like(x))
    sums, masked = pytorch.backward_sums(grad, x, kept, mean, (var + eps).rsqrt())
    if other is not None and kept is None:
        masked = grad
    return (sums, *_parameter_gradients(x, sums, weight, bias), masked)


@register_fake(backward_sums)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    made = other is not None or not (kept is None or plan_of(__package__, x))
    masked = torch.empty_like(x) if made else x.new_empty(0)
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
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = (_like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu)
        made = run(plan.BackwardInput(dense, *given, sums, count, need_residual))
        return _like(made[0], x), _like(made[1], x)
    inv_std = (var + eps).rsqrt()
    grad_x = pytorch.backward_input(grad, x, mean, inv_std, weight, sums, count)
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
    if plan := plan_of(__package__, x):
        dense = plan.dense(x)
        given = (_like(grad, dense), kept, _affine(plan, mean, var, weight, bias, eps), relu)
        call = plan.BackwardSums(dense, *given, frozen=True, need_residual=need_residual)
        _, grad_weight, grad_bias, grad_x, grad_residual = run(call)
        return _like(grad_x, x), grad_weight, grad_bias, _like(grad_residual, x)
    inv_std = (var + eps).rsqrt()
    sums, masked = pytorch.backward_sums(grad, x, kept, mean, inv_std)
    grad = grad if kept is None else masked
    grad_x = pytorch.backward_input(grad, x, mean, inv_std, weight, None, None)
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
    written = need_residual if plan_of(__package__, x) else kept is not None
    grad_residual = torch.empty_like(x) if written else x.new_empty(0)
    return torch.empty_like(x), *_parameter_gradients(x, sums, weight, bias), grad_residual


def _all_reduce(packed: Tensor, group_name: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(packed, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


# As eager code calls the operators.
_moments, _unpack = Direct(moments, changes=(1, 2)), Direct(unpack, changes=(2, 3))
_statistics_of, _normalise = Direct(statistics_of), Direct(normalise)
_backward_sums, _backward_input = Direct(backward_sums), Direct(backward_input)
_backward_frozen = Direct(backward_frozen)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, mask, twin = output
    x, mean, var, count, weight, bias, _, ctx.relu, ctx.eps, pack, ctx.group_name, forked = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((mask,) if forked else (mask, twin)))
    kept = _kept(x, y, mask, ctx.relu, pack)
    ctx.save_for_backward(x, kept, mean, var, count, weight, bias)


def _kept(x: Tensor, y: Tensor, mask: Tensor, relu: bool, pack: bool) -> Optional[Tensor]:
    """What tells the backward pass which values the ReLU let pass, where x alone does not."""
    if relu and not plan_of(__package__, x):
        return y
    return mask if pack else None


def _autograd_backward(
    ctx: Any, grad: Optional[Tensor], _: Any, other: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    options = ctx.relu, ctx.eps, ctx.group_name
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6)]
    made = _needed(_gradients, grad, other, ctx.saved_tensors, options, needs)
    return (made[0], None, None, None, *made[1:], None, None, None, None, None)


def _needed(
    gradients: Callable[..., Any],
    grad: Optional[Tensor],
    other: Optional[Tensor],
    saved: Sequence[Any],
    options: tuple[bool, float, str],
    needs: Sequence[bool],
) -> tuple[Optional[Tensor], ...]:
    """Of x, weight, bias and residual, as needed; y or its twin may have no gradient."""
    if grad is None:
        grad, other = other, None
    if grad is None:
        return None, None, None, None
    need_x, need_weight, need_bias, need_residual = needs
    # Without a ReLU the residual's gradient is dy itself.
    write = need_residual and (options[0] or other is not None)
    made = gradients(grad, other, *saved, *options, need_x, write)
    grad_x, grad_weight, grad_bias, grad_residual = made
    return (
        grad_x,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (grad_residual if write else grad) if need_residual else None,
    )


normalise.register_autograd(_autograd_backward, setup_context=_setup_context)


def _gradients(
    grad: Tensor,
    other: Optional[Tensor],
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    eps: float,
    group_name: str,
    need_x: bool,
    write_residual: bool,
) -> tuple[Optional[Tensor], Tensor, Tensor, Optional[Tensor]]:
    """Of x, weight, bias and residual; x, grads and kept (if it is y) are B x C x N.

    `other` is None where the statistics are frozen.
    """
    call = (x, kept, mean, var, weight, bias)
    if count is None:
        grad_x, grad_weight, grad_bias, grad_residual = _backward_frozen(
            grad, *call, relu, eps, write_residual
        )
        return grad_x if need_x else None, grad_weight, grad_bias, grad_residual
    sums, grad_weight, grad_bias, masked = _backward_sums(grad, other, *call, relu, eps)
    if not need_x and not write_residual:
        return None, grad_weight, grad_bias, None
    if group_name:
        sums = _all_reduce(sums, group_name)
    # The PyTorch code has made g where it has y.
    if other is not None or (kept is not None and not plan_of(__package__, x)):
        given = masked, x, None, *call[2:], sums, count, False, eps, False
        grad_x, grad_residual = _backward_input(*given)[0], masked
    else:
        grad_x, grad_residual = _backward_input(grad, *call, sums, count, relu, eps, write_residual)
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual


def _normalised(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: Optional[str],
    derived: bool,
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> tuple[Optional[Tensor], ...]:
    """y in x's own shape, and what `_derived` is given: kept, mean, var and count.

    No mean and var where they are the running ones.
    """
    planes, relu = _as_planes(x), activation == "relu"
    added = None if residual is None else _as_planes(residual)
    running = running_mean, running_var
    moments = _moments_of(planes, training, *running, momentum, group, statistics)
    pack = relu and added is not None and derived
    y, mask, _ = _normalise(planes, *moments, weight, bias, added, relu, eps, pack, "", False)
    # A view that autograd takes for none: else nobody could change it in place.
    y = torch.ops.aten._unsafe_view(y, x.shape)
    kept = _kept(planes, y, mask, relu, pack)
    if moments[0] is running_mean and moments[1] is running_var:
        return y, kept, None, None, None
    return y, kept, *moments


def _derived(
    grad: Tensor,
    other: Optional[Tensor],
    x: Tensor,
    kept: Optional[Tensor],
    mean: Tensor,
    var: Tensor,
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    *options: Any,
) -> tuple[Optional[Tensor], ...]:
    """`_gradients` in x's own shape, None where there is nothing."""
    if kept is not None and kept.dim() > 1:  # y, and not a mask
        kept = _as_planes(kept)
    twin = None if other is None else _as_planes(other)
    given = _as_planes(grad), twin, _as_planes(x), kept, mean, var, count, weight, bias
    grad_x, grad_weight, grad_bias, grad_residual = _gradients(*given, *options)
    return (
        None if grad_x is None else grad_x.reshape(x.shape),
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        grad_residual.reshape(x.shape) if grad_residual is not None and options[-1] else None,
    )


_forward, _backward = Repeated(_normalised), Repeated(_derived)


class _Normalise(torch.autograd.Function):
    """The layer round the dispatcher, all of a direction at once.

    What is kept is what the operators keep, and no view stands between these and the network.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[[], Any],
        forked: bool,
        options: tuple[bool, float, str],
        running: tuple[Optional[Tensor], Optional[Tensor]],
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        residual: Optional[Tensor],
    ) -> Any:
        y, kept, mean, var, count = call()
        if mean is None:
            mean, var = running
        ctx.options = options
        ctx.save_for_backward(x, kept, mean, var, count, weight, bias)
        if not forked:
            return y
        ctx.set_materialize_grads(False)
        return y, y.detach()  # one count of changes in place

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor], other: Optional[Tensor] = None) -> Any:
        # Second derivatives are the operators' to refuse.
        direct = not torch.is_grad_enabled() and not ctx.options[2] and quiet()
        gradients = _backward if direct else _derived
        needs = ctx.needs_input_grad[4:]
        made = _needed(gradients, grad, other, ctx.saved_tensors, ctx.options, needs)
        return (None, None, None, None, *made)


_apply = applied(_Normalise)


class _Twin(torch.autograd.Function):
    """The values of y, whose gradient goes to its twin."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, twin: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, grad


def _normalise_by(
    call: Callable[[], Any],
    forked: bool,
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    training: bool,
    _: Any,
    eps: float,
    activation: Optional[str],
    derived: bool,
    group: Optional[ProcessGroup],
    __: Any,
) -> Any:
    """y of `_normalised` by this call, given the same arguments; with its twin where `forked`."""
    if training:
        changed((running_mean, running_var))
    if not derived:
        return call()[0]
    options = activation == "relu", eps, "" if group is None else group.group_name
    running = running_mean, running_var
    return _apply(call, forked, options, running, x, weight, bias, residual)


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
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(f'batch_norm_act: activation must be "relu" or None, got {activation!r}.')
    for name, tensor in {**per_channel, "residual": residual}.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(
                f"batch_norm_act: {name} must be a tensor or None, got {type(tensor).__name__}."
            )
    check_dense("batch_norm_act", x=x, residual=residual, **per_channel)
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


def _check_options(training: bool, eps: float, group: Optional[ProcessGroup]) -> None:
    check_flag("batch_norm_act", "training", training)
    check_number("batch_norm_act", "eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"batch_norm_act: eps must be at least 0, got {eps}.")
    groups = getattr(torch.distributed, "ProcessGroup", ())
    if group is not None and not isinstance(group, groups):
        raise TypeError(
            f"batch_norm_act: group must be a process group or None, got {type(group).__name__}."
        )


def _check_statistics(x: Tensor, statistics: Optional[tuple[Tensor, Tensor]]) -> None:
    if statistics is None:
        return
    pair = isinstance(statistics, (tuple, list)) and len(statistics) == 2
    if not pair or not all(isinstance(tensor, Tensor) for tensor in statistics):
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


def _moments_of(
    x: Tensor,
    training: bool,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    momentum: float,
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Mean, variance and count over the group, moving the running statistics, or the running ones.

    They have no count.
    """
    if not training:
        assert running_mean is not None and running_var is not None
        dtype = accumulation_dtype(x)
        return running_mean.to(dtype), running_var.to(dtype), None
    if group is None and statistics is None:
        return _moments(x, running_mean, running_var, momentum)
    packed = _statistics_of(x) if statistics is None else _pack_images(x, statistics)
    if group is not None:
        packed = _all_reduce(packed, group.group_name)
    return _unpack(packed, x, running_mean, running_var, momentum)


def _check_all(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    training: bool,
    eps: float,
    activation: Optional[str],
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> None:
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_inputs(x, {"weight": weight, "bias": bias, **running}, residual, activation)
    _check_options(training, eps, group)
    _check_statistics(x, statistics)
    check_derivatives("batch_norm_act", x, weight, bias, residual)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm_act: running_mean and running_var are needed when training is False."
            )
        return
    check_no_vmap("batch_norm_act in training", x, weight, bias, residual)
    if group is None and x.numel() // x.shape[1] < 2:
        raise ValueError(
            "batch_norm_act: training needs more than one value per channel, got x of shape "
            f"{tuple(x.shape)}; the batch is too small."
        )


def _checked_momentum(training: bool, momentum: Any, *running: Optional[Tensor]) -> float:
    """As a float; it counts only where there are statistics to move."""
    if not training or running == (None, None):
        return 0.0
    check_number("batch_norm_act", "momentum", momentum)
    return float(momentum)


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
        TypeError: an argument is of another type, or has a dtype that is not allowed.
        ValueError: shapes or devices do not fit, the activation is unknown, running statistics are
            missing in evaluation, or there is no more than one value per channel to train on.
        NotImplementedError: forward-mode differentiation, or by torch.func; vmap in training.
    """
    y: Tensor = _normalise_all(
        False, x, weight, bias, running_mean, running_var, residual, training, momentum, eps,
        activation, group, statistics,
    )  # fmt: skip
    return y


def batch_norm_act_forked(
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
) -> tuple[Tensor, Tensor]:
    """`batch_norm_act` for a result that two things use, such as both paths of a residual block.

    Arguments, errors and gradients are those of `batch_norm_act`. Where either use takes an output
    of its own, backward in training moves 7 tensors of x's size where the sum of the gradients and
    `batch_norm_act` move 9: its first pass reads both gradients and writes g, their sum where the
    activation let it pass, which is the residual's gradient, too, and all that the second pass
    reads beside x.

    Returns:
        y, and y again: the same memory, so that neither may be changed in place.
    """
    made = _normalise_all(
        True, x, weight, bias, running_mean, running_var, residual, training, momentum, eps,
        activation, group, statistics,
    )  # fmt: skip
    return made if isinstance(made, tuple) else (made, made)


def _normalise_all(
    forked: bool,
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: Optional[str],
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> Any:
    """y; where `forked` and two gradients are to be added, y and its twin."""
    derived = _needs_gradient(x, weight, bias, residual)
    forked = forked and derived and training
    tensors = x, weight, bias, running_mean, running_var, residual
    options = activation, derived, group, statistics
    if quiet() and type(eps) is float and eps >= 0.0:
        given = *tensors, training, momentum, eps, *options
        again = _forward.again(*given)
        if again is not None:
            return _normalise_by(again, forked, *given)
    _check_all(*tensors, training, eps, activation, group, statistics)
    eps, momentum = float(eps), _checked_momentum(training, momentum, running_mean, running_var)
    given = *tensors, training, momentum, eps, *options
    if undisturbed(*tensors):
        return _normalise_by(partial(_forward, *given), forked, *given)
    features, relu = _as_planes(x), activation == "relu"
    with torch.no_grad():
        moments = _moments_of(
            features.detach(), training, running_mean, running_var, momentum, group, statistics
        )
    pack = relu and residual is not None and derived
    added = None if residual is None else _as_planes(residual)
    name = "" if group is None else group.group_name
    y, _, twin = _normalise(features, *moments, weight, bias, added, relu, eps, pack, name, forked)
    y = y.view(x.shape)
    return (y, _Twin.apply(y.detach(), twin.view(x.shape))) if forked else y  # type: ignore[no-untyped-call]


def _as_planes(x: Tensor) -> Tensor:
    """B x C x N."""
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


def _needs_gradient(*tensors: Optional[Tensor]) -> bool:
    """Also asked of arguments that are to be refused."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
