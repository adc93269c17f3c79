"""A command as torchrun's processes, forked from the test: they import nothing again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import torch


def exit_statuses(main: Callable[[list[str]], int], arguments: list[str], size: int) -> list[int]:
    """Run a command's main function as each rank of a group on the CPU; their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        torch.set_num_threads(1)  # a fork has none of the threads that OpenMP would wait for
        status = main([*arguments, "--device", "cpu"])
        sys.stdout.flush()
        sys.exit(status)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]
