"""Checkpoints are written by a thread: what was copied, one at a time, with its errors."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from encnet_triton.scoring.segmentation import PassOn
from encnet_triton.train.__main__ import main
from encnet_triton.train.config import ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.recipe import build
from encnet_triton.train.saver import Saver
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.train.writer import Writer, copied
from encnet_triton.weights import checkpoint
from encnet_triton.weights.checkpoint import CheckpointError, read


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(recipe: Path, *arguments: str) -> int:
    return main(["--recipe", str(recipe), "--pictures", "0", *arguments])


def test_jobs_wait_for_one_another_and_are_waited_for() -> None:
    said: list[str] = []
    may_end = threading.Event()
    with Writer() as writer:
        writer.start(lambda: said.append(str(may_end.wait(30))))
        threading.Timer(0.05, may_end.set).start()
        writer.start(lambda: said.append("second"))
        assert said[0] == "True"
    assert said == ["True", "second"]


def test_an_error_is_raised_once_where_it_is_looked_for() -> None:
    def fail() -> None:
        raise CheckpointError("the disk is full")

    writer = Writer()
    writer.start(fail)
    writer.wait()
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.start(lambda: None)
    writer.look()
    with pytest.raises(CheckpointError), Writer() as writer:
        writer.start(fail)
    with pytest.raises(KeyError, match="another"), Writer() as writer:
        writer.start(fail)
        raise KeyError("another")


def test_copies_are_contiguous_and_of_now() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    copies, wait = copied({"weight": weight, "count": torch.tensor(3)})
    before = weight.clone()
    weight.zero_()
    wait()
    assert torch.equal(copies["weight"], before) and copies["weight"].is_contiguous()
    assert copies["count"].dtype == torch.int64 and int(copies["count"]) == 3


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_now_and_hold_nothing_up() -> None:
    weight = torch.randn(64, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    busy = torch.randn(4096, 4096, device="cuda")
    before = weight.cpu()
    for _ in range(16):
        busy = (busy @ busy).clamp_(-1, 1)
    copies, wait = copied({"weight": weight})
    weight.zero_()
    end = torch.cuda.Event()
    end.record()
    assert not end.query()  # the device works on, and nothing has waited for it
    wait()
    assert copies["weight"].is_pinned() and torch.equal(copies["weight"], before)


class Slow:
    """`checkpoint.write` that ends when the training has gone on, and says what it wrote."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.files: list[tuple[str, int]] = []
        self.steps = 0
        self._write, compute = checkpoint.write, Segmentation.compute
        self._went_on = threading.Condition()

        def counted(task: Segmentation, *given: Any) -> object:
            with self._went_on:
                self.steps += 1
                self._went_on.notify_all()
            return compute(task, *given)

        patch.setattr(Segmentation, "compute", counted)
        patch.setattr(checkpoint, "write", self.write)

    def write(self, path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        with self._went_on:
            begun = self.steps
            self._went_on.wait_for(lambda: self.steps > begun, timeout=0.1)
        self._write(path, tensors, metadata)
        self.files.append((path.name, metadata.get("step") or metadata["progress"]["step"]))


def test_a_run_goes_on_meanwhile_and_ends_with_the_bits_of_a_quiet_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(recipe, "--name", "quiet", "--val-every", "0") == 0
    with monkeypatch.context() as patch:
        slow = Slow(patch)
        options = ["--name", "slow", "--val-every", "0", "--save-every", "1"]
        assert train(recipe, *options, "--stop-at", "3") == 0
        assert slow.files == [("last.safetensors", step) for step in (1, 2, 3)]
        assert train(recipe, *options, "--resume") == 0
    assert slow.files[3:] == [
        ("last.safetensors", 4), ("best.safetensors", 4), ("last.safetensors", 4),
    ]  # fmt: skip
    quiet, slow_one = (
        read(Path("runs", name, "last.safetensors"))[0] for name in ("quiet", "slow")
    )
    assert quiet.keys() == slow_one.keys()
    for name, tensor in quiet.items():
        assert torch.equal(tensor, slow_one[name]), name


def test_an_error_of_the_thread_ends_the_run_with_its_sentence(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(path: Path, *_: object) -> None:
        raise CheckpointError(f"cannot save {path}: no space left; nothing was written")

    monkeypatch.setattr(checkpoint, "write", full)
    assert train(recipe, "--epochs", "1000", "--val-every", "0") == 2
    said = capsys.readouterr().err
    assert said == (
        "error: cannot save runs/tiny/last.safetensors: no space left; nothing was written\n"
    )
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) <= 4  # the next epoch at most
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]


def saved_steps(*given: str) -> list[int]:
    """Of a run of 4 epochs of 5 steps."""
    options = dict(zip(given[::2], given[1::2], strict=True))
    config = build("scenes", {"epochs": "4", **options})
    task: Any = SimpleNamespace(steps_per_epoch=5)
    saver = Saver(config, World(0, 1, 0, 1, torch.device("cpu")), task, Path(), None)
    return [step for step in range(1, 21) if saver.due(step)]


def test_the_state_is_saved_as_rarely_as_asked() -> None:
    assert saved_steps() == [5, 10, 15, 20]
    assert saved_steps("save_epochs", "3") == [15, 20]
    assert saved_steps("save_epochs", "100") == [20]
    assert saved_steps("save_epochs", "100", "save_every", "8") == [8, 16, 20]
    assert saved_steps("save_epochs", "100", "stop_at", "7") == [7, 20]
    with pytest.raises(ConfigError, match="save_epochs = 0 is not allowed"):
        build("scenes", {"save_epochs": "0"})


def test_an_epoch_left_out_is_saved_when_its_validation_is_stopped(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: Segmentation, watch: PassOn) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not list(watch([0], 1))

    monkeypatch.setattr(Segmentation, "validate", stopped)
    assert train(recipe, "--save-epochs", "2", "--val-every", "1") == 0
    assert read(Path("runs/tiny/last.safetensors"))[1]["progress"]["step"] == 2
