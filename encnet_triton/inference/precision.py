"""The arithmetic in which a network computes on a device."""

from __future__ import annotations

import torch

__all__ = ["fast_dtype"]


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where it gains: GPUs that compute in it, CPUs with matrix tiles. None: float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None
