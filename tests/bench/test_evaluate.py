"""The bench of evaluation: labels are compared first, and both sides do the same work."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import evaluate
from bench.__main__ import main
from bench.loader import write_folder
from encnet_triton.data import create_dataset
from encnet_triton.inference import Predictor
from encnet_triton.scoring import confusion

CPU = torch.device("cpu")


class Output(NamedTuple):
    logits: Tensor


class OneLayer(nn.Module):
    """A network that costs nothing beside what is done with its logits."""

    align_corners = True
    options: ClassVar[dict[str, object]] = {}

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.classifier = nn.Conv2d(3, evaluate.CLASSES, 9, stride=8, padding=4)

    def forward(self, x: Tensor) -> Output:
        return Output(self.head.classifier(x))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CLASSES": 12, "CROP": 480, "IMAGES": 1, "CHECKED": 1}.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate, "create_model", OneLayer)


@pytest.mark.float32
@pytest.mark.usefixtures("small")
def test_both_sides_count_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, 1, evaluate.CLASSES)
    dataset = create_dataset("folder", "val", tmp_path)
    predictor = evaluate.make_predictor(CPU)
    ours = confusion(predictor, dataset).counts
    plain = evaluate.plain_confusion(predictor, dataset).counts
    assert ours.sum() == plain.sum() == 683 * 512
    assert (ours - plain).abs().sum() <= 1e-4 * 683 * 512  # ties
    assert len(ours.sum(0).nonzero()) > 1  # the network tells classes apart


@pytest.mark.float32
@pytest.mark.usefixtures("small")
def test_a_table_if_labels_agree_and_one_sentence_if_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = iter([evaluate.Result(2.0, 3.0, 100.0), evaluate.Result(3.0, 6.0, 400.0)])
    monkeypatch.setattr(evaluate, "measure_apart", lambda *_: next(made))
    assert main(["evaluate", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1.50x" in printed and "2.00x" in printed and "4.00x" in printed
    predict = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda self, image: predict(self, image).flip(1))
    assert main(["evaluate"]) == 1
    said = capsys.readouterr()
    assert "no speed is given" in said.err and not said.out
