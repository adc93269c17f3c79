"""The loader's case: both sides make crops of the same kind, and the table compares them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import cases, loader
from bench.__main__ import main


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IMAGES": 8, "CROP": 64, "WARM_UP": 0, "MEASURED": 1, "REPEATS": 1}.items():
        monkeypatch.setattr(loader, name, value)


@pytest.mark.usefixtures("small")
def test_the_sequential_side_gives_what_frameworks_train_on(tmp_path: Path) -> None:
    loader.write_folder(tmp_path, loader.IMAGES)
    image, label = loader.Sequential(cases.folder(tmp_path))[3]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image.abs().max() < 4 and image.std() > 0.1
    assert label.shape == (64, 64) and label.dtype == torch.int64
    assert set(label.unique().tolist()) <= {*range(11), 255}


@pytest.mark.parametrize(("classes", "value"), [(2, 255), (11, 11), (21, 20)])
def test_a_folder_needs_no_option_for_its_labels(tmp_path: Path, classes: int, value: int) -> None:
    """255 is no class by default, 11 in CamVid, from which the measured images come."""
    label = Image.fromarray(np.array([[0, 1, value]], np.uint8))
    label.save(tmp_path / "a.png")
    label.convert("RGB").save(tmp_path / "a.jpg")
    (tmp_path / "train.txt").write_text("a.jpg a.png\n")
    (tmp_path / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    wanted = [0, 1, value if value < classes else 255]
    assert cases.folder(tmp_path)[0].label.ravel().tolist() == wanted


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
