"""What a segmentation run is built of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from encnet_triton.train import segmentation
from encnet_triton.train.__main__ import main
from encnet_triton.train.class_weights import LIMITS, balanced_weights
from encnet_triton.train.config import ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.recipe import build
from encnet_triton.train.run_folder import finished
from encnet_triton.train.segmentation import Segmentation, make_model
from encnet_triton.train.task import initial


class Labels(list[np.ndarray]):
    """A data set whose labels have so many pixels of each value; its images cannot be decoded."""

    def __init__(self, *rows: dict[int, int]) -> None:
        super().__init__(np.repeat(list(row), list(row.values())) for row in rows)

    def open(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(label=super().__getitem__(index))

    def __getitem__(self, index: int) -> None:  # type: ignore[override]
        raise AssertionError("an image was decoded")


def test_balanced_weights_are_the_median_frequency_over_each() -> None:
    """Frequencies, each over the images that the class is in: 30/40, 10/40 + 30/60, 30/60."""
    found = balanced_weights(Labels({0: 30, 1: 10}, {1: 30, 2: 30}), 4)
    frequency = np.array([30 / 40, 40 / 100, 30 / 60])
    np.testing.assert_allclose(found[:3], 0.5 / frequency, rtol=1e-6)
    assert found[3] == 1  # a class that is nowhere


def test_balanced_weights_stay_within_their_limits() -> None:
    common = balanced_weights(Labels({0: 970, 1: 10, 2: 10, 3: 10}), 4)
    np.testing.assert_allclose(common, [0.2, 1, 1, 1], rtol=1e-6)  # 0.01 / 0.97 is less
    rare = balanced_weights(Labels({0: 330, 1: 330, 2: 339, 3: 1}), 4)
    np.testing.assert_allclose(rare, [1, 1, 330 / 339, 5], rtol=1e-6)  # 330 / 1 is more
    assert LIMITS == (0.2, 5.0)


def test_balanced_weights_leave_ignored_pixels_out() -> None:
    with_ignored = balanced_weights(Labels({0: 30, 1: 10, 255: 500}, {1: 5, 2: 9}), 3)
    without = balanced_weights(Labels({0: 30, 1: 10}, {1: 5, 2: 9}), 3)
    np.testing.assert_array_equal(with_ignored, without)
    with pytest.raises(ConfigError, match="no pixel has a class"):
        balanced_weights(Labels({255: 9}), 3)


@pytest.mark.parametrize(("device", "workers"), [("cuda", 3), ("cpu", 0)])
def test_validation_reads_ahead_where_cores_are_free(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(segmentation, "evaluate", lambda *_, **options: given.update(options))
    world = World(1, 2, 1, 2, torch.device(device))
    config = build("scenes", {"workers": 3})
    task = SimpleNamespace(world=world, config=config, val_set=[], predictor=lambda: None)
    Segmentation.validate(task, iter)
    assert (given["workers"], given["rank"], given["world_size"]) == (workers, 1, 2)


def test_ranks_have_the_same_weights_and_drop_out_other_channels() -> None:
    config = build("scenes", {"sync_bn": "false"})
    weights, draws = [], []
    for rank in range(2):
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        model = initial(config, world, lambda: make_model(config, 5))
        weights.append(next(model.parameters()))
        draws.append(torch.rand(8))
    assert torch.equal(*weights)
    assert not torch.equal(*draws)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_labelled_pixel_ends_before_the_run(
    split: str, recipe: Path, folder_data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(recipe.parent)
    for path in (folder_data / split).glob("*.png"):
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    assert main(["--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert f"{split}_split '{split}': no pixel of" in said and len(said.splitlines()) == 1
    assert [str(path) for path in Path("runs").rglob("*.*")] == ["runs/tiny/result.json"]
    assert split in json.loads(Path("runs/tiny/result.json").read_text())["refused"]
    assert not finished(build(str(recipe), {}))


def test_masks_of_0_and_255_are_noticed_at_the_start(recipe: Path, folder_data: Path) -> None:
    for path in folder_data.rglob("*.png"):
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 2, 255, 0).astype(np.uint8)).save(path)
    (folder_data / "classes.txt").write_text("background\nthing\n")
    world = World(0, 1, 0, 1, torch.device("cpu"))
    said = Segmentation(build(str(recipe), {}), world).warning()
    assert said is not None and said.startswith("Warning: in 8 of 8 labels, 'background' is")
    assert "say --label-map 255=1" in said
    assert Segmentation(build(str(recipe), {"label_map": "255=1"}), world).warning() is None


def test_images_that_are_trained_and_validated_on_are_named(
    recipe: Path, folder_data: Path
) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    assert Segmentation(build(str(recipe), {}), world).warning() is None
    lines = (folder_data / "train.txt").read_text().splitlines()
    with (folder_data / "val.txt").open("a") as file:
        file.write(f"\n{lines[3]}\n")
    said = Segmentation(build(str(recipe), {}), world).warning()
    name = folder_data / lines[3].split()[0]
    assert said == f"Warning: 1 of 4 validation images are trained on: {name}"
