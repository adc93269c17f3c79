"""CIFAR-10 training: recipes, augmentation, resume, several processes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encnet_triton import evaluate, predict
from encnet_triton.data.cifar10 import Images, load_cifar10
from encnet_triton.data.device_images import DeviceImages
from encnet_triton.inference import ImageClassifier
from encnet_triton.models import CifarNet
from encnet_triton.train import run_state
from encnet_triton.train.__main__ import main
from encnet_triton.train.classification import Classification
from encnet_triton.train.config import ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.optim import rate_at
from encnet_triton.train.recipe import build
from encnet_triton.train.sweeps import plan
from encnet_triton.train.task import initial
from encnet_triton.weights.checkpoint import load_model, read
from tests.support.tolerance import assert_equal_in_float64
from tests.train.launch import IN_FLOAT64, assert_same_state, floating, run, torchrun

SMALL = (
    "--width", "4", "--epochs", "4", "--batch-size", "16", "--device", "cpu", "--lr", "0.05",
    "--amp", "off", "--report", "false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(data: Path, *arguments: str, recipe: str = "cifar10_encnet_16k64d") -> int:
    return main(["--recipe", recipe, "--data", str(data), *SMALL, *arguments])


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("cifar10_resnet_64d", 2_777_482),
        ("cifar10_seresnet_64d", 2_799_938),
        # Without the 6 K smoothing factors, which are drawn and not learnt.
        ("cifar10_encnet_16k64d", 3_513_866 - 96),
        ("cifar10_encnet_32k64d", 4_205_674 - 192),
        ("cifar10_encnet_32k128d", 16_787_466 - 192),
    ],
)
def test_recipes_are_those_of_the_paper(recipe: str, parameters: int, capsys) -> None:
    assert main(["--recipe", recipe, "--dry-run"]) == 0
    # 390 whole batches of 128 in 50,000 images, 600 times.
    said = capsys.readouterr().out
    assert f"{parameters:,} parameters" in said and "234,000 steps" in said
    config = build(recipe, {})
    assert (config.optim.lr, config.optim.weight_decay, config.optim.momentum) == (0.1, 5e-4, 0.9)
    assert config.optim.schedule == "cosine" and config.optim.batch_size == 128


def test_without_scale_regularisation_the_count_is_that_of_table_6(capsys) -> None:
    recipe = ["--recipe", "cifar10_encnet_16k64d", "--shake-scale", "false", "--dry-run"]
    assert main(recipe) == 0
    assert "3,513,866 parameters" in capsys.readouterr().out


def test_cosine_starts_at_the_rate_and_ends_at_zero() -> None:
    config = build("cifar10_resnet_64d", {}).optim
    assert rate_at(0, 100, config) == pytest.approx(0.1)
    assert rate_at(50, 100, config) == pytest.approx(0.05)
    assert rate_at(100, 100, config) == pytest.approx(0, abs=1e-12)


def test_networks_and_data_sets_must_go_together() -> None:
    with pytest.raises(ConfigError, match="dataset = 'scenes' is not allowed"):
        build("cifar10_resnet_64d", {"dataset": "scenes"})
    with pytest.raises(ConfigError, match="dataset = 'cifar10' is not allowed"):
        build("scenes", {"dataset": "cifar10"})


def test_augmented_images_are_cut_from_padded_ones_and_mirrored() -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    split = Images(images, np.arange(6, dtype=np.uint8))
    data = DeviceImages(split, torch.device("cpu"), seed=3)
    draws = torch.tensor([[0, 8, 0], [4, 4, 0], [4, 4, 1], [8, 0, 1]])
    cut = data.cut(torch.tensor([0, 1, 2, 3]), draws).numpy()
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    np.testing.assert_array_equal(cut[0], padded[0, :, 0:32, 8:40])
    np.testing.assert_array_equal(cut[1], images[1])
    np.testing.assert_array_equal(cut[2], images[2, :, :, ::-1])
    np.testing.assert_array_equal(cut[3], padded[3, :, 8:40, 0:32][:, :, ::-1])
    # What a batch holds depends on the epoch and the place alone; an epoch sees every image once.
    first, again = data.epoch(0), DeviceImages(split, torch.device("cpu"), seed=3).epoch(0)
    assert torch.equal(first.batch(2, 5)[0], again.batch(2, 5)[0])
    assert not torch.equal(first.batch(0, 6)[0], data.epoch(1).batch(0, 6)[0])
    assert sorted(first.batch(0, 6)[1].tolist()) == list(range(6))


def test_a_run_learns_and_reports_the_last_epoch(data: Path, capsys) -> None:
    assert train(data, "--width", "16", "--report", "true") == 0
    folder = Path("runs/cifar10_encnet_16k64d")
    assert "Curves" in (folder / "report.html").read_text()
    result = json.loads((folder / "result.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    errors = [r["error"] for r in records if r["kind"] == "val"]
    assert len(errors) == 4 and result["error"] == errors[-1] <= 0.5
    assert result["best_error"] == min(errors)
    assert "chosen on the test set" in capsys.readouterr().out
    model, info = load_model(folder / "best.safetensors")
    assert isinstance(model, CifarNet) and info.classes[0] == "airplane"


@pytest.mark.float32
def test_evaluate_and_predict_take_a_classifier(data: Path, capsys) -> None:
    assert train(data, "--epochs", "1") == 0
    folder = Path("runs/cifar10_encnet_16k64d")
    checkpoint = ["--checkpoint", str(folder / "last.safetensors"), "--device", "cpu"]
    assert evaluate.main([*checkpoint, "--json", "scores.json"]) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert scores["error"] == json.loads((folder / "result.json").read_text())["error"]
    assert scores["images"] == 20 and len(scores["error_by_class"]) == 10
    images = load_cifar10(data, "train")
    for number in range(10):
        picture = Image.fromarray(images.images[number].transpose(1, 2, 0))
        picture.save(f"{number}.png")
    capsys.readouterr()
    assert predict.main([*checkpoint, *(f"{i}.png" for i in range(10))]) == 0
    lines = capsys.readouterr().out.splitlines()
    model, info = load_model(folder / "last.safetensors")
    classifier = ImageClassifier(model, info, torch.device("cpu"))
    assert len(lines) == 10
    # One picture at a time is summed otherwise than ten: where two classes are equal but for that,
    # which is 1e-6 of a probability, either may be named.
    for number, scores in enumerate(classifier(images.images[:10])):
        highest = [info.classes[n] for n in (scores >= scores.max() - 1e-5).nonzero()]
        assert any(lines[number].startswith(f"{number}.png: {name} ") for name in highest)


def test_what_a_classifier_cannot_do_is_one_sentence(data: Path, capsys) -> None:
    Path("here").mkdir()
    (data / "cifar-10-batches-bin").rename("here/cifar-10-batches-bin")
    assert train(Path("here"), "--stop-at", "1") == 0
    checkpoint = ["--checkpoint", "runs/cifar10_encnet_16k64d/last.safetensors", "--device", "cpu"]
    for command, option in (
        (predict, ["0.png", "--multi-scale"]),
        (predict, ["0.png", "--output", "labels"]),
        (evaluate, ["--protocol", "released"]),
        (evaluate, ["--workers", "2"]),
    ):
        assert command.main([*checkpoint, *option]) == 2
        name = next(part for part in option if part.startswith("--"))
        assert f"{name} is for segmentation networks" in capsys.readouterr().err
    assert evaluate.main([*checkpoint, "--dataset", "ade20k"]) == 2
    assert "is a classifier for cifar10" in capsys.readouterr().err
    Path("here").rename("elsewhere")
    assert evaluate.main(checkpoint) == 2
    assert "which is not here: give --data" in capsys.readouterr().err
    assert evaluate.main([*checkpoint, "--data", "elsewhere"]) == 0


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(data: Path) -> None:
    two = ["--epochs", "2", "--name"]
    assert train(data, *two, "whole") == 0
    assert train(data, *two, "parts", "--resume", "--stop-at", "9") == 0
    assert not Path("runs/parts/result.json").exists()
    assert train(data, *two, "parts", "--resume") == 0
    assert_same_state("whole", "parts")


@pytest.mark.usefixtures("float64")
@pytest.mark.verify
def test_two_processes_train_as_one(data: Path) -> None:
    options = ["--recipe", "cifar10_seresnet_64d", "--data", str(data), *SMALL, "--epochs", "1"]
    assert main([*options, "--name", "one"]) == 0
    run([*torchrun(module=IN_FLOAT64), *options, "--name", "two"], Path("log"))
    for kind in ("model.", "momentum."):
        assert_equal_in_float64(floating("two", kind), floating("one", kind))


def test_missing_data_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main(["--recipe", "cifar10_resnet_64d", *SMALL]) == 2
    assert "give its folder with --data" in capsys.readouterr().err


def test_a_sweep_averages_over_seeds_and_draws_the_curves(
    data: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rows = "".join(
        f'[[row]]\nlabel = "{label}"\nrecipe = "cifar10_{recipe}"\nrun = "{label}"\n'
        f"seeds = {seeds}\npaper = [4.93]\nset = {{ width = 16, epochs = 2, batch_size = 16 }}\n"
        for label, recipe, seeds in (("R", "resnet_64d", [0, 1]), ("S", "seresnet_64d", [0]))
    )
    Path("tiny.toml").write_text('title = "T"\n' + rows)
    monkeypatch.setattr(plan, "SWEEPS", Path())
    options = ["--sweep", "tiny", "--data", str(data), "--device", "cpu", "--lr", "0.05"]
    assert main(options) == 0
    folder = Path("runs/tiny")
    lines = json.loads((folder / "tiny.json").read_text())["rows"]
    results = [json.loads((folder / f"R_{s}" / "result.json").read_text()) for s in (0, 1)]
    assert lines[0]["errors"] == [100 * r["error"] for r in results]
    assert lines[0]["parameters"] == sum(p.numel() for p in CifarNet("none", width=16).parameters())
    one, other = lines[0]["errors"]
    assert (
        f"{(one + other) / 2:.2f} ± {abs(one - other) / 2:.2f}" in (folder / "tiny.md").read_text()
    )
    assert lines[1]["runs"] == ["S_0"] and lines[1]["paper"] == [4.93]
    assert Image.open(folder / "tiny.png").size[0] > 300
    assert main([*options, "--seed", "3"]) == 2
    assert "seeds of its own" in capsys.readouterr().err


def test_ranks_that_do_not_see_the_checkpoint_are_named(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Once all ranks started anew, and what had been measured was gone."""
    assert train(data, "--resume", "--stop-at", "6") == 0
    metrics = Path("runs/cifar10_encnet_16k64d/metrics.jsonl")
    before = metrics.read_text()
    monkeypatch.setattr(run_state, "gather", lambda found: [found, False])
    assert train(data, "--resume", "--stop-at", "6") == 2
    assert "ranks [1] do not see runs/cifar10_encnet_16k64d/last" in capsys.readouterr().err
    assert metrics.read_text() == before


