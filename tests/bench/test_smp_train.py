"""Training networks of segmentation_models.pytorch by our trainer, without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench import smp_train
from bench.__main__ import main
from bench.commands import parse
from encnet_triton.train.log import read_records
from encnet_triton.weights.checkpoint import read


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images to train on, whose left half is the second class, and two to validate on."""
    label = np.zeros((48, 64), np.uint8)
    label[:, :32] = 1
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(label * 200).save(tmp_path / "images" / split / f"{i}.png")
            Image.fromarray(label).save(tmp_path / "labels" / split / f"{i}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


class Net(nn.Module):
    """As theirs are made: a trunk below ``encoder.model``, and logits as large as the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.encoder.model(x))
        return found


class SumOfLogits(nn.Module):
    """In place of their loss: its gradient says that it was taken."""

    def __init__(self, mode: str, ignore_index: int) -> None:
        super().__init__()
        assert (mode, ignore_index) == ("multiclass", 255)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert target.dtype == torch.int64 and logits.shape[2:] == target.shape[1:]
        return logits.sum()


def given(data: Path, *more: str) -> list[str]:
    small = "--backbone small --epochs 1 --batch-size 2 --crop 32x32 --report false --pictures 0"
    out = ["--data", str(data), "--out", str(data / "runs"), "--pretrained", "", "--amp", "off"]
    return ["smp_train", *out, *small.split(), *more]


@pytest.mark.parametrize("own", [True, False])
def test_a_network_of_theirs_is_trained_with_its_loss_or_ours(
    own: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def create(name: str, classes: int) -> nn.Module:
        assert name == "Unet"
        made.append(Net(classes))
        return made[-1]

    losses = SimpleNamespace(losses=SimpleNamespace(DiceLoss=SumOfLogits))
    monkeypatch.setattr(smp_train, "import_smp", lambda: losses)
    monkeypatch.setattr(smp_train, "create", create)
    name = "Unet_own" if own else "Unet_recipe"
    more = [] if own else ["--layer-decay", "1"]
    assert main(given(data, "--row", name, *more)) == 0
    tensors, _ = read(data / "runs" / name / "last.safetensors", "model.")
    assert torch.equal(tensors["model.net.head.weight"], made[0].head.weight.detach())
    # Only the sum of logits pushes both biases the same way, and by Adam at the rate of its steps.
    bias = tensors["model.net.head.bias"] - start_of(name, data, create)
    assert bool((bias < -smp_train.RATE / 2).all()) is own
    last = [record for record in read_records(data / "runs" / name) if record["kind"] == "val"]
    assert 0 <= last[-1]["miou"] <= 1


def start_of(name: str, data: Path, create: object) -> torch.Tensor:
    """The first bias of the head: the trainer seeds before it makes the network."""
    torch.manual_seed(smp_train.configuration(name, parse("smp_train", given(data)[1:])).run.seed)
    return Net(2).head.bias.detach()


def test_rows_of_theirs_differ_from_ours_in_loss_optimizer_and_rate_alone(data: Path) -> None:
    options = parse("smp_train", given(data)[1:])
    ours, own, recipe = (
        smp_train.configuration(name, options).fingerprint()
        for name in ("fcn", "FPN_own", "FPN_recipe")
    )
    assert [key for key in ours if recipe[key] != ours[key]] == ["model"]
    changed = {key for key in recipe if own[key] != recipe[key]}
    assert changed == {"lr", "weight_decay", "layer_decay", "warmup_steps", "class_weight"}


def test_what_is_finished_is_shown_and_not_trained_again(
    data: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse("smp_train", given(data)[1:])
    for name, miou in (("encnet", 0.5), ("Unet_own", 0.25)):
        place = data / "runs" / name
        place.mkdir(parents=True)
        config = smp_train.configuration(name, options).as_dict()
        (place / "config.json").write_text(json.dumps(config))
        (place / "result.json").write_text("{}")
        cost = {"kind": "train", "step": 2, "images_per_second": 4.0, "peak_memory_gib": 1.5}
        val = {"kind": "val", "step": 2, "miou": miou, "pixel_accuracy": 0.75}
        (place / "metrics.jsonl").write_text(f"{json.dumps(cost)}\n{json.dumps(val)}\n")
    monkeypatch.setattr(smp_train, "import_smp", lambda: None)
    monkeypatch.setattr(smp_train.subprocess, "run", None)
    figures = data / "figures.json"
    assert main(given(data, "--only", "encnet,Unet_own", "--json", str(figures))) == 0
    assert json.loads(figures.read_text())["Unet_own"] == {
        "miou": 0.25,
        "pixel_accuracy": 0.75,
        "images_per_second": 4.0,
        "peak_memory_gib": 1.5,
    }
    shown = capsys.readouterr().out
    assert "smp Unet_own" in shown and " 25.0 " in shown and " 75.0 " in shown


def test_an_unknown_row_is_refused_by_name(data: Path, capsys) -> None:
    assert main(given(data, "--only", "Linknet")) == 2
    assert "--only Linknet: there are only encnet, fcn, FPN_own" in capsys.readouterr().err
