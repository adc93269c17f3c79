"""The moving average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from encnet_triton.nn import BatchNormAct2d
from encnet_triton.train.average import Average


def test_it_is_the_mean_with_a_decay_that_grows(float64: None) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNormAct2d(3)).train()
    average = Average(model, decay=0.15)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    for step, decay in enumerate((1 / 10, 0.15, 0.15)):  # (1 + t) / (10 + t) is 2 / 11 at t = 1
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        model(torch.randn(2, 2, 4, 4))
        average.update(step)
        for name, t in model.state_dict().items():
            kept = decay if t.is_floating_point() else 0
            expected[name] = kept * expected[name] + (1 - kept) * t
    found = average.model.state_dict()
    assert int(found["1.num_batches_tracked"]) == 3
    for name, t in expected.items():
        torch.testing.assert_close(found[name].double(), t.double(), rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in average.model.parameters())
    assert not average.model.training and model.training


def test_a_process_group_is_shared() -> None:
    class Group:
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("a process group cannot be copied")

    layer = BatchNormAct2d(3)
    layer.group = group = Group()  # type: ignore[assignment]
    assert Average(layer, 0.9).model.group is group
