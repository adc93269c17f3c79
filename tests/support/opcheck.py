"""torch.library.opcheck for operators whose kernels may be interpreted."""

from __future__ import annotations

from typing import Any

import torch

from encnet_triton.kernels.runtime import launch

# What depends on the kernels. How an operator is registered and traced does not: each package's
# test_operator.py checks that with PyTorch code, in a tenth of the time.
_OF_KERNELS = ("test_schema", "test_faketensor")


def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """All of opcheck on a GPU."""
    chosen = {"test_utils": _OF_KERNELS} if launch.interpreting() else {}
    torch.library.opcheck(operator, arguments, **chosen)
