"""The precision in which a network computes on a device, and the choice of cuDNN's algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PRECISIONS", "compute_dtype", "fast_dtype", "measured_convolutions"]

PRECISIONS = ("auto", "float32", "bfloat16")


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is faster (GPUs that compute in it, CPUs with AMX); None for float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in for one of `PRECISIONS`; None: float32.

    float32 turns TF32 off in this process; otherwise torch may compute float32 convolutions on a
    GPU in TF32.
    """
    if precision == "auto":
        return fast_dtype(device)
    if precision == "bfloat16":
        return torch.bfloat16
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return None


@contextmanager
def measured_convolutions() -> Iterator[None]:
    """Inside, cuDNN measures once per shape which of its algorithms is fastest.

    For shapes that repeat: if each image has its own, measuring takes longer than it saves.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
