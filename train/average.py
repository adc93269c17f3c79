"""An exponential moving average of a network's weights and statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """A copy of a network whose values are moving averages; nothing is read back from the device.

    After step t (counted from 0) the copy is d times itself plus 1 - d times the network; d is the
    smaller of ``decay`` and (1 + t) / (10 + t), so that even a short run forgets its random start.

    Args:
        model: the network, not compiled yet.
        decay: in [0, 1).

    Attributes:
        model: the copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # A layer's process group is shared, and cannot be copied.
        groups = [g for m in model.modules() if (g := getattr(m, "group", None)) is not None]
        copies: dict[int, object] = {id(group): group for group in groups}
        # Cloned, since fake tensors, of which a dry run is made, have no storage to copy.
        copies |= {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
        copies |= {id(t): t.clone() for t in model.buffers()}
        self.model = copy.deepcopy(model, copies)
        self.model.eval().requires_grad_(False)
        self.decay = decay
        own, theirs = self.model.state_dict(), model.state_dict()
        averaged = [name for name, t in own.items() if t.is_floating_point()]
        copied = [name for name in own if name not in averaged]
        self._averaged = [own[name] for name in averaged], [theirs[name] for name in averaged]
        self._copied = [own[name] for name in copied], [theirs[name] for name in copied]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, 1 - decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
