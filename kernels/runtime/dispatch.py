"""Which code runs: the Triton kernels of an operator, or its PyTorch code."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Optional

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no wheel for this platform
    triton = None


_new_enough: dict[int, bool] = {}


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 at import)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _is_sm_80_or_newer(index: Optional[int]) -> bool:
    # Without an index it is the current device, which can change.
    if index is None:
        return torch.cuda.get_device_capability() >= (8, 0)
    if index not in _new_enough:
        _new_enough[index] = torch.cuda.get_device_capability(index) >= (8, 0)
    return _new_enough[index]


# What torch.compiler.assume_constant_result sets, without its import of the whole of torch._dynamo,
# which takes as long as that of torch.
_is_sm_80_or_newer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_triton(x: Tensor) -> bool:
    """Whether kernels run on tensors like x: on sm_80 and up, or when interpreting; not float64."""
    if triton is None or x.dtype == torch.float64:
        return False
    if x.is_cuda:  # so are tensors of a ROCm build, whose GPUs have other warps and products
        return torch.version.hip is None and _is_sm_80_or_newer(x.device.index)
    return interpreting()


def plan_of(package: str, x: Tensor, *sizes: Any, **more: Any) -> Any:
    """The plan of the operator in `package` where its kernels run, or None: PyTorch code runs.

    Kernels run if they take tensors like x and the plan supports the request; the other arguments
    are passed to its `supports` after x. Do not call this with symbolic sizes that it reads.
    """
    if not takes_triton(x):
        return None
    plan = _plan(package)
    return plan if plan.supports(x, *sizes, **more) else None


@cache
def _plan(package: str) -> Any:
    return import_module(".plan", package)  # imports triton, which not every platform has
