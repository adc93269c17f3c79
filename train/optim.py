"""The optimizer's parameter groups, and the schedules of the paper, sections 3.1 and 3.5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from encnet_triton.nn import ContextEncoding
from encnet_triton.train.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> Iterator[dict[str, Any]]:
    """Groups of parameters with one learning rate, split by whether they have weight decay.

    Every group carries ``scale``, its learning rate relative to the schedule's. AdamW moves each
    weight by about the rate, whatever its gradient, so weights of a sum over K codewords would move
    their outputs K times as far as those of the mean: they get 1/K of the rate, and the same decay.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    plain = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    plain |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    terms = _terms(model) if config.optimizer == "adamw" else {}
    for scale, parameters in _scales(model, config):
        groups: dict[tuple[bool, int], list[nn.Parameter]] = {(True, 1): [], (False, 1): []}
        for p in parameters:
            decayed = config.decay_norm_bias or id(p) not in plain
            groups.setdefault((decayed, terms.get(id(p), 1)), []).append(p)
        for (decayed, count), members in groups.items():
            decay = config.weight_decay * count if decayed else 0.0
            if members:
                yield {"params": members, "weight_decay": decay, "scale": scale / count}


def _terms(model: nn.Module) -> dict[int, int]:
    """By the identity of a weight, how many codewords its input is the sum over."""
    modules = [m for m in model.modules() if isinstance(m, ContextEncoding)]
    return {id(p): m.num_codewords for m in modules for p in m.weights_of_sums()}


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

    The warm-up takes half of the steps at most.

    With p the share of the schedule that is done, from 0 to 1, the rate is eta_min + (lr - eta_min)
    times (1 - p)^power (poly) or (1 + cos(pi p)) / 2 (cosine).
    """
    warmup = min(config.warmup_steps, steps // 2)
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
