"""The loader's case: both sides make crops of the same kind, and the table compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import loader
from bench.__main__ import main
from encnet_triton.data import create_dataset


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IMAGES": 8, "CROP": 64, "WARM_UP": 0, "MEASURED": 1, "REPEATS": 1}.items():
        monkeypatch.setattr(loader, name, value)


@pytest.mark.usefixtures("small")
def test_the_sequential_side_gives_what_frameworks_train_on(tmp_path: Path) -> None:
    loader.write_folder(tmp_path, loader.IMAGES)
    dataset = create_dataset("folder", "train", tmp_path, ignore_label=11)
    image, label = loader.Sequential(dataset)[3]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image.abs().max() < 4 and image.std() > 0.1
    assert label.shape == (64, 64) and label.dtype == torch.int64
    assert set(label.unique().tolist()) <= {*range(11), 255}


@pytest.mark.usefixtures("small")
def test_the_table_compares_with_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        loader,
        "VARIANTS",
        {name: (make, 0) for name, (make, _) in loader.VARIANTS.items()},
    )
    assert main(["loader"]) == 0
    printed = capsys.readouterr().out
    assert "1.00x" in printed and all(name in printed for name in loader.VARIANTS)
