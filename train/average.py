"""An exponential moving average of a network's weights and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def network_like(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network like another, each tensor made from the one there, which need not have a storage
    that can be copied: those of a dry run have none."""
    # A layer's process group is shared, and cannot be copied.
    groups = [g for m in model.modules() if (g := getattr(m, "group", None)) is not None]
    known: dict[int, object] = {id(group): group for group in groups}
    known |= {id(p): nn.Parameter(tensor(p)) for p in model.parameters()}
    known |= {id(t): tensor(t) for t in model.buffers()}
    return copy.deepcopy(model, known)


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
        self.model = network_like(model, Tensor.clone)
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
