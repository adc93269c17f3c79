"""Whole runs on small data: what they write, how they stop, resume and fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encnet_triton import environment, evaluate, predict
from encnet_triton.models import create_model
from encnet_triton.scoring.metrics import Scores
from encnet_triton.train import run_state
from encnet_triton.train.__main__ import main
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.train.trainer import Trainer
from encnet_triton.weights.checkpoint import read, save_model, write
from tests.support.checkpoints import INFO, OPTIONS
from tests.support.scores import scores_of
from tests.support.tolerance import assert_equal_in_float64
from tests.train import launch
from tests.train.launch import floating


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(recipe: Path, *arguments: str) -> int:
    return main(["--recipe", str(recipe), *arguments])


def records(run: str, kind: str) -> list[dict]:
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_a_run_leaves_what_the_readme_promises(recipe: Path, capsys) -> None:
    assert train(recipe) == 0
    folder = Path("runs/tiny")
    assert {p.name for p in folder.iterdir()} >= {
        "config.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "predictions",
    }  # fmt: skip
    assert len(list((folder / "predictions").glob("*.png"))) == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["optim"]["batch_size"] == 4 and config["model"]["backbone"] == "demo"
    steps = [r["step"] for r in records("tiny", "train")]
    assert steps == [1, 2, 3, 4]
    assert [r["step"] for r in records("tiny", "val")] == [2, 4]
    printed = capsys.readouterr().out
    for word in ("mIoU", "pixAcc", "sky", "ground", "thing", "predictions"):
        assert word in printed


def test_evaluate_and_predict_need_only_the_checkpoint(recipe: Path, folder_data, capsys) -> None:
    assert train(recipe, "--epochs", "1") == 0
    said = records("tiny", "val")[-1]
    best = "runs/tiny/best.safetensors"
    # As in training, so that the same code counts the same pixels.
    device = ["--device", json.loads(Path("runs/tiny/config.json").read_text())["run"]["device"]]
    device += ["--precision", "float32"]
    assert evaluate.main(["--checkpoint", best, *device, "--json", "scores.json"]) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert scores["miou"] == pytest.approx(said["miou"], abs=1e-12)
    photo = str(folder_data / "val" / "0.jpg")
    assert predict.main(["--checkpoint", best, photo, "--output", "out"]) == 0
    with Image.open("out/0_label.png") as label:
        assert label.mode == "P" and label.size == (64, 64)
        assert set(np.unique(np.asarray(label))) <= {0, 1, 2}
        assert len(label.getpalette()) >= 9
    assert Path("out/0_overlay.png").exists()
    assert "0.jpg: " in capsys.readouterr().out


def test_resumed_weights_are_bit_identical(recipe: Path) -> None:
    assert train(recipe, "--name", "whole") == 0
    assert train(recipe, "--name", "halves", "--stop-at", "3") == 0
    assert read(Path("runs/halves/last.safetensors"))[1]["progress"]["step"] == 3
    assert train(recipe, "--name", "halves", "--resume") == 0
    whole, _ = read(Path("runs/whole/last.safetensors"))
    halves, _ = read(Path("runs/halves/last.safetensors"))
    assert whole.keys() == halves.keys()
    assert any(name.startswith("momentum.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name
    assert [r["step"] for r in records("halves", "train")] == [1, 2, 3, 4]


TODAY = (
    "--optimizer", "adamw", "--lr", "0.001", "--layer-decay", "0.8", "--clip-norm", "0.5",
    "--ema", "0.9", "--jitter", "0.3", "--hue", "0.1", "--ohem", "0.7", "--dice-weight", "0.5",
)  # fmt: skip


def test_a_run_as_is_usual_today_resumes_to_the_same_bits(recipe: Path) -> None:
    assert train(recipe, *TODAY, "--name", "whole") == 0
    assert train(recipe, *TODAY, "--name", "halves", "--stop-at", "3") == 0
    assert train(recipe, *TODAY, "--name", "halves", "--resume") == 0
    whole, halves = (
        read(Path("runs", name, "last.safetensors"))[0] for name in ("whole", "halves")
    )
    kinds = {name.split(".")[0] for name in whole}
    assert kinds == {"model", "average", "exp_avg", "exp_avg_sq", "step", "random"}
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name
    assert all(int(t) == 4 for name, t in whole.items() if name.startswith("step."))
    # What was validated is the average, which is a checkpoint like any other.
    average, metadata = read(Path("runs/whole/average.safetensors"))
    assert metadata["step"] == 4
    for name, tensor in average.items():
        assert torch.equal(tensor, whole[name.replace("model.", "average.", 1)]), name
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in average.items())
    score = records("whole", "val")[-1]["miou"]
    arguments = ["--checkpoint", "runs/whole/average.safetensors", "--json", "score.json"]
    assert evaluate.main([*arguments, "--precision", "float32"]) == 0
    assert json.loads(Path("score.json").read_text())["miou"] == pytest.approx(score, abs=1e-6)


def test_a_state_with_gaps_is_refused(recipe: Path, capsys) -> None:
    assert train(recipe, "--optimizer", "adamw", "--name", "run", "--stop-at", "1") == 0
    path = Path("runs/run/last.safetensors")
    tensors, metadata = read(path)
    gone = next(name for name in tensors if name.startswith("exp_avg_sq."))
    count = gone.replace("exp_avg_sq", "step")
    for damaged, words in (
        ({name: t for name, t in tensors.items() if name != gone}, "the optimizer's state of"),
        ({**tensors, count: torch.tensor(-1.0)}, f"{count} has a negative value"),
    ):
        write(path, damaged, metadata)
        assert train(recipe, "--optimizer", "adamw", "--name", "run", "--resume") == 2
        assert words in capsys.readouterr().err


@pytest.mark.usefixtures("float64")
def test_accumulation_gives_the_gradient_of_the_whole_batch(recipe: Path) -> None:
    """Batch statistics differ by micro-batch, so frozen differences would show; the loss's
    denominators do not: with one image repeated the gradients agree."""
    arguments = ("--stop-at", "1", "--dropout", "0", "--weight-decay", "0", "--scale", "1,1",
                 "--rotation", "0", "--flip", "0", "--crop", "64")  # fmt: skip
    data = recipe.parent / "data"
    (data / "train.txt").write_text("train/3.jpg train/3.png\n" * 4)
    assert train(recipe, "--name", "one", *arguments) == 0
    assert train(recipe, "--name", "two", "--accumulation", "2", *arguments) == 0
    assert_equal_in_float64(floating("two", "momentum."), floating("one", "momentum."))


@pytest.mark.verify  # test_compile.py has two processes, compiled, against one that is not
@pytest.mark.usefixtures("float64")
def test_two_processes_equal_one(recipe: Path) -> None:
    """Ignored areas differ from image to image, so a mean of per-process means would not pass."""
    arguments = ["--stop-at", "1", "--dropout", "0", "--weight-decay", "0"]
    assert train(recipe, "--name", "one", *arguments) == 0
    two = ["--recipe", str(recipe), "--name", "two", *arguments]
    launch.run([*launch.torchrun(module=launch.IN_FLOAT64), *two], Path("two.log"))
    for kind in ("model.", "momentum."):
        assert_equal_in_float64(floating("two", kind), floating("one", kind))
    (one,), (two,) = records("one", "train"), records("two", "train")
    for name in ("loss", "segmentation", "se"):
        assert one[name] == pytest.approx(two[name], rel=1e-12) != 0


def test_the_best_checkpoint_is_that_of_the_highest_score(recipe: Path, monkeypatch) -> None:
    scores = iter([0.2, 0.4, 0.3, 0.4])

    def validate(*_: object) -> Scores:
        return scores_of(next(scores))

    monkeypatch.setattr(Segmentation, "validate", validate)
    assert train(recipe, "--epochs", "4", "--pictures", "0") == 0
    _, about = read(Path("runs/tiny/best.safetensors"))
    assert (about["miou"], about["step"]) == (0.4, 4)
    progress = read(Path("runs/tiny/last.safetensors"))[1]["progress"]
    assert (progress["best_miou"], progress["best_step"]) == (0.4, 4)


def test_an_existing_run_and_changed_fields_are_refused(recipe: Path, capsys) -> None:
    assert train(recipe, "--stop-at", "1") == 0
    assert train(recipe) == 2
    assert "runs/tiny exists; add --resume to continue, or give" in capsys.readouterr().err
    assert train(recipe, "--resume", "--lr", "0.5") == 2
    said = capsys.readouterr().err
    assert "cannot resume runs/tiny/last.safetensors: lr was 0.02 and is now 0.5" in said
    assert json.loads(Path("runs/tiny/config.json").read_text())["optim"]["lr"] == 0.02


def test_weights_without_a_configuration_are_a_run_too(recipe: Path, capsys) -> None:
    assert train(recipe, "--stop-at", "1") == 0
    Path("runs/tiny/config.json").unlink()
    assert train(recipe) == 2
    assert "runs/tiny exists; add --resume to continue, or give" in capsys.readouterr().err


def test_sigterm_saves_and_ends_well(recipe: Path) -> None:
    command = [sys.executable, "-m", "encnet_triton.train", "--recipe", str(recipe),
               "--epochs", "100000", "--val-every", "0", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = Path("runs/tiny/metrics.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"train"') >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "continue with --resume" in output
    step = read(Path("runs/tiny/last.safetensors"))[1]["progress"]["step"]
    assert step >= 2


@pytest.mark.parametrize("at", [2, 4])
def test_a_stop_at_the_end_of_an_epoch_leaves_no_score_out(
    at: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two epochs, each of two steps: after the first, and in the last step of all."""
    step = Trainer._step

    def stopped(self: Trainer, given: object) -> bool:
        return step(self, given) or self.progress.step == at

    monkeypatch.setattr(Trainer, "_step", stopped)
    assert train(recipe) == 0
    assert [r["step"] for r in records("tiny", "val")] == ([2, 4] if at == 4 else [])
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    assert train(recipe, "--resume") == 0
    vals = records("tiny", "val")
    assert [r["step"] for r in vals] == [2, 4]
    assert json.loads(Path("runs/tiny/result.json").read_text())["miou"] == vals[-1]["miou"]


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (2, [4, 6])])
def test_validations_are_every_so_many_epochs_and_after_the_last(
    every: int, steps: list[int], recipe: Path
) -> None:
    options = ("--epochs", "3", "--val-every", str(every), "--pictures", "0")
    assert train(recipe, *options) == 0
    assert [r["step"] for r in records("tiny", "val")] == steps


