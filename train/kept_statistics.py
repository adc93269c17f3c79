"""Copies of the running statistics of a network, to go back to after a step that does not count."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class KeptStatistics:
    """The buffers of all batch norms of a model, and room for a copy of them.

    Lists of one dtype, since torch copies a list with two of them a tensor at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for buffer in module.buffers(recurse=False):
                    by_dtype[buffer.dtype].append(buffer)
        self._lists = [(own, [torch.empty_like(b) for b in own]) for own in by_dtype.values()]

    def keep(self) -> None:
        """Copy them as they are."""
        for own, kept in self._lists:
            torch._foreach_copy_(kept, own)

    def restore(self) -> None:
        """Put back what was kept."""
        for own, kept in self._lists:
            torch._foreach_copy_(own, kept)
