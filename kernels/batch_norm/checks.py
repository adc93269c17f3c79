"""What `batch_norm_act` refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..runtime.arguments import (
    check_dense,
    check_derivatives,
    check_flag,
    check_no_vmap,
    check_number,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ResidualNorm(NamedTuple):
    """What normalises the residual of `batch_norm_act`: arguments as there for x."""

    weight: Optional[Tensor]
    bias: Optional[Tensor]
    running_mean: Optional[Tensor]
    running_var: Optional[Tensor]
    momentum: float


def check_residual_norm(
    norm: ResidualNorm, residual: Optional[Tensor], weight: Any, bias: Any
) -> Tensor:
    """The residual; refuses what `check_arguments` does not see."""
    if not isinstance(norm, ResidualNorm):
        raise TypeError(
            "batch_norm_act: residual_norm must be a ResidualNorm or None, got "
            f"{type(norm).__name__}."
        )
    if residual is None:
        raise ValueError("batch_norm_act: residual_norm needs a residual.")
    check_number("batch_norm_act", "momentum of residual_norm", norm.momentum)
    for name, ours, other in (("weight", weight, norm.weight), ("bias", bias, norm.bias)):
        of_x, of_residual = (getattr(tensor, "dtype", None) for tensor in (ours, other))
        if of_x != of_residual:
            raise ValueError(
                f"batch_norm_act: {name} and that of residual_norm must have one dtype or both be "
                f"None, got {of_x} and {of_residual}."
            )
    return residual


def check_devices(x: Tensor, others: dict[str, Optional[Tensor]]) -> None:
    """Every operand is on x's device, which fake tensors do not check by themselves."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"batch_norm_act: {name} must be on x's device {x.device}, got {tensor.device}."
            )


_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def check_arguments(
    x: Tensor,
    of_channels: Sequence[Optional[Tensor]],
    residual: Optional[Tensor],
    training: bool,
    eps: float,
    activation: Optional[str],
    group: Optional[ProcessGroup],
    statistics: Optional[tuple[Tensor, Tensor]],
) -> None:
    """Refuse what `batch_norm_act` cannot take.

    `of_channels` are weight, bias and running statistics of x, then those of the residual.
    """
    names = *_OF_CHANNELS, *(f"{name} of residual_norm" for name in _OF_CHANNELS)
    weight, bias, running_mean, running_var, res_weight, res_bias, *_ = of_channels
    _check_inputs(x, dict(zip(names, of_channels)), residual, activation)
    _check_options(training, eps, group)
    _check_statistics(x, statistics)
    differentiable = x, weight, bias, residual, res_weight, res_bias
    check_derivatives("batch_norm_act", *differentiable)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm_act: running_mean and running_var are needed when training is False."
            )
        return
    check_no_vmap("batch_norm_act in training", *differentiable)
    if group is None and x.numel() // x.shape[1] < 2:
        raise ValueError(
            "batch_norm_act: training needs more than one value per channel, got x of shape "
            f"{tuple(x.shape)}; the batch is too small."
        )


def used_momentum(training: bool, momentum: Any, mean: Any, var: Any) -> Any:
    """0.0 where nothing looks at it, since there are no statistics to move."""
    return 0.0 if training is False or (mean is None and var is None) else momentum


def checked_momentum(momentum: Any) -> float:
    """As a float."""
    check_number("batch_norm_act", "momentum", momentum)
    return float(momentum)


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
    check_devices(x, {**per_channel, "residual": residual})
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
