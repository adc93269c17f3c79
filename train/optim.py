"""The optimizer's parameter groups, and the schedules of the paper, sections 3.1 and 3.5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from encnet_triton.train.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> Iterator[dict[str, Any]]:
    """Groups of parameters with one learning rate, split by whether they have weight decay.

    Every group carries ``scale``, its learning rate relative to the schedule's.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    plain = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    plain |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    for scale, parameters in _scales(model, config):
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in parameters:
            keep = config.decay_norm_bias or id(p) not in plain
            (decayed if keep else others).append(p)
        for members, decay in ((decayed, config.weight_decay), (others, 0.0)):
            if members:
                yield {"params": members, "weight_decay": decay, "scale": scale}


def _scales(model: nn.Module, config: OptimConfig) -> Iterator[tuple[float, list[nn.Parameter]]]:
    for part, parameters in model.parameter_groups().items():  # type: ignore[operator]
        if part != "backbone":
            yield config.head_lr_scale, parameters
        elif config.layer_decay == 1:
            yield 1.0, parameters
        else:
            stages = model.backbone.stage_parameters()  # type: ignore[union-attr,operator]
            for distance, stage in enumerate(reversed(stages), start=1):
                yield config.layer_decay**distance, stage


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over `parameter_groups`; the rate is set before every step."""
    groups = list(parameter_groups(model, config))
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of a step (counted from 0): linear warm-up to lr, then the schedule.

    With p the share of the schedule that is done, from 0 to 1, the rate is eta_min + (lr - eta_min)
    times (1 - p)^power (poly) or (1 + cos(pi p)) / 2 (cosine).
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * done)) / 2
    else:
        share = (1 - done) ** config.power
    return config.eta_min + (config.lr - config.eta_min) * share


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate, a multiple of the schedule's."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
