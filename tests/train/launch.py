"""Start the trainer under torchrun from a test, and compare what two runs saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from bench.gpu.processes import kill_tree
from encnet_triton.train.distributed import World
from encnet_triton.weights.checkpoint import read

IN_FLOAT64 = "tests.train.in_float64"  # the trainer, as a module to start


def torchrun(*options: str, processes: int = 2, module: str = "encnet_triton.train") -> list[str]:
    """Command of one torchrun agent with a rendezvous of its own, up to the module's options."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options, "-m", module,
    ]  # fmt: skip


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command while it runs; what it says goes into a file, and at the end nothing is left of it.

    One thread a process: torchrun sets that for several processes and not for one, and sums of
    another number of threads have other last bits.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def run(command: list[str], log: Path, seconds: float = 240) -> None:
    """Run a command, which must end well within so many seconds."""
    with running(command, log) as process:
        ended_well(process, log, seconds)


def ended_well(process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    """Wait for a command; what it said is the message if it fails or takes too long."""
    try:
        status: object = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"still running after {seconds:g} s"
    assert status == 0, f"{status}\n{log.read_text()}"


def floating(run: str, prefix: str) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a run's last checkpoint whose name starts with ``prefix``."""
    tensors, _ = read(Path("runs", run, "last.safetensors"), prefix)
    found = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert len(found) > 20
    return found


def assert_same_state(run: str, other: str) -> None:
    """The last checkpoints of two runs hold the same bits: weights, momentum, random states."""
    ours, about = read(Path("runs", run, "last.safetensors"))
    theirs, other_about = read(Path("runs", other, "last.safetensors"))
    assert about["progress"]["step"] == other_about["progress"]["step"]
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("momentum.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def start_alone(device: str) -> World:
    """In place of `distributed.start`: rank 0 of 2, in a group that has no other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return World(0, 2, 0, 2, torch.device("cpu"))
