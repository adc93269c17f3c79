"""A dry run refuses what the run would refuse, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from encnet_triton.models import create_model
from encnet_triton.train.__main__ import main
from encnet_triton.train.forecast import peak_memory
from encnet_triton.train.recipe import build


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_the_run_would_refuse(recipe: Path, folder_data: Path, capsys) -> None:
    """Each is refused by both, in the same words."""
    start = ["--recipe", str(recipe)]
    for given in (
        ["--batch-size", "64"],
        ["--batch-size", "3", "--accumulation", "2"],
        ["--data", "missing-folder"],
        ["--val-split", "absent"],
        ["--backbone", "resnet5"],
        ["--init-from", "absent.safetensors"],
        ["--pretrained", "absent.pth"],
    ):
        said = []
        for dry in (["--dry-run"], []):
            assert main([*start, *given, *dry]) == 2, given
            said.append(capsys.readouterr().err)
            assert not Path("runs").exists()
        assert said[0] == said[1] and len(said[0].splitlines()) == 1


def test_a_logger_and_a_folder_that_cannot_be_made(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Path("file").touch()
    start = ["--recipe", str(recipe), "--pictures", "0"]
    for given in (["--logger", "wandb"], ["--runs", "file"], ["--runs", "file/below"]):
        said = []
        for dry in (["--dry-run"], []):
            assert main([*start, *given, *dry]) == 2, given
            said.append(capsys.readouterr().err)
        assert said[0] == said[1] and len(said[0].splitlines()) == 1


def test_what_does_not_fit_a_run_that_is_there(recipe: Path, folder_data: Path, capsys) -> None:
    start = ["--recipe", str(recipe), "--dry-run"]
    assert main([*start[:2], "--stop-at", "1"]) == 0
    assert main(start) == 2
    assert "run runs/tiny exists" in capsys.readouterr().err
    assert main([*start, "--resume", "--lr", "0.5"]) == 2
    assert "lr was 0.02 and is now 0.5" in capsys.readouterr().err
    (folder_data / "classes.txt").write_text("ground\nsky\nthing\n")
    assert main([*start, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "its class names differ, class 0 was 'sky' and is now 'ground'" in said
    (folder_data / "classes.txt").write_text("sky\nground\nthing\n")
    for place in (folder_data, os.path.relpath(folder_data), shutil.copytree(folder_data, "moved")):
        assert main([*start, "--resume", "--data", f"{place}/"]) == 0
    lines = (folder_data / "train.txt").read_text().splitlines()
    for changed, sentence in (
        (lines[1:], "it had 8 training images and now has 7"),
        (lines[::-1], "its training images have other names or another order"),
    ):
        (folder_data / "train.txt").write_text("\n".join(changed) + "\n")
        for command in (start, start[:2]):
            assert main([*command, "--resume"]) == 2
            assert sentence in capsys.readouterr().err


def test_published_data_need_not_be_there_but_the_batch_must_be_divisible(capsys) -> None:
    start = ["--recipe", "pcontext_encnet_r50_se", "--dry-run", "--crop", "64"]
    assert main([*start, "--batch-size", "10", "--accumulation", "3"]) == 2
    assert "batch_size = 10 cannot be divided evenly" in capsys.readouterr().err
    assert main([*start, "--init-from", "absent.safetensors"]) == 2
    assert "checkpoint absent.safetensors does not exist" in capsys.readouterr().err


def test_the_memory_covers_validation() -> None:
    """Eight windows, where a step has one image and keeps nothing of many classes."""
    options = {"backbone": "demo", "crop": "64", "batch_size": "1", "model": "fcn",
               "se_loss": "none", "lateral": "none"}  # fmt: skip
    config = build("folder_small", options)
    classes = 200
    scores = 8 * classes * 64 * 64 * 4  # and as much for their softmax
    assert peak_memory(config, classes, 1) >= 2 * scores > peak_memory(config, 2, 1)


def test_the_memory_covers_a_moving_average() -> None:
    """As many bytes again as the weights have."""
    options = {"backbone": "demo", "crop": "64", "batch_size": "1"}
    without, with_average = (
        peak_memory(build("folder_small", {**options, "ema": ema}), 3, 1) for ema in ("0", "0.9")
    )
    model = create_model("encnet", 3, backbone="demo", head_channels=128, lateral=True)
    assert with_average - without >= sum(4 * p.numel() for p in model.parameters())
