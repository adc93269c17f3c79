"""Bilinear upsampling joined with softmax cross-entropy, or with the arg-max over the classes.

B images, C classes; h x w is the low resolution of the logits, H x W that of the target.

With U_h [H, h] and U_w [W, w] the matrices of bilinear interpolation (two entries a row), z the
map of one class and v = U_h z U_w^T its upsampled values, the loss of pixel i with label t is

    lse_i  = log sum_c exp v_ic
    loss_i = (1 - e) m_t (lse_i - v_it) + (e / C) sum_c m_c (lse_i - v_ic)

for class weights m (1 by default) and label smoothing e, as in torch.nn.functional.cross_entropy.
With p_ic = exp(v_ic - lse_i), g_i = dL/dloss_i and r_i = (1 - e) m_t + (e / C) sum_c m_c,

    dL/dv_ic = g_i (r_i p_ic - (1 - e) m_t [c = t] - (e / C) m_c)
    dL/dz    = U_h^T (dL/dv) U_w

v, p and dL/dv have B C H W entries and are never stored. There are three ways:

- On a GPU (plan.py) forward keeps lse, 4 B H W bytes, and backward recomputes v.
  Bytes that must move, logits of e bytes, labels of one: forward reads e B C h w + B H W and writes
  4 B H W; backward reads those and writes e B C h w.
- On a CPU (pytorch.py) v exists for a tile of pixels small enough for a cache. Per-pixel
  losses (reduction "none"): as on a GPU.
- There, sum and mean: the gradient of the sum is made in the pass that makes the loss, while exp v
  is available, and kept in fp32, 4 B C h w bytes; backward only scales it. That takes two thirds
  of the time. Forward reads 4 B C h w + B H W (fp32 logits) and writes 4 B C h w; backward reads
  and writes 4 B C h w.

On a CPU: a softmax does not change when one number is subtracted from all classes of a
low-resolution pixel, so each pixel's largest logit is subtracted first, on the small map.
Interpolated values are then never positive, and unless some are below -RANGE no output pixel needs
a maximum of its own.
"""

from functools import partial
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._namespace import add_op_namespace_prefix
from ..runtime.arguments import (
    check_dense,
    check_derivatives,
    check_flag,
    check_integer,
    check_number,
)
from ..runtime.dispatch import plan_of, takes_triton
from ..runtime.eager import Direct, applied, quiet, undisturbed
from ..runtime.inductor import register_fake
from ..runtime.launch import run
from ..runtime.tiling import laid_out_as
from . import pytorch

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: logits must be a tensor, got {type(logits).__name__}.")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"{name}: logits must be B x C x h x w with C, h, w >= 1, "
            f"got shape {tuple(logits.shape)}."
        )
    if logits.dtype not in _LOGITS_DTYPES:
        raise TypeError(
            f"{name}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}."
        )
    check_dense(name, logits=logits)


def _check_inputs(logits: Tensor, target: Tensor, weight: Optional[Tensor]) -> None:
    name = "upsample_cross_entropy"
    _check_logits(name, logits)
    if not isinstance(target, Tensor) or target.dtype not in (torch.uint8, torch.int64):
        given = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{name}: target must be a uint8 or int64 tensor, got {given}.")
    if target.dim() != 3 or target.shape[0] != logits.shape[0] or 0 in target.shape[1:]:
        raise ValueError(
            f"{name}: target must be B x H x W with the B = {logits.shape[0]} of logits and "
            f"H, W >= 1, got shape {tuple(target.shape)}."
        )
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a tensor or None, got {type(weight).__name__}.")
    if weight is not None and (weight.shape != logits.shape[1:2] or not weight.is_floating_point()):
        raise ValueError(
            f"{name}: weight must hold {logits.shape[1]} floating-point numbers, one a class, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}."
        )
    check_dense(name, target=target, weight=weight)
    for other, what in ((target, "target"), (weight, "weight")):
        if other is not None and other.device != logits.device:
            raise ValueError(f"{name}: {what} is on {other.device}, but logits on {logits.device}.")


