"""The arithmetic in which a network computes on a device."""

from __future__ import annotations

import torch

__all__ = ["PRECISIONS", "compute_dtype", "fast_dtype"]

PRECISIONS = ("auto", "float32", "bfloat16")


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where it gains: GPUs that compute in it, CPUs with matrix tiles. None: float32."""
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
