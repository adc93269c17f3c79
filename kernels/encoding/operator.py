"""Encoding Layer: soft assignment of pixels to codewords, sum of residuals (paper, eq. 1).

    l_ik = scale_k |x_i - d_k|^2    a_ik = softmax over k of l_ik    E_k = sum_i a_ik (x_i - d_k)

B images have C channels of N = H W pixels; K codewords. x is B x C x N in any strides,
codewords d K x C, scale K, E B x K x C. Gradients, with G = dE:

    da_ik = (x_i - d_k).G_k    dl_ik = a_ik (da_ik - sum_j a_ij da_ij)    w_ik = 2 scale_k dl_ik
    dx_i  = sum_k a_ik G_k + sum_k w_ik (x_i - d_k)
    dd_k  = -sum_i a_ik G_k - sum_i w_ik (x_i - d_k)    dscale_k = sum_i dl_ik |x_i - d_k|^2

On a GPU the kernels that plan.py lists compute these, elsewhere pytorch.py. Nothing of size B N K C
exists in either, and only x, the parameters and B + 1 integers are saved: the weights are
recomputed. Bytes: forward reads x once, backward reads x once and writes dx once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Literal, Optional, Union, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._ops import add_op_namespace_prefix
from ..runtime.arguments import check_dense, check_derivatives, check_flag
from ..runtime.dispatch import plan_of
from ..runtime.eager import Direct, applied, quiet, undisturbed
from ..runtime.inductor import fake_of
from ..runtime.launch import run
from ..runtime.replay import Repeated
from ..runtime.tiling import accumulation_dtype, laid_out_as
from . import pytorch

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_inputs(
    x: Tensor, channels: int, codewords: Tensor, scale: Tensor, backward_scale: Optional[Tensor]
) -> None:
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"encode: x must be float32, bfloat16, float16 or float64, got {x.dtype}.")
    parameters = {"codewords": codewords, "scale": scale}
    if backward_scale is not None:
        parameters["backward_scale"] = backward_scale
    for name, tensor in parameters.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"encode: {name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype not in (torch.float32, x.dtype):
            raise TypeError(
                f"encode: {name} must be float32 or have x's dtype {x.dtype}, got {tensor.dtype}."
            )
        if tensor.device != x.device:
            raise ValueError(
                f"encode: {name} must be on x's device {x.device}, got {tensor.device}."
            )
    check_dense("encode", x=x, **parameters)
    if codewords.dim() != 2 or codewords.shape[1] != channels:
        raise ValueError(
            f"encode: codewords must be K x C with C = {channels} as in x of shape "
            f"{tuple(x.shape)}, got shape {tuple(codewords.shape)}."
        )
    if codewords.shape[0] == 0 or channels == 0:
        raise ValueError(
            "encode: at least one codeword and one channel are needed, "
            f"got codewords of shape {tuple(codewords.shape)}."
        )
    for name, tensor in list(parameters.items())[1:]:
        if tensor.dim() != 1 or tensor.shape[0] != codewords.shape[0]:
            raise ValueError(
                f"encode: {name} must have one value for each of the {codewords.shape[0]} "
                f"codewords, got shape {tuple(tensor.shape)}."
            )


def _counters(x: Tensor) -> Tensor:
    """B + 1 zeros, with which the programs of the backward kernels count which one is last.

    The kernels reset them to zero, so the operator is declared non-mutating and a second backward
    pass finds them as the first one did. Two passes at once, on two streams, would disturb one
    another.
    """
    return x.new_zeros(x.shape[0] + 1, dtype=torch.int32)


@torch.library.custom_op(add_op_namespace_prefix("encode_forward"), mutates_args=())
def _encode_forward(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E and, if asked for, its sum and M2 over C (else two empty tensors); x is B x C x N.

    The fourth output is for the backward pass, see `_counters`.
    """
    _check_inputs(x, x.shape[1], codewords, scale, backward_scale)
    if plan := plan_of(__package__, x, codewords):
        x, codewords, scale = plan.channels_last(x), codewords.contiguous(), scale.contiguous()
        return run(plan.Forward(x, codewords, scale, return_stats))
    # Autocast would change the body and run its products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        code = pytorch.forward(x, codewords, scale)
        if return_stats:
            return code, *pytorch.statistics(code), _counters(x)
    return code, code.new_empty(0), code.new_empty(0), _counters(x)


