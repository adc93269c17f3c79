"""The schedule of paper section 3.1 and the parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from encnet_triton.models import create_model
from encnet_triton.nn import ContextEncoding
from encnet_triton.train import optim
from encnet_triton.train.config import ConfigError, OptimConfig


def test_poly_schedule_is_the_papers() -> None:
    config = OptimConfig(lr=0.01)
    steps = 1000
    for step in (0, 1, 500, 999):
        assert optim.rate_at(step, steps, config) == pytest.approx(0.01 * (1 - step / steps) ** 0.9)


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_the_schedule_counts_from_the_end_of_the_warm_up(schedule: str) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=300, schedule=schedule)
    assert [optim.rate_at(s, 1000, config) for s in (0, 149, 299)] == [
        1 / 301,
        150 / 301,
        300 / 301,
    ]
    alone = OptimConfig(lr=1.0, schedule=schedule)
    for step in (0, 1, 350, 699):
        assert optim.rate_at(300 + step, 1000, config) == optim.rate_at(step, 700, alone)
    assert optim.rate_at(300, 1000, config) == 1


def test_the_warm_up_of_a_short_training_is_half_of_it() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=100, schedule="cosine")
    rates = [optim.rate_at(step, 50, config) for step in range(50)]
    assert max(rates) == rates[25] == 1 and rates[-1] < 0.01


def test_the_rate_ends_at_eta_min() -> None:
    # mmsegmentation: (base_lr - eta_min) (1 - progress)^power + eta_min
    config = OptimConfig(lr=0.01, eta_min=1e-4)
    for step in (0, 500, 999):
        expected = (0.01 - 1e-4) * (1 - step / 1000) ** 0.9 + 1e-4
        assert optim.rate_at(step, 1000, config) == pytest.approx(expected, rel=1e-12)
    cosine = OptimConfig(lr=0.01, eta_min=0.002, schedule="cosine")
    assert optim.rate_at(500, 1000, cosine) == pytest.approx(0.006)
    with pytest.raises(ConfigError, match="eta_min"):
        OptimConfig(lr=0.01, eta_min=0.02)


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


def test_layer_decay_gives_each_stage_its_share_of_the_next_ones_rate() -> None:
    model = create_model("fcn", 5, backbone="demo", head_channels=32)
    config = OptimConfig(layer_decay=0.5, head_lr_scale=3.0, decay_norm_bias=False)
    optimizer = optim.make_optimizer(model, config)
    optim.set_rate(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    stages = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1}
    for name, p in model.named_parameters():
        part, _, rest = name.partition(".")
        backbone = part == "backbone"
        assert rates[id(p)] == (0.5 ** stages[rest.split(".")[0]] if backbone else 3.0), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_torchs_with_a_group_for_each_parameter(optimizer: str, float64: None) -> None:
    config = OptimConfig(
        optimizer=optimizer, betas=(0.8, 0.95), momentum=0.7, weight_decay=0.05, lr=0.01,
        layer_decay=0.7, head_lr_scale=3.0, decay_norm_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = create_model("fcn", 5, backbone="demo", head_channels=16)
    theirs = copy.deepcopy(ours)
    stages = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1}
    groups = []
    for name, p in theirs.named_parameters():
        part, stage, *_ = name.split(".")
        scale = 0.7 ** stages[stage] if part == "backbone" else 3.0
        # Biases, and the weights of batch norms, which have one dimension.
        decay = 0.05 if p.ndim > 1 else 0.0
        groups.append({"params": [p], "weight_decay": decay, "lr": 0.0, "scale": scale})
    peer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.7)
    if optimizer == "adamw":
        peer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    made = optim.make_optimizer(ours, config)
    for step in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        rate = optim.rate_at(step, 10, config)
        optim.set_rate(made, rate)
        for group in peer.param_groups:
            group["lr"] = rate * group["scale"]
        made.step()
        peer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class _Head(nn.Module):
    """A network that is a Context Encoding module and nothing else."""

    def __init__(self, combine: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.context = ContextEncoding(12, 5, num_codewords=8, combine=combine)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": [], "head": list(self.parameters())}


def test_adamw_moves_the_gates_of_a_sum_over_codewords_as_far_as_those_of_their_mean(
    float64: None,
) -> None:
    """Otherwise its first steps saturate the paper's gates, which are then alike for all images."""
    config = OptimConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, decay_norm_bias=False)
    x = torch.randn(2, 12, 5, 5)
    outputs = {}
    for combine in ("sum", "mean"):
        head = _Head(combine)
        optimizer = optim.make_optimizer(head, config)
        for _ in range(5):
            optim.set_rate(optimizer, 0.01)
            y, se = head.context(x)
            optimizer.zero_grad()
            (1e3 * (y.square().sum() + se.square().sum())).backward()
            optimizer.step()
        outputs[combine] = head.context(x)
    # AdamW adds 1e-8 to the size of a gradient, and the gradients differ by a factor of 8.
    torch.testing.assert_close(outputs["sum"], outputs["mean"], rtol=1e-6, atol=1e-8)
