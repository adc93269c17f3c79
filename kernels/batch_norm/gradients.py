"""The gradients of a batch normalisation, from its torch.library operators; see operator.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

from torch import Tensor

from ..runtime.dispatch import plan_of
from .library import (
    all_reduce,
    direct_backward_frozen,
    direct_backward_input,
    direct_backward_sums,
    normalise,
)


class Saved(NamedTuple):
    """What the forward pass keeps; `kept` is y, its mask, or None (`kept_of`).

    `number`, of values per channel, is None where the statistics are frozen, and the last four are
    where the residual, if there is one, was added as it is.
    """

    x: Tensor
    kept: Optional[Tensor]
    mean: Tensor
    var: Tensor
    number: Optional[Tensor]
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    residual: Optional[Tensor]
    res_mean: Optional[Tensor]
    res_var: Optional[Tensor]
    res_weight: Optional[Tensor]


SAVED = len(Saved._fields)
_RESIDUAL = Saved._fields.index("residual")


def kept_of(x: Tensor, y: Tensor, mask: Tensor, relu: bool, pack: bool) -> Optional[Tensor]:
    """What the backward pass needs beside x to know which values the ReLU let pass."""
    if relu and not plan_of(__package__, x):
        return y
    return mask if pack else None


def gradients_of(
    grad: Tensor, other: Optional[Tensor], *given: Any
) -> tuple[Optional[Tensor], Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    """Of x, weight, bias, residual and its weight; x, grads and kept (if it is y) are B x C x N.

    Args:
        grad, other: the gradient of y, and that of its twin or None; None with frozen statistics.
        given: the fields of `Saved`; then relu, eps, the group's name or "", whether x needs a
            gradient, and whether that of the residual is to be written.
    """
    x, kept, mean, var, count, weight, bias, *of_residual = given[:SAVED]
    relu, eps, group_name, need_x, write_residual = given[SAVED:]
    plan = plan_of(__package__, x)
    if plan and kept is not None:
        x = plan.as_packed(x, kept)
    call = (x, kept, mean, var, weight, bias)
    if count is None:
        grad_x, grad_weight, grad_bias, grad_residual = direct_backward_frozen(
            grad, *call, relu, eps, write_residual
        )
        return grad_x if need_x else None, grad_weight, grad_bias, grad_residual, None
    made = direct_backward_sums(grad, other, *call, relu, eps, *of_residual)
    sums, grad_weight, grad_bias, masked, grad_res_weight = made
    if not need_x and not write_residual:
        return None, grad_weight, grad_bias, None, grad_res_weight
    if group_name:
        sums = all_reduce(sums, group_name)
    # The PyTorch code has made g where it has y.
    if other is not None or (kept is not None and not plan):
        grad, kept, relu = masked, None, False
    normalised = of_residual[0] is not None
    g_is_made = grad is masked and not normalised
    inputs = grad, x, kept, mean, var, weight, bias, sums, count, relu, eps
    grad_x, grad_residual = direct_backward_input(
        *inputs, write_residual and not g_is_made, *of_residual
    )
    grad_residual = masked if g_is_made else grad_residual
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual, grad_res_weight


def needed_gradients(
    gradients: Callable[..., Any],
    grad: Optional[Tensor],
    other: Optional[Tensor],
    saved: Sequence[Any],
    options: tuple[bool, float, str],
    needs: Sequence[bool],
) -> tuple[Optional[Tensor], ...]:
    """Of x, weight, bias, residual, its weight and bias; y or its twin may have no gradient."""
    if grad is None:
        grad, other = other, None
    if grad is None:
        return (None,) * 6
    need_x, need_weight, need_bias, need_residual, need_res_weight, need_res_bias = needs
    # Without a ReLU the residual's gradient is dy itself, if it is added as it is.
    normalised = saved[_RESIDUAL] is not None
    write = need_residual and (options[0] or other is not None or normalised)
    made = gradients(grad, other, *saved, *options, need_x, write)
    grad_x, grad_weight, grad_bias, grad_residual, grad_res_weight = made
    return (
        grad_x,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (grad_residual if write else grad) if need_residual else None,
        grad_res_weight if need_res_weight else None,
        grad_bias if need_res_bias else None,  # the same sum
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, mask, twin = output
    x, mean, var, count, weight, bias, residual, relu, eps, pack, group_name, forked, *more = inputs
    res_mean, res_var, res_weight, _ = more
    ctx.options = relu, eps, group_name
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((mask,) if forked else (mask, twin)))
    kept = kept_of(x, y, mask, relu, pack)
    read = None if res_mean is None else residual
    of_residual = read, res_mean, res_var, res_weight
    ctx.save_for_backward(*Saved(x, kept, mean, var, count, weight, bias, *of_residual))


def _autograd_backward(
    ctx: Any, grad: Optional[Tensor], _: Any, other: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6, 14, 15)]
    made = needed_gradients(gradients_of, grad, other, ctx.saved_tensors, ctx.options, needs)
    none = [None] * 7
    return (made[0], None, None, None, *made[1:4], *none, *made[4:])


normalise.register_autograd(_autograd_backward, setup_context=_setup_context)
