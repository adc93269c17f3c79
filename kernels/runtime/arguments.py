"""Checks of arguments that all operators share."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Not public. Without them torch raises its own error.
_functorch: Any = getattr(torch._C, "_functorch", None)
_transforms: Any = getattr(torch._C, "_are_functorch_transforms_active", None)


def check_flag(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be True or False, got {_shown(value)}.")


def check_integer(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it has at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name}: {argument} must be an integer, got {_shown(value)}.")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: {argument} must fit into 64 bits, got {value}.")


def check_number(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number."""
    numbers = (int, float, torch.SymInt, torch.SymFloat, Real)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name}: {argument} must be a number, got {_shown(value)}.")


def check_dense(name: str, **tensors: Optional[Tensor]) -> None:
    """Raise TypeError for a sparse tensor."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.layout != torch.strided:
            raise TypeError(f"{name}: {argument} must be a dense tensor, got {tensor.layout}.")


def _shown(value: object) -> str:
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__


def check_derivatives(name: str, *tensors: Optional[Tensor]) -> None:
    """Raise NotImplementedError for a derivative that torch would otherwise take to be zero."""
    if _nothing_derives():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (jvp, jacfwd, dual numbers): "
                "use backward() or torch.autograd.grad."
            )
        if _is("is_gradtrackingtensor", tensor) and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} cannot be differentiated by torch.func (grad, vjp, jacrev): "
                "use backward() or torch.autograd.grad, also of what vmap returns."
            )


def _nothing_derives() -> bool:
    """Whether, as far as torch can tell, this is plain code: no dual numbers, no torch.func."""
    if _transforms is None or torch.compiler.is_compiling():
        return False
    return not (may_be_dual() or _transforms())


def may_be_dual() -> bool:
    """Whether tensors may carry a tangent: code runs inside `forward_ad.dual_level`."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def check_no_vmap(name: str, *tensors: Optional[Tensor]) -> None:
    """Raise NotImplementedError inside torch.func.vmap."""
    if any(tensor is not None and _is("is_batchedtensor", tensor) for tensor in tensors):
        raise NotImplementedError(f"{name} does not work inside torch.func.vmap.")


def _is(question: str, tensor: Tensor) -> bool:
    # A compiler would turn the question into an operator.
    if _functorch is None or torch.compiler.is_compiling():
        return False
    return bool(getattr(_functorch, question)(tensor))
