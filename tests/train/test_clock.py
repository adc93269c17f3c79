"""Images per second, the time left and the seconds of validation exclude compile time."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from encnet_triton.nn import LossTerms
from encnet_triton.train import trainer
from encnet_triton.train.__main__ import main
from encnet_triton.train.log import Log
from encnet_triton.train.meter import Meter
from encnet_triton.train.segmentation import Segmentation


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(time, "perf_counter", lambda: self.now)


def step(meter: Meter, clock: Clock, seconds: float, wait: float = 0.0) -> None:
    with meter.waiting():
        clock.now += wait
    clock.now += seconds - wait
    meter.add(LossTerms(*(torch.tensor(1.0) for _ in LossTerms._fields)))
    meter.count(8)


def test_the_first_step_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(torch.device("cpu"), Segmentation.terms)
    step(meter, clock, 60.0, wait=10.0)
    assert meter.summary(1)["images_per_second"] is None
    for _ in range(4):
        step(meter, clock, 2.0, wait=0.5)
    found = meter.summary(1)
    assert found["images_per_second"] == pytest.approx(4.0)
    assert found["data_wait"] == pytest.approx(0.25)
    assert found["loss"] == pytest.approx(1.0)  # of all five steps


def test_the_time_left_follows_the_measured_rate(tmp_path: Path) -> None:
    """Of a live line too, where an estimate from elapsed time would count compilation."""
    screen = io.StringIO()
    log = Log(tmp_path, True, Console(file=screen, force_terminal=True, width=200))
    record = {"step": 1, "loss": 1.0, "segmentation": 1.0, "se": 0.0, "aux": 0.0, "lr": 0.1,
              "images_per_second": None, "data_wait": 0.0, "skipped": 0}  # fmt: skip
    log.begin(100, 0)
    log.train(record, 100, None)
    log.advance(1)
    log._progress.refresh()
    assert "ETA" not in screen.getvalue() and "img/s" not in screen.getvalue()
    log.train({**record, "step": 2, "images_per_second": 4.0}, 100, 3723.0)
    log._progress.refresh()
    log.end()
    assert "4.0 img/s" in screen.getvalue() and "ETA 1:02:03" in screen.getvalue()


def test_validation_compiles_before_its_clock_starts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two validations, the first of which finds the network not yet compiled for evaluation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(trainer, "compile_obstacle", lambda device: None)
    real, warm_up, warmed = time.perf_counter, Segmentation.warm_up, []
    monkeypatch.setattr(time, "perf_counter", lambda: real() + 1000 * len(warmed))

    def slow(*arguments: object) -> None:
        warm_up(*arguments)
        warmed.append(None)

    monkeypatch.setattr(Segmentation, "warm_up", slow)
    assert main(["--recipe", str(recipe), "--compile", "--pictures", "0"]) == 0
    assert len(warmed) == 1
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    seconds = [r["seconds"] for r in map(json.loads, lines) if r["kind"] == "val"]
    assert len(seconds) == 2 and max(seconds) < 500
    rates = [r["images_per_second"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert rates[0] is None and min(rates[1:]) > 4 / 500
