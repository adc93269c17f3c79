"""Start the trainer under torchrun from a test, and compare what two runs saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from encnet_triton.checkpoint import read

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
        kill(process)


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


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that still runs with all it started, and wait for it.

    By descent: torchrun gives each of its processes a session of its own, so that killing its
    group would leave them.
    """
    if process.poll() is None:
        for pid in (process.pid, *descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started (in ``/proc``)."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    found = list(children[pid])
    for child in found:  # which grows
        found += children[child]
    return found


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
