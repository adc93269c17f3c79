"""Archives for test servers have the layout, the sizes and the values that the servers ask for."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import ade20k, default_palette, voc
from encnet_triton.models import create_model
from encnet_triton.submit import main
from encnet_triton.weights.checkpoint import ModelInfo, save_model
from tests.support.ranks import exit_statuses


def save_images(folder: Path, *stems: str) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number, stem in enumerate(stems):
        pixels = rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.jpg")


def save_checkpoint(path: Path, classes: tuple[str, ...], dataset: str) -> None:
    model = create_model("fcn", len(classes), backbone="demo", head_channels=8)
    info = ModelInfo(
        options=model.options, classes=list(classes),
        palette=default_palette(len(classes)).tolist(), mean=[0.5] * 3, std=[0.25] * 3,
        crop=[32, 32], data={"name": dataset, "root": None, "split": "val", "options": {}},
    )  # fmt: skip
    save_model(path, model, info)


def read(path: Path) -> dict[str, Image.Image]:
    with zipfile.ZipFile(path) as archive:
        return {name: Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()}


def test_voc_archive(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    save_images(root / "JPEGImages", "2008_000006", "2008_000011")
    (root / voc.LISTS).mkdir(parents=True)
    (root / voc.LISTS / "test.txt").write_text("2008_000006\n2008_000011\n")
    save_checkpoint(tmp_path / "m.safetensors", voc.CLASSES, "voc")
    output = tmp_path / "voc.zip"
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(root)]
    assert main([*arguments, "--output", str(output), "--competition", "comp5"]) == 0
    found = read(output)
    folder = "results/VOC2012/Segmentation/comp5_test_cls"
    assert sorted(found) == [f"{folder}/2008_000006.png", f"{folder}/2008_000011.png"]
    second = found[f"{folder}/2008_000011.png"]
    assert second.mode == "P" and second.size == (50, 41)
    assert np.asarray(second).max() <= 20
    assert second.getpalette()[3:6] == [128, 0, 0]


def test_two_processes_write_the_archive_of_one(tmp_path: Path) -> None:
    stems = [f"ADE_test_{i:08d}" for i in range(19)]
    save_images(tmp_path / "release_test" / "testing", *stems)
    save_checkpoint(tmp_path / "m.safetensors", ade20k.CLASSES, "ade20k")
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
    assert main([*arguments, "--output", str(tmp_path / "one.zip")]) == 0
    assert exit_statuses(main, [*arguments, "--output", str(tmp_path / "two.zip")], 2) == [0, 0]
    with zipfile.ZipFile(tmp_path / "one.zip") as one, zipfile.ZipFile(tmp_path / "two.zip") as two:
        assert one.namelist() == two.namelist() == [f"{stem}.png" for stem in stems]
        assert all(one.read(name) == two.read(name) for name in one.namelist())


def test_a_process_that_fails_ends_with_its_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And so does the other, for which torchrun need not come."""
    save_images(tmp_path / "release_test" / "testing", "ADE_test_00000001", "ADE_test_00000002")
    (tmp_path / "release_test" / "testing" / "ADE_test_00000001.jpg").write_bytes(b"no image")
    save_checkpoint(tmp_path / "m.safetensors", ade20k.CLASSES, "ade20k")
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
    arguments += ["--workers", "0"]  # a reader outlives its process by seconds, and is waited for
    statuses = exit_statuses(main, [*arguments, "--output", str(tmp_path / "two.zip")], 2)
    assert statuses == [2, 2]
    said = capfd.readouterr().err
    assert "[rank 0] error: image " in said and "[rank 1] error: another process is gone" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.zip*"))


def test_ade20k_archive_has_values_from_1(tmp_path: Path) -> None:
    save_images(tmp_path / "release_test" / "testing", "ADE_test_00000001")
    save_checkpoint(tmp_path / "m.safetensors", ade20k.CLASSES, "ade20k")
    output = tmp_path / "ade.zip"
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
    assert main([*arguments, "--output", str(output), "--flip"]) == 0
    found = read(output)
    assert list(found) == ["ADE_test_00000001.png"]
    picture = found["ADE_test_00000001.png"]
    assert picture.mode == "L" and picture.size == (50, 40)
    assert np.asarray(picture).min() >= 1 and np.asarray(picture).max() <= 150


def test_nothing_is_left_of_a_failed_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "release_test" / "testing", "ADE_test_00000001", "ADE_test_00000002")
    (tmp_path / "release_test" / "testing" / "ADE_test_00000002.jpg").write_bytes(b"no image")
    save_checkpoint(tmp_path / "m.safetensors", ade20k.CLASSES, "ade20k")
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
    assert main([*arguments, "--output", str(tmp_path / "ade.zip")]) == 2
    assert "ADE_test_00000002.jpg is not an image" in capsys.readouterr().err
    assert not list(tmp_path.glob("*ade.zip*"))


def test_a_network_for_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "m.safetensors", ("a", "b"), "folder")
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), "--dataset", "voc"]
    assert main([*arguments, "--data", str(tmp_path)]) == 2
    assert "has 2 classes, but voc has 21" in capsys.readouterr().err
