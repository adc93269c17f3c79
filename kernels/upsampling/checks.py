"""What the upsampling operators refuse: each argument in one sentence."""

from typing import Optional

import torch
from torch import Tensor

from ..runtime.arguments import (
    check_dense,
    check_derivatives,
    check_flag,
    check_integer,
    check_number,
)

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(name: str, logits: Tensor) -> None:
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


def check_inputs(logits: Tensor, target: Tensor, weight: Optional[Tensor]) -> None:
    name = "upsample_cross_entropy"
    check_logits(name, logits)
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
            f"{name}: weight must hold {logits.shape[1]} floating-point numbers, one per class, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}."
        )
    check_dense(name, target=target, weight=weight)
    for other, what in ((target, "target"), (weight, "weight")):
        if other is not None and other.device != logits.device:
            raise ValueError(f"{name}: {what} is on {other.device}, but logits on {logits.device}.")


def check_weight(weight: Optional[Tensor]) -> None:
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


def check_arguments(
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
    check_inputs(logits, target, weight)
    check_derivatives(name, logits, weight)
