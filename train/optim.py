"""SGD with parameter groups and the schedules of the paper, sections 3.1 and 3.5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from encnet_triton.train.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> Iterator[dict[str, Any]]:
    """Backbone and head, each split into what weight decay applies to and what it does not.

    Every group carries ``scale``, its learning rate relative to the schedule's.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    plain = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    plain |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    for part, parameters in model.parameter_groups().items():  # type: ignore[operator]
        scale = 1.0 if part == "backbone" else config.head_lr_scale
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in parameters:
            keep = config.decay_norm_bias or id(p) not in plain
            (decayed if keep else others).append(p)
        for members, decay in ((decayed, config.weight_decay), (others, 0.0)):
            if members:
                yield {"params": members, "weight_decay": decay, "scale": scale}


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD with momentum over `parameter_groups`; the rate is set before every step."""
    return torch.optim.SGD(
        list(parameter_groups(model, config)), lr=config.lr, momentum=config.momentum
    )


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of a step (counted from 0) after a linear warm-up.

    poly: lr (1 - step / steps)^power; cosine: lr (1 + cos(pi step / steps)) / 2.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * step / steps)) / 2
    return float(config.lr * (1 - step / steps) ** config.power)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
