"""Other people's models with this project's batch normalisation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from encnet_triton.nn import BatchNormAct, BatchNormAct1d, BatchNormAct2d, convert_batchnorm


class Net(nn.Module):
    """Every kind of layer that is converted; ``shared`` is used twice, ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 4, 3), self.shared, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), self.shared
        )
        self.volume = nn.BatchNorm3d(4, affine=False)
        self.of_batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.flat = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.of_batch(self.volume(self.trunk(x)[:, :, None])[:, :, 0])
        out: Tensor = self.flat(y.flatten(2)).relu()
        return out


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of a training step, the state after it, and outputs in evaluation."""
    model.zero_grad()
    y = model.train()(x)
    y.square().sum().backward()
    gradients = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    return {"y": y.detach(), **gradients, **state, "eval": model.eval()(x).detach()}


@pytest.mark.parametrize("impl", ["auto", "fused", "torch"])
def test_it_computes_what_it_did(impl: Any) -> None:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), x)
    found = outcome(convert_batchnorm(model, impl=impl), x)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


SHARES = (slice(0, 2), slice(2, 3))  # of the images, for two processes


def network_and_images() -> tuple[nn.Module, Tensor]:
    """Images whose means differ, so that unsynchronised statistics are far off."""
    torch.manual_seed(0)
    model = Net().double()
    spread = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None, None]
    return model, spread * torch.randn(3, 3, 9, 9, dtype=torch.float64) + spread


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, images = network_and_images()
    convert_batchnorm(model, dist.group.WORLD)
    torch.save(outcome(model, images[SHARES[rank]]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
@pytest.mark.verify  # a layer is given its group here, and test_ddp.py trains with it
def test_two_processes_equal_torchs_layers_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, images = network_and_images()
    whole = outcome(model, images)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), whole["y"], **close)
    for name, _ in model.named_parameters():
        total = sum(part[f"d{name}"] for part in parts)
        torch.testing.assert_close(total, whole[f"d{name}"], **close)
    for name in model.state_dict():
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], **close)


def test_layers_stay_the_same_objects() -> None:
    """An optimiser, a hook, and a second reference to a layer go on."""
    model = Net()
    layer, weight = model.shared, model.shared.weight
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    group: Any = object()
    assert convert_batchnorm(model, group, "fused") is model
    assert model.shared is layer is model.trunk[1] is model.trunk[4]
    assert model.shared.weight is weight and isinstance(layer, BatchNormAct2d)
    assert layer.activation is None and layer.group is group and layer.impl == "fused"
    assert type(model.volume) is BatchNormAct and type(model.flat) is BatchNormAct1d
    model.eval()(torch.randn(2, 3, 9, 9))
    assert calls == [1, 1]


def test_layers_of_this_project_keep_their_activation() -> None:
    model = nn.Sequential(BatchNormAct2d(4), nn.SyncBatchNorm(4))
    convert_batchnorm(model)
    assert model[0].activation == "relu" and type(model[1]) is BatchNormAct
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(4,\)"):
        model[1](torch.zeros(4))


class BatchNormAct2dOfTimm(nn.BatchNorm2d):
    """As timm has it: batch norm, then two children."""

    def __init__(self, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(4)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


BatchNormAct2dOfTimm.__module__ = "timm.layers.norm_act"
BatchNormAct2dOfTimm.__name__ = "BatchNormAct2d"


@pytest.mark.parametrize("impl", ["auto", "fused"])
@pytest.mark.parametrize(
    ("act", "drop", "fused"),
    [
        (nn.ReLU(inplace=True), nn.Identity(), True),
        (nn.ReLU6(inplace=True), nn.Identity(), False),
        (nn.SiLU(inplace=True), nn.Identity(), False),
        (nn.Hardswish(inplace=True), nn.Identity(), False),
        (nn.Identity(), nn.Identity(), False),
        (nn.ReLU(), nn.MaxPool2d(3, 1, 1), False),  # comes between
    ],
    ids=["relu", "relu6", "silu", "hard-swish", "none", "drop"],
)
def test_batch_norms_of_timm_keep_their_activation(
    act: nn.Module, drop: nn.Module, fused: bool, impl: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2dOfTimm(act, drop)).double()
    x = 4 * torch.randn(3, 3, 9, 9, dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), x)
    found = outcome(convert_batchnorm(model, impl=impl), x)
    assert isinstance(model[1], BatchNormAct2d) and list(found) == list(expected)
    assert model[1].activation == ("relu" if fused else None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


class Derived(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        (Derived(4), {}, "layer '1' is a Derived"),
        (nn.BatchNorm2d(4, momentum=None), {}, "layer '1' keeps a cumulative average"),
        (nn.BatchNorm2d(4), {"impl": "cuda"}, "impl is 'cuda'"),
        (nn.BatchNorm2d(4), {"impl": "torch", "group": object()}, "cannot be synchronised"),
    ],
)
def test_what_cannot_be_converted_is_named(
    layer: nn.Module, options: dict[str, Any], words: str
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    with pytest.raises(ValueError, match=words):
        convert_batchnorm(model, **options)
    assert type(model[0]) is nn.BatchNorm2d
