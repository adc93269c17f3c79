"""Ranks agree on when to stop, and a GPU does not wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from encnet_triton.train import distributed
from encnet_triton.train.__main__ import main
from encnet_triton.train.signals import agree
from tests.train.launch import run, start_alone, torchrun

SIGNALLED = "tests.train.signalled"


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["segmentation", pytest.param("classification", marks=pytest.mark.verify)]
)
def test_a_signal_to_one_rank_between_epochs_stops_all(
    task: str, recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it in the next step, until the collective times out."""
    monkeypatch.chdir(tmp_path)
    options = {
        "segmentation": [str(recipe), "--pictures", "0"],
        "classification": ["cifar10_resnet_64d", "--data", str(data), "--width", "16",
                           "--device", "cpu", "--amp", "off", "--batch-size", "16"],
    }[task]  # fmt: skip
    command = [*torchrun(module=SIGNALLED), "--epochs", "100", "--name", "run", "--recipe"]
    run([*command, *options], Path("log"), seconds=120)
    assert "continue with --resume" in Path("log").read_text()


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, outside the backward pass: there some
    operators do on a CPU, and none on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        forward = torch._C._current_graph_task_id() == -1
        self.count += forward and func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_agreement_asks_for_no_value_before_it_is_read() -> None:
    with Reads() as reads:
        read = agree(torch.tensor(float("nan")), True)
    assert reads.count == 0 and read() == (True, True)
    assert agree(torch.tensor(1.0), False)() == (False, False)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_step_of_several_ranks_waits_for_no_value(
    task: str, recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 of 2 in a group that has no other: more steps ask for no more values."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "start", start_alone)
    options = {
        "segmentation": [str(recipe), "--log-every", "100", "--batch-size", "2"],
        "classification": ["cifar10_resnet_64d", "--data", str(data), "--width", "16",
                           "--device", "cpu", "--amp", "off", "--batch-size", "16"],
    }[task]  # fmt: skip
    counts = []
    for steps in (1, 3):  # of 4 or 6 in an epoch
        command = ["--epochs", "2", "--stop-at", str(steps), "--name", str(steps), "--recipe"]
        with Reads() as reads:
            assert main([*command, *options]) == 0
        counts.append(reads.count)
    assert counts[0] == counts[1]
