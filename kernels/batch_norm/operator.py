"""Batch normalisation with its statistics, residual addition and ReLU, synchronised if asked.

    y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

B images have C channels, N is everything else, n the number of values per channel (B N, summed
over the processes of a group). Gradients, with g = dy where act let it pass, u = x - mean,
s = 1 / sqrt(var + eps):

    dweight = sum g u s        dbias = sum g        dresidual = g
    dx = weight s (g - sum g / n - u s^2 (sum g u) / n)

and dx = weight s g where the statistics are frozen.

In training the residual may be normalised as it is added, by statistics, weight and bias of its
own: its gradients are then like those of x, with the same g.

Statistics: every tile of x gives (mean, M2, count) about a mean of its own; they are merged in
float64 in a fixed order, so that a mean much larger than the spread costs no digits. Synchronised
(paper, appendix A, eq. 2): forward all-reduces the one float64 vector [sum x, sum x^2, count],
backward the one vector [sum g, sum g u s]; ranks may hold unequal shares or none. What a residual
that is normalised adds is in the same vectors. The collectives stand between operators, where a
compiler sees them.

Least bytes, in tensors of x's size. Forward: x twice, residual, y. Backward without a residual: dy
and x twice, dx (the ReLU's mask is recomputed from x). With one: the same and dresidual, and a mask
of one bit per value, which forward writes and both passes read. A residual that is normalised is
read once more forward and twice backward, and saved. Frozen statistics: one pass. Saved: x, the
mask if any, and two values per channel; the PyTorch code keeps y in place of the mask.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from ..runtime.eager import applied, changed, quiet, recorded, undisturbed
from ..runtime.replay import Repeated
from ..runtime.tiling import accumulation_dtype
from .checks import (
    ResidualNorm,
    check_arguments,
    check_residual_norm,
    checked_momentum,
    used_momentum,
)
from .gradients import SAVED, Saved, gradients_of, kept_of, needed_gradients
from .library import (
    all_reduce,
    direct_moments,
    direct_normalise,
    direct_statistics_of,
    direct_unpack,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _pack_images(x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """[sum x, sum x^2, count] from the sum and M2 of every image and channel."""
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
    """Mean, variance and count over the group, moving the running statistics.

    Not training: the running statistics, and None for the count.
    """
    if not training:
        assert running_mean is not None and running_var is not None
        dtype = accumulation_dtype(x)
        return running_mean.to(dtype), running_var.to(dtype), None
    if group is None and statistics is None:
        return direct_moments(x, running_mean, running_var, momentum)
    packed = direct_statistics_of(x) if statistics is None else _pack_images(x, statistics)
    if group is not None:
        packed = all_reduce(packed, group.group_name)
    return direct_unpack(packed, x, running_mean, running_var, momentum)


# Running mean and variance, and momentum.
_Running = tuple[Optional[Tensor], Optional[Tensor], Any]


def _moments_of_both(
    x: Tensor,
    residual: Optional[Tensor],
    training: bool,
    running: _Running,
    of_residual: _Running,
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> tuple[tuple[Tensor, Tensor, Optional[Tensor]], tuple[Optional[Tensor], Optional[Tensor]]]:
    """`_moments_of`, and mean and variance of a residual that is normalised, in one collective.

    A residual that is added as it is has no momentum.
    """
    if residual is None or of_residual[2] is None:
        return _moments_of(x, training, *running, group, statistics), (None, None)
    if group is None:
        mean, var, _ = direct_moments(residual, *of_residual)
        return _moments_of(x, training, *running, group, statistics), (mean, var)
    packed = direct_statistics_of(x) if statistics is None else _pack_images(x, statistics)
    both = torch.cat([packed, direct_statistics_of(residual)])
    first, second = all_reduce(both, group.group_name).chunk(2)
    mean, var, _ = direct_unpack(second, residual, *of_residual)
    return direct_unpack(first, x, *running), (mean, var)


def _normalised(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    res_weight: Optional[Tensor],
    res_bias: Optional[Tensor],
    res_running_mean: Optional[Tensor],
    res_running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    res_momentum: Optional[float],
    eps: float,
    activation: Optional[str],
    derived: bool,
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> tuple[Optional[Tensor], ...]:
    """y in x's own shape, and what `_derived` needs: kept, mean, var, count, mean and var of the
    residual.

    None for all but y and kept where mean and var are the running ones, and for the last two where
    the residual is added as it is.
    """
    planes, relu = _as_planes(x), activation == "relu"
    added = None if residual is None else _as_planes(residual)
    running = running_mean, running_var, momentum
    of_residual = res_running_mean, res_running_var, res_momentum
    moments, res_moments = _moments_of_both(
        planes, added, training, running, of_residual, group, statistics
    )
    pack = relu and added is not None and derived
    more = *res_moments, res_weight, res_bias
    y, mask, _ = direct_normalise(
        planes, *moments, weight, bias, added, relu, eps, pack, "", False, *more
    )
    # Autograd does not take this for a view: else y could not be changed in place.
    y = torch.ops.aten._unsafe_view(y, x.shape)
    kept = kept_of(planes, y, mask, relu, pack)
    if moments[0] is running_mean and moments[1] is running_var:
        return y, kept, None, None, None, None, None
    return y, kept, *moments, *res_moments


def _derived(grad: Tensor, other: Optional[Tensor], *given: Any) -> tuple[Optional[Tensor], ...]:
    """`gradients_of` in x's own shape, None where there is no gradient."""
    saved, options = Saved(*given[:SAVED]), given[SAVED:]
    x, kept = saved.x, saved.kept
    if kept is not None and kept.is_floating_point():  # y, and not a mask
        kept = _as_planes(kept)
    twin, residual = (None if t is None else _as_planes(t) for t in (other, saved.residual))
    planes = saved._replace(x=_as_planes(x), kept=kept, residual=residual)
    made = gradients_of(_as_planes(grad), twin, *planes, *options)
    grad_x, grad_weight, grad_bias, grad_residual, grad_res_weight = made
    return (
        None if grad_x is None else grad_x.reshape(x.shape),
        None if saved.weight is None else grad_weight,
        None if saved.bias is None else grad_bias,
        grad_residual.reshape(x.shape) if grad_residual is not None and options[-1] else None,
        None if saved.res_weight is None else grad_res_weight,
    )


