"""The schedule of paper section 3.1 and the parameter groups."""

from __future__ import annotations

import pytest

from encnet_triton.models import create_model
from encnet_triton.train import optim
from encnet_triton.train.config import OptimConfig


def test_poly_schedule_is_the_papers() -> None:
    config = OptimConfig(lr=0.01)
    steps = 1000
    for step in (0, 1, 500, 999):
        assert optim.rate_at(step, steps, config) == pytest.approx(0.01 * (1 - step / steps) ** 0.9)


def test_warm_up_rises_to_the_base_rate() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=3)
    assert [optim.rate_at(s, 1000, config) for s in range(3)] == [0.25, 0.5, 0.75]
    assert optim.rate_at(3, 1000, config) > 0.99


@pytest.mark.parametrize("decay", [True, False], ids=["decay-all", "no-decay-on-bn-and-bias"])
def test_every_parameter_is_in_one_group(decay: bool) -> None:
    model = create_model("encnet", 5, backbone="demo", head_channels=32, num_codewords=4)
    config = OptimConfig(head_lr_scale=10.0, decay_norm_bias=decay, lr=0.1)
    optimizer = optim.make_optimizer(model, config)
    optim.set_rate(optimizer, 0.1)
    settings = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert settings[id(named["backbone.conv1.weight"])] == (0.1, 1e-4)
    norm = named["backbone.bn1.weight"]
    assert settings[id(norm)] == (0.1, 1e-4 if decay else 0.0)
    head = [p for name, p in named.items() if not name.startswith("backbone.") and p.ndim == 4]
    assert head and all(settings[id(p)] == (1.0, 1e-4) for p in head)
