"""A process that dies does not end a run: torchrun starts the group again, the trainer goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench.gpu.processes import descendants
from encnet_triton.train import run_state
from encnet_triton.train.__main__ import main
from encnet_triton.weights.checkpoint import read
from tests.support.tolerance import assert_equal_in_float64
from tests.train.launch import IN_FLOAT64, ended_well, floating, running, torchrun


def process_of_rank(agent: int, rank: int) -> int | None:
    """The child of a torchrun agent that is a given rank."""
    for pid in descendants(agent):  # children first
        with suppress(OSError):  # it has ended
            variables = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return pid
    return None


def recorded_steps(run: str) -> list[int]:
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"]


def kill_after_a_checkpoint(agent: int, checkpoint: Path) -> None:
    """SIGKILL, which no handler sees, to rank 1 as soon as there is something to resume from."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        worker = process_of_rank(agent, 1) if checkpoint.exists() else None
        if worker is not None:
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError(f"{checkpoint} was not written within two minutes")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """The same command, started again by torchrun, ends with the weights of a quiet run."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--resume", "--epochs", "10", "--save-every", "2",
                 "--val-every", "0", "--pictures", "0", "--dropout", "0", "--name"]  # fmt: skip
    assert main([*arguments, "quiet"]) == 0

    log, start = Path("killed.log"), torchrun("--max-restarts", "1", module=IN_FLOAT64)
    with running([*start, *arguments, "killed"], log) as agent:
        kill_after_a_checkpoint(agent.pid, Path("runs/killed/last.safetensors"))
        ended_well(agent, log)
    resumed = re.search(r"resumed runs/killed/last.safetensors at step (\d+)", log.read_text())
    assert resumed is not None and 0 < int(resumed[1]) < 20, log.read_text()
    for kind in ("model.", "momentum."):
        assert_equal_in_float64(floating("killed", kind), floating("quiet", kind))
    assert recorded_steps("killed") == list(range(1, 21))


@pytest.mark.verify  # of the parts, test_signals.py and test_trainer.py have tests
def test_sigterm_to_torchrun_saves_on_all_ranks(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scheduler sends before the time limit reaches the processes, which agree to stop."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--epochs", "100000", "--val-every", "0"]
    log = Path("agent.log")
    with running([*torchrun(), *arguments], log) as agent:
        deadline = time.monotonic() + 120
        metrics = Path("runs/tiny/metrics.jsonl")
        while time.monotonic() < deadline and not (
            metrics.exists() and len(recorded_steps("tiny"))
        ):
            time.sleep(0.05)
        agent.terminate()
        agent.wait(60)
    assert "continue with --resume" in log.read_text()
    step = read(Path("runs/tiny/last.safetensors"))[1]["progress"]["step"]
    assert step == recorded_steps("tiny")[-1]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--stop-at", "2", "--resume"]
    assert main(arguments) == 0
    Path("runs/tiny/last.safetensors").unlink()
    assert main(arguments) == 0
    assert recorded_steps("tiny") == [1, 2]


def test_records_after_the_checkpoint_are_made_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process that was killed wrote since, its last line cut short."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--resume", "--pictures", "0"]
    assert main([*arguments, "--stop-at", "3"]) == 0
    with open("runs/tiny/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4}\n{"kind": "va')
    assert main(arguments) == 0
    assert recorded_steps("tiny") == [1, 2, 3, 4]


def test_ranks_that_do_not_share_the_folder_are_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The rest would go on from the checkpoint, and they from the start."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--stop-at", "1", "--resume"]
    assert main(arguments) == 0
    monkeypatch.setattr(run_state, "gather", lambda found: [found, True, False])
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "ranks [2] do not see runs/tiny/last.safetensors" in said
