"""The torch.library operators of upsampling, and their gradients; see operator.py."""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._ops import add_op_namespace_prefix
from ..runtime.dispatch import plan_of, takes_triton
from ..runtime.eager import Direct, applied
from ..runtime.inductor import fake_of
from ..runtime.launch import run
from ..runtime.tiling import accumulation_dtype, laid_out_as
from . import pytorch
from .checks import check_inputs, check_logits, check_weight


def _plan_of(logits: Tensor, target: Tensor, align_corners: bool) -> Any:
    """The plan of the cross-entropy, or None: forward and backward run the same code."""
    return plan_of(__package__, logits, target.shape[1], target.shape[2], align_corners)


def _run_forward(
    plan: Any,
    logits: Tensor,
    target: Tensor,
    options: tuple[Optional[Tensor], int, bool, float],
    keep_lse: bool,
    keep_losses: bool,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum or mean of the losses, sum of the label weights, lse and losses; see `plan.Forward`."""
    given = plan.channels_last(logits.detach()), target.contiguous()
    return run(plan.Forward(*given, plan.options(*options), keep_lse, keep_losses, mean))


@torch.library.custom_op(add_op_namespace_prefix("upsample_cross_entropy_map"), mutates_args=())
def losses_of_pixels(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each pixel, B x H x W both."""
    check_inputs(logits, target, weight)
    check_weight(weight)
    options = (weight, ignore_index, align_corners, smoothing)
    if plan := _plan_of(logits, target, align_corners):
        _, _, lse, loss = _run_forward(plan, logits, target, options, True, True)
        return loss, lse
    # Autocast would change the body and run its products in half precision.
    with torch.autocast(logits.device.type, enabled=False):
        loss, lse, _ = pytorch.forward(logits, target, *options, with_grad=False)
    return loss, lse


@fake_of(losses_of_pixels)
def _map_fake(
    logits: Tensor, target: Tensor, weight: Optional[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    check_inputs(logits, target, weight)
    loss = logits.new_empty(target.shape, dtype=accumulation_dtype(logits))
    return loss, torch.empty_like(loss)


@torch.library.custom_op(
    add_op_namespace_prefix("upsample_cross_entropy_backward"), mutates_args=()
)
def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    rates: Optional[Tensor],
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
) -> Tensor:
    """The gradient of logits from that of each pixel's loss, or of the sum of all (a scalar).

    Or, where rates are given, the sum of the label weights, from that of the mean.
    """
    options = (weight, ignore_index, align_corners, smoothing)
    if plan := _plan_of(logits, target, align_corners):
        given = plan.channels_last(logits.detach()), target.contiguous(), lse
        made = run(plan.Backward(grad_loss.contiguous(), *given, plan.options(*options), rates))
        return laid_out_as(logits, made)
    grad_loss = _of_sum(grad_loss, rates).expand(target.shape)
    with torch.autocast(logits.device.type, enabled=False):
        return pytorch.backward(grad_loss, logits, target, lse, *options)


@fake_of(backward)
def _backward_fake(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _of_sum(grad: Tensor, rates: Optional[Tensor]) -> Tensor:
    """The gradient of the sum of the losses, from that of their mean where rates are given."""
    return grad if rates is None else grad.to(torch.float64) / _divisor(rates)


def _divisor(rates: Tensor) -> Tensor:
    return rates.where(rates > 0, 1.0)


def _map_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1], weight)


def _map_autograd(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Optional[Tensor], ...]:
    logits, target, lse, weight = ctx.saved_tensors
    grad = _direct_backward(grad_loss, logits, target, lse, None, weight, *ctx.options)
    return grad, None, None, None, None, None


losses_of_pixels.register_autograd(_map_autograd, setup_context=_map_setup_context)


class Losses(torch.autograd.Function):
    """`losses_of_pixels` and its backward pass, bypassing the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = direct_losses_of_pixels.body(*inputs)
        _map_setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_map_autograd)


@torch.library.custom_op(add_op_namespace_prefix("upsample_cross_entropy_reduced"), mutates_args=())
def reduced(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
    mean: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum or mean of the losses, sum of the label weights in float64, and what backward needs.

    That is lse, B x H x W, on devices with kernels; else the gradient of the sum, B x C x h x w.
    """
    check_inputs(logits, target, weight)
    check_weight(weight)
    options = (weight, ignore_index, align_corners, smoothing)
    if plan := _plan_of(logits, target, align_corners):
        made = _run_forward(plan, logits, target, options, with_grad, False, mean)
        return made[0], made[1], made[2]
    keeps_lse = takes_triton(logits)
    with torch.autocast(logits.device.type, enabled=False):
        losses, lse, grad = pytorch.forward(
            logits, target, *options, with_grad=with_grad and not keeps_lse
        )
    loss, rates = losses.sum(dtype=torch.float64), _total_weight(target, weight, ignore_index)
    loss = (loss / _divisor(rates) if mean else loss).to(losses.dtype)
    if not with_grad:
        return loss, rates, losses.new_empty(0)
    return loss, rates, lse if grad is None else grad


@fake_of(reduced)
def _reduced_fake(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
    mean: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(logits, target, weight)
    dtype = accumulation_dtype(logits)
    if not with_grad:
        saved = logits.new_empty(0, dtype=dtype)
    elif takes_triton(logits):
        saved = logits.new_empty(target.shape, dtype=dtype)
    else:
        saved = torch.empty_like(logits, dtype=dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=torch.float64), saved


@torch.library.custom_op(
    add_op_namespace_prefix("upsample_cross_entropy_scale_grad"), mutates_args=()
)
def scale_gradient(
    grad_loss: Tensor, rates: Optional[Tensor], grad: Tensor, dtype: torch.dtype
) -> Tensor:
    grad_loss = _of_sum(grad_loss, rates).to(grad.dtype)
    return torch.mul(grad, grad_loss).to(dtype, copy=False)


@fake_of(scale_gradient)
def _scale_fake(
    grad_loss: Tensor, rates: Optional[Tensor], grad: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


def _reduced_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rates, saved = output
    ctx.mark_non_differentiable(rates, saved)
    _keep(ctx, *inputs, rates, saved)


def _keep(ctx: Any, logits: Tensor, target: Tensor, weight: Optional[Tensor], *rest: Any) -> None:
    *ctx.options, mean, with_grad, rates, saved = rest
    ctx.dtype = logits.dtype
    # vmap hides from the caller that a gradient will be needed: then nothing was kept for it.
    ctx.made = with_grad
    needs_inputs = not with_grad or saved.dim() == 3
    inputs = (target, weight) if needs_inputs else ()
    ctx.save_for_backward(saved, rates if mean else None, logits, *inputs)


def _reduced_autograd(
    ctx: Any, grad_loss: Tensor, _: Tensor, __: Tensor
) -> tuple[Optional[Tensor], ...]:
    return (_reduced_gradient(ctx, grad_loss), *[None] * 7)


def _reduced_gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    saved, rates, logits, *inputs = ctx.saved_tensors
    if not ctx.made:
        saved = reduced(logits.detach(), *inputs, *ctx.options, False, True)[2]
    gradient: Tensor
    if saved.dim() == 3:
        target, weight = inputs
        gradient = _direct_backward(grad_loss, logits, target, saved, rates, weight, *ctx.options)
    else:
        gradient = _direct_scale(grad_loss, rates, saved, ctx.dtype)
        if torch.is_grad_enabled():
            gradient = _Once.apply(gradient, logits)
    return gradient


class _Once(torch.autograd.Function):
    """A gradient that was kept, and so does not know that it depends on the logits."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logits: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("upsample_cross_entropy has no second derivative")


reduced.register_autograd(_reduced_autograd, setup_context=_reduced_setup_context)


class Reduced(torch.autograd.Function):
    """`reduced` and its backward pass, bypassing the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Any], *inputs: Any) -> Tensor:
        loss, *made = call()
        _keep(ctx, *inputs, *made)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (None, _reduced_gradient(ctx, grad), *[None] * 7)


apply_reduced = applied(Reduced)


@torch.library.custom_op(add_op_namespace_prefix("upsample_argmax"), mutates_args=())
def most_likely(
    logits: Tensor, height: int, width: int, align_corners: bool, with_prob: bool
) -> tuple[Tensor, Tensor]:
    """Label map, B x H x W, and the probability of the label (empty if not asked for)."""
    check_logits("upsample_argmax", logits)
    if plan := plan_of(__package__, logits, height, width):
        given = plan.channels_last(logits.detach())
        return run(plan.ArgMax(given, height, width, align_corners, with_prob))
    with torch.autocast(logits.device.type, enabled=False):
        return pytorch.argmax(logits, height, width, align_corners, with_prob)


@fake_of(most_likely)
def _argmax_fake(
    logits: Tensor, height: int, width: int, align_corners: bool, with_prob: bool
) -> tuple[Tensor, Tensor]:
    check_logits("upsample_argmax", logits)
    shape = (logits.shape[0], height, width)
    label = logits.new_empty(shape, dtype=pytorch.label_dtype(logits.shape[1]))
    return label, logits.new_empty(shape if with_prob else (0,), dtype=accumulation_dtype(logits))


# The operators as eager code calls them.
_direct_backward, _direct_scale = Direct(backward), Direct(scale_gradient)
direct_losses_of_pixels, direct_reduced, direct_most_likely = (
    Direct(losses_of_pixels),
    Direct(reduced),
    Direct(most_likely),
)


# Counts the multiplications and additions of the interpolation, with two taps a direction.


@register_flop_formula(losses_of_pixels._opoverload.overloadpacket)
def _map_flops(logits: Any, target: Any, *_: Any, **__: Any) -> int:
    images, classes, low_height, _ = logits
    return int(4 * images * classes * target[2] * (low_height + target[1]))


@register_flop_formula(backward._opoverload.overloadpacket)
def _backward_flops(grad_loss: Any, logits: Any, target: Any, *_: Any, **__: Any) -> int:
    return 2 * _map_flops(logits, target)


@register_flop_formula(reduced._opoverload.overloadpacket)
def _reduced_flops(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
    mean: bool,
    with_grad: bool,
    **_: Any,
) -> int:
    return (2 if with_grad else 1) * _map_flops(logits, target)


@register_flop_formula(most_likely._opoverload.overloadpacket)
def _argmax_flops(logits: Any, height: int, width: int, *_: Any, **__: Any) -> int:
    return _map_flops(logits, (logits[0], height, width))


def _total_weight(target: Tensor, weight: Optional[Tensor], ignore_index: int) -> Tensor:
    """Sum of the class weights of the labelled pixels, float64."""
    if target.dtype == torch.uint8 and not 0 <= ignore_index <= 255:
        labelled = torch.ones_like(target, dtype=torch.bool)
    else:
        labelled = target != ignore_index
    if weight is None:
        return labelled.sum().to(torch.float64)
    label = target.where(labelled, 0).to(torch.int64)
    return (weight.detach().double()[label] * labelled).sum()
