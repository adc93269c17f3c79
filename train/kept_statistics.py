"""Copies of a network's running statistics, to restore after a step that is skipped."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class KeptStatistics:
    """The buffers of all batch norms of a model, and memory for a copy of them.

    Lists of one dtype each: torch copies a list of mixed dtypes tensor by tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for buffer in module.buffers(recurse=False):
                    by_dtype[buffer.dtype].append(buffer)
        self._lists = [(own, [torch.empty_like(b) for b in own]) for own in by_dtype.values()]

    def keep(self) -> None:
        """Copy the present values."""
        for own, kept in self._lists:
            torch._foreach_copy_(kept, own)

    def restore(self) -> None:
        """Restore the values copied last."""
        for own, kept in self._lists:
            torch._foreach_copy_(own, kept)