_forward, _backward = Repeated(_normalised), Repeated(_derived)


class _Normalise(torch.autograd.Function):
    """The whole layer as one autograd node, bypassing the dispatcher.

    It keeps what the operators keep.
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
        res_weight: Optional[Tensor],
        res_bias: Optional[Tensor],
    ) -> Any:
        y, kept, mean, var, count, *res_moments = call()
        if mean is None:
            mean, var = running
        ctx.options = options
        read = None if res_moments[0] is None else residual
        of_residual = read, *res_moments, res_weight
        # The fields of `Saved`; making one would take a microsecond of each call.
        ctx.save_for_backward(x, kept, mean, var, count, weight, bias, *of_residual)
        if not forked:
            return y
        ctx.set_materialize_grads(False)
        return y, y.detach()  # shares y's version counter

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor], other: Optional[Tensor] = None) -> Any:
        # The operators refuse second derivatives.
        direct = not torch.is_grad_enabled() and not ctx.options[2] and quiet()
        gradients = _backward if direct else _derived
        needs = ctx.needs_input_grad[4:]
        made = needed_gradients(gradients, grad, other, ctx.saved_tensors, ctx.options, needs)
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


def _normalise_by(call: Callable[[], Any], forked: bool, given: tuple[Any, ...]) -> Any:
    """y from the call, which is `_normalised` of the given arguments; with its twin if `forked`."""
    x, weight, bias, running_mean, running_var, residual, *of_residual = given[:10]
    training, _, _, eps, activation, derived, group, _ = given[10:]
    if training:
        changed((running_mean, running_var, *of_residual[2:]))
    if not derived:
        return call()[0]
    options = activation == "relu", eps, "" if group is None else group.group_name
    running = running_mean, running_var
    learnt = weight, bias, residual, *of_residual[:2]
    return _apply(call, forked, options, running, x, *learnt)


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
    residual_norm: Optional[ResidualNorm] = None,
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
        residual_norm: normalises the residual as it is added, as `batch_norm_act` without an
            activation does with these arguments and the same training, eps and group. It has a
            weight and a bias where x has one, of the same dtype. In training this moves 5 tensors
            of x's size forward and 8 backward instead of 7 and 11.
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
        False, x, weight, bias, running_mean, running_var, residual, residual_norm, training,
        momentum, eps, activation, group, statistics,
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
    residual_norm: Optional[ResidualNorm] = None,
    activation: Optional[str] = "relu",
    group: Optional[ProcessGroup] = None,
    statistics: Optional[tuple[Tensor, Tensor]] = None,
) -> tuple[Tensor, Tensor]:
    """`batch_norm_act` for a result that two things use, such as both paths of a residual block.

    Arguments, errors and gradients are those of `batch_norm_act`. Where each use takes an output of
    its own, backward in training moves 7 tensors of x's size; adding the gradients and then
    `batch_norm_act` move 9. Its first pass reads both gradients and writes g, their sum where the
    activation let it pass; g is also the residual's gradient, and the second pass reads g and x.

    Returns:
        y, and y again in the same memory: neither may be changed in place.
    """
    made = _normalise_all(
        True, x, weight, bias, running_mean, running_var, residual, residual_norm, training,
        momentum, eps, activation, group, statistics,
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
    residual_norm: Optional[ResidualNorm],
    training: bool,
    momentum: float,
    eps: float,
    activation: Optional[str],
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> Any:
    """y; where `forked` and two gradients are to be added, y and its twin."""
    if residual_norm is not None:
        residual = check_residual_norm(residual_norm, residual, weight, bias)
        if training is False:
            residual = batch_norm_act(
                residual, *residual_norm[:4], training=False, momentum=0.0, eps=eps, activation=None
            )
            residual_norm = None
    norm: tuple[Any, Any, Any, Any, Any] = residual_norm or (None, None, None, None, None)
    of_residual, res_momentum = norm[:4], norm[4]
    tensors = x, weight, bias, running_mean, running_var, residual, *of_residual
    derived = recorded(x, weight, bias, residual, *of_residual[:2])
    forked = forked and derived and training
    momentum = used_momentum(training, momentum, running_mean, running_var)
    if residual_norm is not None:
        res_momentum = used_momentum(training, res_momentum, *of_residual[2:])
    options = activation, derived, group, statistics
    if quiet() and type(eps) is float and eps >= 0.0:
        given = *tensors, training, momentum, res_momentum, eps, *options
        again = _forward.again(*given)
        if again is not None:
            return _normalise_by(again, forked, given)
    of_channels = weight, bias, running_mean, running_var, *of_residual
    check_arguments(x, of_channels, residual, training, eps, activation, group, statistics)
    eps, momentum = float(eps), checked_momentum(momentum)
    if residual_norm is not None:
        res_momentum = checked_momentum(res_momentum)
    given = *tensors, training, momentum, res_momentum, eps, *options
    if undisturbed(*tensors):
        return _normalise_by(partial(_forward, *given), forked, given)
    planes, relu = _as_planes(x), activation == "relu"
    added = None if residual is None else _as_planes(residual)
    with torch.no_grad():
        moments, res_moments = _moments_of_both(
            planes.detach(),
            None if added is None else added.detach(),
            training,
            (running_mean, running_var, momentum),
            (*of_residual[2:], res_momentum),
            group,
            statistics,
        )
    pack = relu and residual is not None and derived
    name = "" if group is None else group.group_name
    y, _, twin = direct_normalise(
        planes, *moments, weight, bias, added, relu, eps, pack, name, forked,
        *res_moments, *of_residual[:2],
    )  # fmt: skip
    y = y.view(x.shape)
    return (y, _Twin.apply(y.detach(), twin.view(x.shape))) if forked else y  # type: ignore[no-untyped-call]


def _as_planes(x: Tensor) -> Tensor:
    """B x C x N."""
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]
