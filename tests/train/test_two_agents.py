"""Two torchrun agents that meet on localhost train as one agent of two processes does."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.train.launch import assert_same_state, start, torchrun


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_agents_equal_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/multi_node.md, both on this host."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--pictures", "0", "--name"]
    one = start([*torchrun(), *arguments, "one"], Path("one.log"))
    assert one.wait(120) == 0, Path("one.log").read_text()

    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-id", "two-agents", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost",
        "-m", "encnet_triton.train", *arguments, "two",
    ]  # fmt: skip
    logs = [Path("agent-0.log"), Path("agent-1.log")]
    agents = [start(command, log) for log in logs]
    try:
        assert [agent.wait(120) for agent in agents] == [0, 0], "\n".join(
            log.read_text() for log in logs
        )
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(60)
    assert_same_state("two", "one")