def test_a_loss_that_is_not_finite_skips_the_step(recipe, monkeypatch, capsys) -> None:
    """Weights and running statistics stay as they were; ten such steps stop the run."""
    before: dict[str, torch.Tensor] = {}
    compute = Segmentation.compute

    def poisoned(self, network, part):
        if not before:
            before.update({k: v.clone() for k, v in self.model.state_dict().items()})
        terms = compute(self, network, part)
        return terms._replace(total=terms.total * float("nan"))

    monkeypatch.setattr(Segmentation, "compute", poisoned)
    assert train(recipe, "--stop-at", "2", "--name", "two") == 0
    assert read(Path("runs/two/last.safetensors"))[1]["progress"]["skipped"] == 2
    after, _ = read(Path("runs/two/last.safetensors"), "model.")
    for name, tensor in before.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after["model." + name], tensor), name
    capsys.readouterr()
    assert train(recipe, "--epochs", "10", "--val-every", "0") == 2
    said = capsys.readouterr().err
    assert "the loss was not finite in 10 steps in a row" in said
    assert ".jpg" in said
    assert said.endswith("nothing was saved yet\n")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--init-from", "fcn.safetensors", "--new-head"], "another kind: fcn, not encnet"),
        (["--init-from", "."], ". holds no model: config.json is not there"),
        (["--runs", "fcn.safetensors"], "the run's folder fcn.safetensors/x cannot be made (Not a"),
        (["--name", "x" * 300], "(File name too long)"),
        (["--recipe", "none.toml"], "recipe none.toml does not exist"),
        (["--recipe", "folder.toml"], "recipe folder.toml is not a file"),
        (["--pretrained", "folder.pth"], "folder.pth is not a file"),
        (["--pretrained", "fcn.safetensors"], "holds a whole network"),
    ],
)
def test_files_of_another_kind_are_named(
    options: list[str], sentence: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(Path("fcn.safetensors"), create_model(**OPTIONS), INFO)
    for name in ("folder.toml", "folder.pth"):
        Path(name).mkdir()
    assert train(recipe, "--name", "x", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1


def test_new_head_takes_another_number_of_classes(recipe: Path, folder_data, capsys) -> None:
    assert train(recipe, "--stop-at", "2") == 0
    (folder_data / "classes.txt").write_text("sky\nground\nthing\nnever\n")
    start = ["--init-from", "runs/tiny/last.safetensors", "--stop-at", "1", "--name"]
    assert train(recipe, *start, "refused") == 2
    assert (
        "was trained for 3 classes, this data set has 4; add --new-head" in capsys.readouterr().err
    )
    assert train(recipe, *start, "taken", "--new-head", "--lr", "1e-12") == 0
    old, _ = read(Path("runs/tiny/last.safetensors"), "model.backbone.conv1.weight")
    new, _ = read(Path("runs/taken/last.safetensors"), "model.backbone.conv1.weight")
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-5, atol=1e-8)


def test_new_head_is_only_what_depends_on_the_number_of_classes(tmp_path: Path) -> None:
    """With 16 classes not the 16 codewords, nor the trunk's layers of 16 channels."""
    options = {"backbone": "small", "head_channels": 32, "num_codewords": 16, "lateral": True}
    theirs, ours = (create_model("encnet", 16, **options) for _ in range(2))
    names, colours = [f"class {i}" for i in range(16)], [[i] * 3 for i in range(16)]
    info = replace(INFO, options=theirs.options, classes=names, palette=colours)
    save_model(tmp_path / "theirs.safetensors", theirs, info)
    kept = run_state.initialise(tmp_path / "theirs.safetensors", ours, 16, new_head=True)
    layers = {"head.classifier", "head.context.presence", "stage3.presence"}
    assert {name.rpartition(".")[0] for name in kept} == layers
    given = theirs.state_dict()
    assert all(n in kept or torch.equal(t, given[n]) for n, t in ours.state_dict().items())


def test_a_run_resumes_without_what_it_started_from_and_wherever_its_folders_are(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(recipe, "--name", "a", "--stop-at", "1") == 0
    start = str(Path("runs/a/last.safetensors"))
    assert train(recipe, "--name", "b", "--init-from", start, "--stop-at", "1") == 0
    Path(start).unlink()
    Path("runs").rename("moved")
    data = json.loads(Path("moved/b/config.json").read_text())["data"]["data"]
    monkeypatch.chdir(data)
    again = ["--runs", str(tmp_path / "moved"), "--init-from", str(tmp_path / start), "--data", "."]
    assert train(recipe, "--name", "b", *again, "--stop-at", "2", "--resume") == 0
    monkeypatch.chdir(tmp_path / "moved")
    assert train(recipe, "--name", "b", *again[:2], "--data", data, "--resume",
                 "--init-from", "../c/last.safetensors") == 2  # fmt: skip


def test_mistakes_are_one_sentence(recipe: Path, folder_data: Path, capsys) -> None:
    for arguments, sentence in (
        (["--recipe", "nothing"], "unknown recipe 'nothing'"),
        (["--recipe", str(recipe), "--batch-size", "64"], "64"),
        (["--recipe", str(recipe), "--batch-size", "3", "--accumulation", "2"], "3"),
        (["--recipe", str(recipe), "--data", "missing-folder"], "missing-folder"),
        (["--recipe", str(recipe), "--dataset", "ade"], "ade"),
        (["--recipe", str(recipe), "--backbone", "resnet5"], "resnet5"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said
        assert len(said.strip().splitlines()) == 1
    (folder_data / "train" / "2.png").unlink()
    assert train(recipe) == 2
    assert "2.png" in capsys.readouterr().err


def test_checkpoint_for_another_class_count_is_refused(recipe, folder_data, capsys) -> None:
    assert train(recipe, "--epochs", "1") == 0
    (folder_data / "classes.txt").write_text("sky\nground\nthing\nnever\n")
    assert evaluate.main(["--checkpoint", "runs/tiny/best.safetensors"]) == 2
    assert "was trained for 3 classes" in capsys.readouterr().err


def test_environment_report_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    environment.main()
    said = capsys.readouterr().out
    assert f"torch:           {torch.__version__.split('+')[0]}" in said
    assert "kernels:" in said
