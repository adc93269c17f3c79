"""What a run that ends early keeps: the state is saved before anything that takes long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encnet_triton.data import DataError
from encnet_triton.inference import Predictor
from encnet_triton.train.__main__ import main
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.train.signals import StopRequest
from encnet_triton.weights.checkpoint import read


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(recipe: Path, *arguments: str) -> int:
    return main(["--recipe", str(recipe), "--pictures", "0", *arguments])


def progress() -> dict[str, int]:
    return read(Path("runs/tiny/last.safetensors"))[1]["progress"]


def validated() -> list[int]:
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if r["kind"] == "val"]


def test_an_error_in_validation_costs_no_step(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def damaged(*_: object) -> None:
        raise DataError("val/0.jpg: the image is truncated")

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "validate", damaged)
        assert train(recipe) == 2
    assert "error: val/0.jpg: the image is truncated" in capsys.readouterr().err
    assert (progress()["step"], progress()["validated"]) == (2, -1)
    assert train(recipe, "--resume") == 0
    assert validated() == [2, 4]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_seen_between_two_images_of_a_validation(
    name: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    predict, seen = Predictor.__call__, []

    def signalled(self: Predictor, image: object) -> object:
        seen.append(image)
        os.kill(os.getpid(), getattr(signal, name))
        return predict(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__call__", signalled)
        assert train(recipe) == 0
    assert len(seen) == 1  # of three
    assert "stopped at step 2 of 4" in capsys.readouterr().out
    assert progress()["validated"] == -1 and validated() == []
    assert train(recipe, "--resume") == 0
    assert validated() == [2, 4]


def test_a_death_between_a_validation_and_its_save_leaves_one_record(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "note_best", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(recipe)
    assert validated() == [2]
    assert train(recipe, "--resume") == 0
    assert validated() == [2, 4]


def test_ctrl_c_saves_once_and_would_end_at_once_the_second_time(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    compute, handlers = Segmentation.compute, []

    def interrupted(self: Segmentation, *given: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        return compute(self, *given)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Segmentation, "compute", interrupted)
    assert train(recipe) == 0
    assert handlers == [signal.SIG_DFL]  # which no waiting inside a library delays
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at step 1 of 4" in capsys.readouterr().out and progress()["step"] == 1


def test_ctrl_c_before_the_first_step_is_no_traceback(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmentation, "__init__", interrupted)
    assert train(recipe) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As nohup starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_a_run(recipe: Path) -> None:
    command = [sys.executable, "-m", "encnet_triton.train", "--recipe", str(recipe)]
    command += ["--pictures", "0", "--log-every", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline()
        run.stdout.close()
        said = run.stderr.read()
    assert (run.returncode, said) == (0, b"")
    assert progress()["step"] == 4 and validated() == [2, 4]
