"""Recipes that build on others, recipes of several stages, dry runs, and sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError
from encnet_triton.train.recipe import build, build_stages
from encnet_triton.train.segmentation import make_augment
from encnet_triton.train.sweeps import plan
from encnet_triton.weights.checkpoint import read

STAGES = """
[[stage]]
stage_name = "first"

[[stage]]
stage_name = "second"
lr = 0.0001
epochs = 1
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def staged(recipe: Path) -> Path:
    path = recipe.with_name("staged.toml")
    path.write_text(recipe.read_text() + STAGES)
    return path


def test_recipes_of_the_paper_have_its_numbers() -> None:
    context = build("pcontext_encnet_r50_se", {})
    assert (context.optim.lr, context.optim.epochs, context.optim.power) == (0.001, 50, 0.9)
    assert (context.data.crop, context.data.base_size) == ((480, 480), 520)
    assert (context.optim.batch_size, context.optim.se_weight) == (16, 0.2)
    assert context.model.form == "paper" and context.optim.head_lr_scale == 1
    ade = build("ade20k_encnet_r101", {})
    assert (ade.optim.lr, ade.optim.epochs) == (0.01, 120)
    released = build("ade20k_encnet_r101_released", {})
    assert (released.data.base_size, released.data.crop) == (640, (576, 576))
    assert released.optim.head_lr_scale == 10 and released.data.scale_by == "long"
    assert released.data.rotation == 0 and released.data.outside == "black"
    dataset: Any = SimpleNamespace(ignore_index=255, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    augment = make_augment(released, dataset)
    assert augment.fill == (0, 0, 0) and augment.top_left
    augment = make_augment(build("ade20k_encnet_r101", {}), dataset)
    assert augment.fill == (128, 128, 128) and not augment.top_left


def test_voc_with_coco_is_three_runs_each_from_the_one_before() -> None:
    folders = "coco_voc=/data/coco,voc=/data/VOC2012"
    coco, aug, voc = build_stages("voc_encnet_r101_coco", {"data": folders})
    assert [c.data.dataset for c in (coco, aug, voc)] == ["coco_voc", "voc_aug", "voc"]
    assert [c.data.train_split for c in (coco, aug, voc)] == ["train", "trainval", "train"]
    assert [c.optim.lr for c in (coco, aug, voc)] == [0.01, 0.001, 0.001]
    # 92,000 images that the paper's rule leaves, for as many steps as 30 epochs of its 6,500.
    steps = 92_000 * coco.optim.epochs / coco.optim.batch_size
    assert steps == pytest.approx(6_500 * 30 / 16, rel=0.1)
    assert [c.data.data for c in (coco, aug, voc)] == ["/data/coco"] + 2 * ["/data/VOC2012"]
    assert coco.run.init_from is None
    assert aug.run.init_from == "runs/voc_encnet_r101_coco/1_coco/last.safetensors"
    assert voc.run.init_from == "runs/voc_encnet_r101_coco/2_aug/last.safetensors"
    with pytest.raises(ConfigError, match="must be one with a folder for coco_voc"):
        build_stages("voc_encnet_r101_coco", {"data": "voc=/data/VOC2012"})


def test_other_classes_are_those_of_the_first_stage_alone(recipe: Path) -> None:
    given = {"data": "coco_voc=/data/coco,voc=/data/VOC2012", "init_from": "x", "new_head": "true"}
    stages = build_stages("voc_encnet_r101_coco", given)
    assert [config.run.new_head for config in stages] == [True, False, False]
    assert stages[0].run.init_from == "x" != stages[1].run.init_from
    path = recipe.with_name("two.toml")
    path.write_text(recipe.read_text() + STAGES + "new_head = true\n")
    assert [config.run.new_head for config in build_stages(str(path), {})] == [False, True]


def test_stages_follow_each_other_and_resume_where_they_stopped(staged: Path, capsys) -> None:
    command = ["--recipe", str(staged), "--resume"]
    assert main([*command, "--stop-at", "1"]) == 0
    assert not Path("runs/staged/2_second/last.safetensors").exists()
    assert main(command) == 0
    for stage in ("1_first", "2_second"):
        assert json.loads(Path("runs/staged", stage, "result.json").read_text())["miou"] >= 0
    first, _ = read(Path("runs/staged/1_first/last.safetensors"), "model.")
    second, _ = read(Path("runs/staged/2_second/last.safetensors"), "model.")
    # A tiny rate from the weights before: close, and not equal.
    name = "model.head.classifier.weight"
    assert torch.allclose(first[name], second[name], atol=1e-2)
    assert not torch.equal(first[name], second[name])
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    Path("runs").rename("moved")
    assert main([*command, "--runs", "moved"]) == 0
    assert capsys.readouterr().out.count("complete already") == 2
    Path("moved").rename("runs")
    assert main(["--recipe", str(staged)]) == 2
    assert "exists; add --resume" in capsys.readouterr().err
    assert main([*command, "--lr", "0.5"]) == 2
    assert "is complete, but with lr = " in capsys.readouterr().err


def test_dry_run_needs_no_data_and_leaves_nothing(capsys) -> None:
    assert main(["--recipe", "pcontext_encnet_r50_se", "--dry-run"]) == 0
    said = capsys.readouterr().out
    # 4,998 images in batches of 16, the last one discarded, 50 times.
    assert "59 classes" in said and "15,600 steps" in said and "predicted, not measured" in said
    assert not Path("runs").exists()


def test_a_sweep_measures_what_its_runs_validate() -> None:
    for ema, name in (("0", "last.safetensors"), ("0.99", "average.safetensors")):
        assert {one.checkpoint.name for one in plan.configurations("table1", {"ema": ema})} == {
            name
        }


@pytest.mark.parametrize("name", plan.sweep_names())
def test_every_sweep_is_valid(name: str) -> None:
    planned = plan.configurations(name, {})
    assert all(one.configs for one in planned)
    runs: dict[str, object] = {}
    for one in planned:  # rows that share a run are one training
        now = [config.fingerprint() for config in one.configs]
        assert runs.setdefault(one.row.run, now) == now
    grid = plan.read_sweep(name).grid
    assert grid is None or set(grid) <= set(runs)


def test_a_sweep_trains_each_run_once_and_writes_its_table(
    recipe: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rows = [("a", 0.1, False), ("b", 0.2, False), ("b", 0.2, True)]
    text = 'title = "T"\ngrid = ["a", "b"]\n' + "".join(
        f'[[row]]\nlabel = "{run} {multi}"\nrecipe = "{recipe}"\nrun = "{run}"\n'
        "paper = [50, 25.5]\n"
        f"set = {{ se_weight = {weight}, epochs = 1 }}\nmulti_scale = {str(multi).lower()}\n"
        f'curve = "alpha"\nx = {weight}\n'
        for run, weight, multi in rows
    )
    Path("sweeps").mkdir()
    Path("sweeps/tiny_sweep.toml").write_text(text)
    monkeypatch.setattr(plan, "SWEEPS", Path("sweeps"))
    assert main(["--sweep", "tiny_sweep"]) == 0
    folder = Path("runs/tiny_sweep")
    table = (folder / "tiny_sweep.md").read_text()
    assert table.count("50 / 25.5") == 3
    document = json.loads((folder / "tiny_sweep.json").read_text())
    single, multi = document["rows"][1:]
    validated = json.loads((folder / "b" / "result.json").read_text())
    assert single["miou"] == pytest.approx(100 * validated["miou"])
    assert (folder / "b" / "multi_scale.json").is_file() and multi["run"] == "b"
    for picture in ("tiny_sweep.png", "tiny_sweep_grid.png"):
        assert Image.open(folder / picture).size[0] > 300
    before = (folder / "a" / "last.safetensors").stat().st_mtime_ns
    assert main(["--sweep", "tiny_sweep"]) == 0
    assert (folder / "a" / "last.safetensors").stat().st_mtime_ns == before
