"""Start the trainer under torchrun from a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from encnet_triton.checkpoint import read

ROOT = Path(__file__).parents[2]


def torchrun(*options: str, processes: int = 2) -> list[str]:
    """Command of one torchrun agent with a rendezvous of its own, up to the trainer's options."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options,
        "-m", "encnet_triton.train",
    ]  # fmt: skip


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command on the code of this checkout; what it says goes into a file.

    One thread a process: torchrun sets that for several processes and not for one, and sums of
    another number of threads have other last bits.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def assert_same_state(run: str, other: str) -> None:
    """The last checkpoints of two runs hold the same bits: weights, momentum, random states."""
    ours, about = read(Path("runs", run, "last.safetensors"))
    theirs, other_about = read(Path("runs", other, "last.safetensors"))
    assert about["progress"]["step"] == other_about["progress"]["step"]
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("momentum.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
