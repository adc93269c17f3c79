"""Steps whose loss is not finite: out of the averages, counted in a row, told honestly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encnet_triton.train.__main__ import main
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.weights.checkpoint import read


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(recipe: Path, *arguments: str) -> int:
    options = ["--pictures", "0", "--val-every", "0", "--epochs", "40"]
    return main(["--recipe", str(recipe), *options, *arguments])


def poison(patch: pytest.MonkeyPatch, when: Callable[[int], bool], weights: bool = False) -> None:
    """Make the loss of some steps, counted from 1, or the weights before them, not finite."""
    compute, step = Segmentation.compute, 0

    def poisoned(self: Segmentation, network: object, part: object) -> object:
        nonlocal step
        step += 1
        if not when(step):
            return compute(self, network, part)
        if weights:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        terms = compute(self, network, part)
        return terms._replace(total=terms.total * float("nan"))

    patch.setattr(Segmentation, "compute", poisoned)


def losses() -> list[float | None]:
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    records = [json.loads(line, parse_constant=refuse) for line in lines]
    return [r["loss"] for r in records if r["kind"] == "train"]


def test_they_are_left_out_of_the_averages(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: step in (2, 5, 6))
    assert train(recipe, "--stop-at", "6", "--log-every", "2") == 0
    first, second, third = losses()
    assert first is not None and second is not None and third is None
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    assert train(recipe, "--stop-at", "1", "--name", "other", "--log-every", "2") == 0
    lines = Path("runs/other/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] == first  # of the one step that counts


def test_only_steps_one_after_the_other_end_a_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    poison(monkeypatch, lambda step: step % 10 != 0 and step < 30 or step > 40)
    assert train(recipe) == 2
    said = capsys.readouterr().err
    assert "in 10 steps in a row, the last of them step 50 with the batch" in said
    assert said.count(".jpg") == 4
    saved = Path("runs/tiny/last.safetensors")
    # Steps 30 to 40 were good; the ends of the epochs after them, each of two steps, were not.
    assert said.endswith(f"the last good state is {saved}, of step 40\n")
    assert read(saved)[1]["progress"]["step"] == 40
    assert read(saved)[1]["progress"]["skipped"] == 27


def test_broken_weights_end_a_run_at_once_and_blame_no_image(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    poison(monkeypatch, lambda step: step == 4, weights=True)
    assert train(recipe) == 2
    said = capsys.readouterr().err
    assert "the weights are not finite at step 4 (backbone.conv1" in said and ".jpg" not in said
    assert said.endswith("the last good state is runs/tiny/last.safetensors, of step 2\n")