def _check_weight(weight: Optional[Tensor]) -> None:
    """Refuse weights that are negative or not finite, once their values are known."""
    if weight is None:
        return
    allowed = (weight.isfinite() & (weight >= 0)).all()
    message = "upsample_cross_entropy: weight must hold finite numbers of at least 0"
    # Do not wait for an accelerator: as with a wrong label, it fails later.
    if weight.device.type != "cpu":
        torch._assert_async(allowed, message)
    elif not allowed:
        raise ValueError(f"{message}, got {weight.tolist()}.")


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
def _map_op(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of each pixel, B x H x W both."""
    _check_inputs(logits, target, weight)
    _check_weight(weight)
    options = (weight, ignore_index, align_corners, smoothing)
    if plan := _plan_of(logits, target, align_corners):
        _, _, lse, loss = _run_forward(plan, logits, target, options, True, True)
        return loss, lse
    # Autocast would change the body and run its products in half precision.
    with torch.autocast(logits.device.type, enabled=False):
        loss, lse, _ = pytorch.forward(logits, target, *options, with_grad=False)
    return loss, lse


@register_fake(_map_op)
def _map_fake(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    _check_inputs(logits, target, weight)
    loss = logits.new_empty(target.shape, dtype=pytorch.result_dtype(logits))
    return loss, torch.empty_like(loss)


@torch.library.custom_op(
    add_op_namespace_prefix("upsample_cross_entropy_backward"), mutates_args=()
)
def _backward_op(
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


@register_fake(_backward_op)
def _backward_fake(
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
    grad = _backward(grad_loss, logits, target, lse, None, weight, *ctx.options)
    return grad, None, None, None, None, None


_map_op.register_autograd(_map_autograd, setup_context=_map_setup_context)


class _Losses(torch.autograd.Function):
    """`_map_op` and its backward pass, bypassing the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _map.body(*inputs)
        _map_setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_map_autograd)


