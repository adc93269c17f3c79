"""Records that go to TensorBoard and to Weights & Biases, by stand-ins of these packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from encnet_triton.train.__main__ import main
from encnet_triton.train.loggers import scalars


class Writer:
    """A stand-in of SummaryWriter."""

    made: list[Writer] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.written: dict[tuple[str, int], float] = {}
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int, walltime: float) -> None:
        assert not self.closed and walltime > 1e9
        self.written[name, step] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Run:
    """A stand-in of a run of wandb."""

    made: list[Run] = []

    def __init__(self, **given: Any) -> None:
        self.id, self.given, self.logged, self.finished = "abc", given, [], False
        self.made.append(self)

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(Run, "made", [])
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    stand_in: Any = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    wandb: Any = SimpleNamespace(init=Run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def expected() -> dict[tuple[str, int], float]:
    """All numbers of ``metrics.jsonl``."""
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    return {
        (name, record["step"]): value
        for record in map(json.loads, lines)
        for name, value in scalars(record, record["kind"])
    }


def test_names_are_those_of_the_records() -> None:
    record = {"step": 3, "time": 2.5, "loss": 1, "none": None, "iou": {"sky": 0.5, "sea": None}}
    assert dict(scalars(record, "val")) == {"val/loss": 1.0, "val/iou/sky": 0.5}


def test_tensorboard_gets_every_number_and_a_resumed_run_replaces_what_it_repeats(
    recipe: Path,
) -> None:
    arguments = ["--recipe", str(recipe), "--logger", "tensorboard", "--pictures", "0"]
    assert main([*arguments, "--stop-at", "2"]) == 0
    assert main([*arguments, "--resume"]) == 0
    first, second = Writer.made
    assert first.closed and second.closed and second.folder == "runs/tiny/tensorboard"
    assert (first.purge_step, second.purge_step) == (None, 3)
    assert first.written | second.written == expected()
    assert ("train/loss", 4) in second.written and ("val/iou/sky", 4) in second.written


def test_wandb_gets_every_number_and_a_resumed_run_its_id(recipe: Path) -> None:
    arguments = ["--recipe", str(recipe), "--logger", "wandb", "--pictures", "0"]
    assert main([*arguments, "--stop-at", "2"]) == 0
    assert main([*arguments, "--resume"]) == 0
    assert [run.given["id"] for run in Run.made] == [None, "abc"]
    assert all(run.finished and run.given["config"]["optim"]["lr"] for run in Run.made)
    logged = {
        (name, int(values["step"])): value
        for run in Run.made
        for values in run.logged
        for name, value in values.items()
        if name != "step"
    }
    assert logged == expected()


def test_a_missing_package_is_one_sentence(recipe: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["--recipe", str(recipe), "--logger", "wandb"]) == 2
    assert "pip install 'encnet-triton[wandb]'" in capsys.readouterr().err
    assert not Path("runs").exists()