@fake_of(_encode_forward)
def _encode_forward_fake(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_inputs(x, x.shape[1], codewords, scale, backward_scale)
    images, channels, num = x.shape[0], x.shape[1], codewords.shape[0]
    code = x.new_empty((images, num, channels), dtype=accumulation_dtype(x))
    stats = (images, num) if return_stats else (0,)
    return code, code.new_empty(stats), code.new_empty(stats), _counters(x)


@torch.library.custom_op(add_op_namespace_prefix("encode_backward"), mutates_args=())
def _encode_backward(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    need_x: bool,
    need_codewords: bool,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless needed), codewords (meaningless unless needed) and scale.

    `counters` are those of the forward pass, see `_counters`.
    """
    _check_inputs(x, x.shape[1], codewords, scale, backward_scale)
    if plan := plan_of(__package__, x, codewords):
        factor = (scale if backward_scale is None else backward_scale).contiguous()
        parameters = codewords.contiguous(), scale.contiguous(), factor
        grad = grad.float().contiguous()
        made = run(plan.Backward(grad, plan.channels_last(x), *parameters, need_x, counters))
        return laid_out_as(x, made[0]) if need_x else made[0], made[1], made[2]
    with torch.autocast(x.device.type, enabled=False):
        grad = grad.to(accumulation_dtype(x))
        return pytorch.backward(grad, x, codewords, scale, backward_scale, need_x, need_codewords)


@fake_of(_encode_backward)
def _encode_backward_fake(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    need_x: bool,
    need_codewords: bool,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return grad_x, codewords.new_empty(codewords.shape), scale.new_empty(scale.shape)


# Called as eager code calls the operators.
_forward, _backward = Direct(_encode_forward), Direct(_encode_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codewords, scale, backward_scale, _ = inputs
    ctx.save_for_backward(x, codewords, scale, backward_scale, output[3])
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Optional[Tensor], ...]:
    return (*_gradients(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:3]), None, None)


def _gradients(
    grad: Tensor,
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    counters: Tensor,
    need_x: bool,
    need_codewords: bool,
    need_scale: bool,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of x, B x C x N, codewords and scale; None where not needed."""
    grad_x, grad_codewords, grad_scale = _backward(
        grad, x, codewords, scale, backward_scale, need_x, need_codewords, counters
    )
    return (
        grad_x if need_x else None,
        grad_codewords if need_codewords else None,
        grad_scale if need_scale and backward_scale is None else None,
    )


_encode_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _encoded(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`_encode_forward` of x in its own shape."""
    return _forward(_as_planes(x), *rest)  # type: ignore[no-any-return]


def _derived(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Optional[Tensor], ...]:
    """`_gradients` of x in its own shape."""
    grad_x, *others = _gradients(grad, _as_planes(x), *rest)
    if grad_x is not None:
        grad_x = grad_x.reshape(x.shape) if x.dim() == 4 else grad_x.transpose(1, 2)
    return (grad_x, *others)


_all_forward, _all_backward = Repeated(_encoded), Repeated(_derived)


class _Encode(torch.autograd.Function):
    """`_encoded` and `_derived`, bypassing the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Any], *inputs: Optional[Tensor]) -> tuple[Tensor, ...]:
        code, total, m2, counters = call()
        ctx.save_for_backward(*inputs, counters)
        ctx.mark_non_differentiable(total, m2)
        return code, total, m2

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        given = grad, *ctx.saved_tensors, *ctx.needs_input_grad[1:4]
        # The operator refuses second derivatives.
        direct = not torch.is_grad_enabled() and quiet()
        return (None, *(_all_backward(*given) if direct else _derived(*given)), None)