@torch.library.custom_op(add_op_namespace_prefix("upsample_cross_entropy_reduced"), mutates_args=())
def _reduced_op(
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
    _check_inputs(logits, target, weight)
    _check_weight(weight)
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


@register_fake(_reduced_op)
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
    _check_inputs(logits, target, weight)
    dtype = pytorch.result_dtype(logits)
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
def _scale_op(
    grad_loss: Tensor, rates: Optional[Tensor], grad: Tensor, dtype: torch.dtype
) -> Tensor:
    grad_loss = _of_sum(grad_loss, rates).to(grad.dtype)
    return torch.mul(grad, grad_loss).to(dtype, copy=False)


@register_fake(_scale_op)
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
    inputs = (logits, target, weight) if needs_inputs else ()
    ctx.save_for_backward(saved, rates if mean else None, *inputs)


def _reduced_autograd(
    ctx: Any, grad_loss: Tensor, _: Tensor, __: Tensor
) -> tuple[Optional[Tensor], ...]:
    return (_reduced_gradient(ctx, grad_loss), *[None] * 7)


def _reduced_gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    saved, rates, *inputs = ctx.saved_tensors
    if not ctx.made:
        logits, *rest = inputs
        saved = _reduced_op(logits.detach(), *rest, *ctx.options, False, True)[2]
    gradient: Tensor
    if saved.dim() == 3:
        logits, target, weight = inputs
        gradient = _backward(grad_loss, logits, target, saved, rates, weight, *ctx.options)
    else:
        gradient = _scale(grad_loss, rates, saved, ctx.dtype)
    return gradient


_reduced_op.register_autograd(_reduced_autograd, setup_context=_reduced_setup_context)


class _Reduced(torch.autograd.Function):
    """`_reduced_op` and its backward pass, bypassing the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Any], *inputs: Any) -> Tensor:
        loss, *made = call()
        _keep(ctx, *inputs, *made)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (None, _reduced_gradient(ctx, grad), *[None] * 7)


_apply = applied(_Reduced)


@torch.library.custom_op(add_op_namespace_prefix("upsample_argmax"), mutates_args=())
def _argmax_op(
    logits: Tensor, height: int, width: int, align_corners: bool, with_prob: bool
) -> tuple[Tensor, Tensor]:
    """Label map, B x H x W, and the probability of the label (empty if not asked for)."""
    _check_logits("upsample_argmax", logits)
    if plan := plan_of(__package__, logits, height, width):
        given = plan.channels_last(logits.detach())
        return run(plan.ArgMax(given, height, width, align_corners, with_prob))
    with torch.autocast(logits.device.type, enabled=False):
        return pytorch.argmax(logits, height, width, align_corners, with_prob)


@register_fake(_argmax_op)
def _argmax_fake(
    logits: Tensor, height: int, width: int, align_corners: bool, with_prob: bool
) -> tuple[Tensor, Tensor]:
    _check_logits("upsample_argmax", logits)
    shape = (logits.shape[0], height, width)
    label = logits.new_empty(shape, dtype=pytorch.label_dtype(logits.shape[1]))
    return label, logits.new_empty(shape if with_prob else (0,), dtype=pytorch.result_dtype(logits))


# Called as eager code calls the operators.
_backward, _scale = Direct(_backward_op), Direct(_scale_op)
_map, _reduced, _argmax = Direct(_map_op), Direct(_reduced_op), Direct(_argmax_op)


# Counts the multiplications and additions of the interpolation, with two taps a direction.


@register_flop_formula(_map_op._opoverload.overloadpacket)
def _map_flops(logits: Any, target: Any, *_: Any, **__: Any) -> int:
    images, classes, low_height, _ = logits
    return int(4 * images * classes * target[2] * (low_height + target[1]))


@register_flop_formula(_backward_op._opoverload.overloadpacket)
def _backward_flops(grad_loss: Any, logits: Any, target: Any, *_: Any, **__: Any) -> int:
    return 2 * _map_flops(logits, target)


@register_flop_formula(_reduced_op._opoverload.overloadpacket)
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


@register_flop_formula(_argmax_op._opoverload.overloadpacket)
def _argmax_flops(logits: Any, height: int, width: int, *_: Any, **__: Any) -> int:
    return _map_flops(logits, (logits[0], height, width))


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = True,
    weight: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, without the upsampled logits ever in memory.

    Equal to `F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear"), target)` with the same
    options, except that a target without any labelled pixel gives loss 0 and gradient 0, not NaN.
    It can be differentiated once, with respect to `logits`. Logits must be finite.

    Args:
        logits: B x C x h x w in any memory format; float32, bfloat16, float16 or float64.
        target: B x H x W, uint8 or int64, class indices 0 to C - 1 or `ignore_index`. H x W is the
            size upsampled to; any size is allowed, h x w and smaller ones included.
        ignore_index: the value of pixels that count nowhere.
        align_corners: as in `F.interpolate`; the size of the logits must fit it.
        weight: C non-negative numbers, one a class, or None; gets no gradient.
        label_smoothing: share of the label spread over all classes, 0 to 1.
        reduction: "mean" divides the sum by the labelled pixels, each with the weight of its label;
            "sum"; or "none", the losses of all pixels, 0 where ignored.

    Returns:
        float32 (float64 for float64 logits), a scalar, or B x H x W for reduction "none".

    Raises:
        TypeError: an argument is of another type, or has a dtype that is not allowed.
        ValueError: shapes, devices or options that do not fit; on the CPU also a label outside 0 to
            C - 1 that is not `ignore_index`, and a weight that is negative or not finite (on a GPU
            a device-side assertion, as in PyTorch).
        NotImplementedError: forward-mode differentiation, or by torch.func.
    """
    with_grad = torch.is_grad_enabled() and getattr(logits, "requires_grad", False)
    known = type(reduction) is str and reduction in ("mean", "sum")
    mean = known and reduction == "mean"
    options = (weight, ignore_index, align_corners, label_smoothing)
    call = None
    if known and type(label_smoothing) is float and 0.0 <= label_smoothing <= 1.0 and quiet():
        call = _reduced.again(logits, target, *options, mean, with_grad)
    if call is None:
        _check_all(logits, target, *options, reduction)
        options = (weight, ignore_index, align_corners, float(label_smoothing))
        plain = undisturbed(logits, target, weight)
        if reduction == "none":
            losses = _Losses.apply if plain and with_grad else _map
            of_pixels: Tensor = losses(logits, target, *options)[0]  # type: ignore[no-untyped-call]
            return of_pixels
        if plain:
            call = partial(_reduced.body, logits, target, *options, mean, with_grad)
    inputs = logits, target, *options, mean, with_grad
    if call is None:
        return _reduced(*inputs)[0]  # type: ignore[no-any-return]
    return _apply(call, *inputs) if with_grad else call()[0]


def _check_all(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
    reduction: str,
) -> None:
    name = "upsample_cross_entropy"
    check_integer(name, "ignore_index", ignore_index)
    check_flag(name, "align_corners", align_corners)
    check_number(name, "label_smoothing", label_smoothing)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be 0 to 1, got {label_smoothing}.")
    _check_inputs(logits, target, weight)
    check_derivatives(name, logits, weight)


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


def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    return_prob: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """The most likely class of each pixel of bilinearly upsampled logits, computed tile by tile.

    Args:
        logits: B x C x h x w in any memory format; float32, bfloat16, float16 or float64. Finite.
        size: H and W, at least 1.
        align_corners: as in `F.interpolate`.
        return_prob: also return the softmax probability of that class.

    Returns:
        Labels, B x H x W, uint8 if C <= 256 and otherwise int64; with `return_prob` the tuple of
        labels and probabilities, B x H x W float32 (float64 for float64 logits). No gradients.

    Raises:
        TypeError: an argument is of another type, or logits of a dtype that is not allowed.
        ValueError: logits are not B x C x h x w, or a size below 1.
    """
    name = "upsample_argmax"
    _check_logits(name, logits)
    check_flag(name, "align_corners", align_corners)
    check_flag(name, "return_prob", return_prob)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"{name}: size must be the pair (H, W), got {size!r}.")
    height, width = size
    check_integer(name, "the height of size", height)
    check_integer(name, "the width of size", width)
    if height < 1 or width < 1:
        raise ValueError(f"{name}: size must be at least 1 x 1, got {height} x {width}.")
    if return_prob:
        check_derivatives(name, logits)
    label, prob = _argmax(logits.detach(), height, width, align_corners, return_prob)
    return (label, prob) if return_prob else label
