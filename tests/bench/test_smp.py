"""The comparison with segmentation_models.pytorch, without it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

from bench import smp
from bench.__main__ import main


def test_each_network_is_measured_in_a_process_and_shown(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(arguments: list[str]) -> dict[str, float]:
        asked.append(arguments)
        return {"parameters": 1000, "gmac": 0.5, "seconds": 2.0, "extra_mib": 100.0}

    monkeypatch.setattr(smp.apart, "measured", measured)
    figures = tmp_path / "figures.json"
    assert main(["smp", "--crop", "64x96", "--batch", "3", "--json", str(figures)]) == 0
    assert [arguments[2] for arguments in asked] == [*smp.OURS, *smp.THEIRS]
    assert {tuple(arguments[3:]) for arguments in asked} == {("--crop", "64x96", "--batch", "3")}
    assert json.loads(figures.read_text())["Unet"]["seconds"] == 2.0
    assert capsys.readouterr().out.count(" 1.50 ") == len(asked)  # 3 images in 2 seconds


def test_a_step_trains_and_its_cost_is_counted(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Conv2d(3, smp.CLASSES, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smp._stepped(nn.functional.cross_entropy(model(images), labels.long()), optimizer)

    monkeypatch.setattr(smp, "ours", lambda name: (model, step))
    assert main(["smp", "--network", "fcn", "--crop", "8x16", "--batch", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 4 * smp.CLASSES
    assert found["gmac"] == pytest.approx(3 * smp.CLASSES * 8 * 16 / 1e9)
    assert not torch.equal(before, model.weight) and model.weight.grad is None


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is not None, reason="it is installed"
)
def test_where_it_is_not_installed_one_sentence_says_so(capsys) -> None:
    assert main(["smp", "--network", "Unet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: segmentation_models.pytorch is not installed: pip install ")