_apply = applied(_Encode)


def _as_planes(x: Tensor) -> Tensor:
    """View B x C x H x W or B x N x C as B x C x N."""
    return x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)


@register_flop_formula(_encode_forward._opoverload.overloadpacket)
def _forward_flops(x: Any, codewords: Any, *_: Any, **__: Any) -> int:
    images, channels, pixels = x
    return int(4 * images * channels * pixels * codewords[0])


@register_flop_formula(_encode_backward._opoverload.overloadpacket)
def _backward_flops(
    grad: Any,
    x: Any,
    codewords: Any,
    scale: Any,
    backward_scale: Any,
    need_x: bool,
    need_codewords: bool,
    *_: Any,
    **__: Any,
) -> int:
    images, channels, pixels = x
    products = 2 + 2 * need_x + need_codewords
    return int(2 * products * images * channels * pixels * codewords[0])


@overload
def encode(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    *,
    backward_scale: Optional[Tensor] = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def encode(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    *,
    backward_scale: Optional[Tensor] = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def encode(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    *,
    backward_scale: Optional[Tensor] = None,
    return_stats: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Encode a feature map against K codewords (Encoding Layer, paper section 2, eq. 1).

    Args:
        x: features, B x C x H x W in any memory format or B x N x C; float32, bfloat16, float16
            or float64. Contiguous and channels_last are read where they lie.
        codewords: K x C, float32 (kept so under autocast) or x's dtype.
        scale: K, float32 or x's dtype; minus the paper's smoothing factor s_k, as checkpoints
            store it.
        backward_scale: K or None. The weights use `scale`; the gradient that flows through them
            is then scaled by `backward_scale` instead (scale regularisation, paper 3.5), and
            neither of the two gets a gradient.
        return_stats: also return the sum and M2 (sum of squared deviations from the mean) of each
            code over its C channels, for a batch normalisation over the codewords.

    Returns:
        E, B x K x C, float32 (float64 for float64 x). With `return_stats` the tuple (E, sum, M2),
        the latter two B x K; they carry no gradient, because the backward pass of a batch
        normalisation accounts for its statistics in closed form.

    An offset common to x and the codewords costs no digits.

    Raises:
        TypeError: an argument is of another type, or has a dtype that is not allowed.
        ValueError: shapes do not fit, K or C is zero, or tensors are on different devices.
        NotImplementedError: forward-mode differentiation, or by torch.func.
    """
    inputs = x, codewords, scale, backward_scale
    call = _all_forward.again(*inputs, return_stats) if quiet() else None
    if call is None:
        _check_all(*inputs, return_stats)
        if undisturbed(*inputs):
            call = partial(_all_forward, *inputs, return_stats)
    derived = torch.is_grad_enabled() and (
        x.requires_grad or codewords.requires_grad or scale.requires_grad
    )
    if call is None:
        code, total, m2, _ = _forward(_as_planes(x), *inputs[1:], return_stats)
    elif derived:
        code, total, m2 = _apply(call, *inputs)
    else:
        code, total, m2, _ = call()
    return (code, total, m2) if return_stats else code


def _check_all(
    x: Tensor,
    codewords: Tensor,
    scale: Tensor,
    backward_scale: Optional[Tensor],
    return_stats: bool,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"encode: x must be a tensor, got {type(x).__name__}.")
    if x.dim() not in (3, 4):
        raise ValueError(
            f"encode: x must be B x C x H x W or B x N x C, got shape {tuple(x.shape)}."
        )
    channels = x.shape[1] if x.dim() == 4 else x.shape[2]
    check_flag("encode", "return_stats", return_stats)
    _check_inputs(x, channels, codewords, scale, backward_scale)
    check_derivatives("encode", x, codewords, scale, backward_scale)