def test_ranks_have_the_same_weights_and_draw_other_smoothing_factors() -> None:
    options = {"sync_bn": "false", "width": 8}
    config = build("cifar10_encnet_16k64d", options)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weights, logits = [], []
    for rank in range(2):
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        model = initial(config, world, lambda: CifarNet(**config.model.options()))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        logits.append(model(images))  # in training, where the factors are drawn
    assert torch.equal(*weights)
    assert not torch.equal(*logits)


def test_the_best_checkpoint_is_that_of_the_lowest_error(data: Path, monkeypatch) -> None:
    errors = iter([0.5, 0.3, 0.4, 0.3])
    monkeypatch.setattr(Classification, "validate", lambda *_: next(errors))
    assert train(data) == 0
    folder = Path("runs/cifar10_encnet_16k64d")
    assert read(folder / "best.safetensors")[1]["error"] == 0.3
    assert read(folder / "best.safetensors")[1]["step"] == 2 * 6
    result = json.loads((folder / "result.json").read_text())
    assert (result["error"], result["best_error"], result["best_epoch"]) == (0.3, 0.3, 2)


def test_checkpoints_between_epochs_and_a_loss_that_is_not_finite(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What the trainer does for every task: --save-every, and a skipped step."""
    compute, steps = Classification.compute, itertools.count(1)

    def fails_late(self, network, part):
        loss, wrong = compute(self, network, part)
        return loss * (float("nan") if next(steps) > 2 else 1), wrong

    monkeypatch.setattr(Classification, "compute", fails_late)
    assert train(data, "--save-every", "2", "--epochs", "100") == 2
    said = capsys.readouterr().err
    assert "in 10 steps in a row, the last of them step 12" in said
    assert said.endswith("good state is runs/cifar10_encnet_16k64d/last.safetensors, of step 2\n")
    records = Path("runs/cifar10_encnet_16k64d/metrics.jsonl").read_text().splitlines()
    assert [r["skipped"] for r in map(json.loads, records) if r["kind"] == "train"] == [4]
