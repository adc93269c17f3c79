"""Names of runs, classes and files are shown as they are, whatever a terminal or plot makes of
brackets, colons and dollars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from encnet_triton.scoring import ConfusionMatrix, score_table
from encnet_triton.train.curves import draw_errors
from encnet_triton.train.log import METRICS, Log

NAMES = ["[bold]sky", "wall [/old]", ":car:"]


def test_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.arange(3), torch.arange(3))
    log = Log(tmp_path, True)
    path = "runs/" + "long [/x] :car: " * 9
    log.console.print(score_table(matrix.scores(), NAMES, path))
    log.say(path)
    said = capsys.readouterr().out
    assert said.count(path) == 2
    for name in NAMES:
        assert name in said


def test_in_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"kind": "train", "train_error": 0.5}, {"kind": "val", "error": 0.4}]
    (tmp_path / METRICS).write_text("\n".join(map(json.dumps, records)))
    assert draw_errors({r"cost $\x$": [tmp_path]}, tmp_path / "curves.png")
