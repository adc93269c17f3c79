"""Two torchrun agents that meet on localhost train as one agent of two processes does."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.train.launch import assert_same_state, ended_well, run, running, torchrun


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.verify
def test_two_agents_equal_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/multi_node.md, both on this host."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--pictures", "0", "--name"]
    run([*torchrun(), *arguments, "one"], Path("one.log"))

    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-id", "two-agents", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost",
        "-m", "encnet_triton.train", *arguments, "two",
    ]  # fmt: skip
    logs = [Path("agent-0.log"), Path("agent-1.log")]
    with running(command, logs[0]) as first, running(command, logs[1]) as second:
        for agent, log in zip((first, second), logs, strict=True):
            ended_well(agent, log)
    assert_same_state("two", "one")
