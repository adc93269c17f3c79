"""Two processes with half the batch each give the gradients of one process with all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from encnet_triton.scoring.metrics import Scores
from encnet_triton.train import distributed, trainer
from encnet_triton.train.__main__ import main
from encnet_triton.train.segmentation import Segmentation
from tests.support.scores import scores_of
from tests.support.tolerance import assert_alike_in_float32, assert_equal_in_float64
from tests.train import launch

SCRIPT = "tests.train.ddp_gradients"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the gradients of every case, as one process and as two make them."""
    folder = tmp_path_factory.mktemp("gradients")
    for command in ([sys.executable, "-m", SCRIPT], launch.torchrun(module=SCRIPT)):
        launch.run([*command, str(folder)], folder / "log")
    return folder


def gradients(folder: Path, case: str, processes: int) -> dict[str, Tensor]:
    found = load_file(folder / f"{case}, {processes}.safetensors")
    assert len(found) > 30
    return found


@pytest.mark.float32
def test_two_processes_equal_one(folder: Path) -> None:
    exact = gradients(folder, "float64", 1)
    assert_equal_in_float64(gradients(folder, "float64", 2), exact)
    assert_alike_in_float32(gradients(folder, "float32", 2), exact)


@pytest.mark.parametrize("case", ["frozen", "frozen, accumulated"])
def test_accumulation_over_two_processes_equals_one_batch(case: str, folder: Path) -> None:
    """In the third step too: a reducer that lost count would average in the first alone."""
    assert_equal_in_float64(gradients(folder, case, 2), gradients(folder, "frozen", 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_buffers_are_those_of_rank_0(rank: int, folder: Path) -> None:
    found = load_file(folder / f"buffers, {rank} of 2.safetensors")
    assert found["running_mean"].tolist() == [1, 1] and int(found["num_batches_tracked"]) == 3


def test_a_validation_without_synchronised_statistics_is_of_those_that_are_saved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank scores its share of the images, and rank 0 saves."""
    seen: list[object] = []

    def validate(task: Segmentation, *_: Any) -> Scores:
        seen.append(task.evaluated)
        return scores_of(0.5)

    monkeypatch.setattr(Segmentation, "validate", validate)
    monkeypatch.setattr(trainer, "send_buffers", seen.append)
    monkeypatch.setattr(distributed, "start", launch.start_alone)
    monkeypatch.chdir(tmp_path)
    options = ["--sync-bn", "false", "--ema", "0.9", "--pictures", "0", "--epochs", "1"]
    assert main(["--recipe", str(recipe), *options]) == 0
    sent, validated = seen
    assert sent is validated and isinstance(sent, nn.Module)


def test_gradients_are_exchanged_with_the_last_micro_batch_of_a_step_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More exchanges give the same gradients: only this sees them."""
    left_out = []
    no_sync = DistributedDataParallel.no_sync
    monkeypatch.setattr(
        DistributedDataParallel, "no_sync", lambda self: left_out.append(0) or no_sync(self)
    )
    monkeypatch.setattr(distributed, "start", launch.start_alone)
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "2", "--stop-at", "3", "--batch-size", "4", "--accumulation", "2"]
    assert main(["--recipe", str(recipe), *options]) == 0
    assert len(left_out) == 3
