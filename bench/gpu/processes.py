"""Worker processes with time limits, which leave nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.apart import last_line
from bench.gpu.job import Job, Outcome
from encnet_triton.cores import usable_cores

ROOT = Path(__file__).parents[2]
_SAID = 30_000  # characters of a job's output that are kept


def child_environment(more: dict[str, str]) -> dict[str, str]:
    """Environment of a child: ours and `more`, with this checkout on PYTHONPATH."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def streamed(command: list[str], **variables: str) -> tuple[int, str]:
    """Run a program in the checkout: exit status and output.

    Each line is passed on at once, so that it is not lost if the job is killed.
    """
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=child_environment(variables),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def torchrun(processes: int, command: list[str]) -> list[str]:
    """The command that runs a module as ranks on this host, even if its name does not resolve."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes), *command]


# All ranks are on this host, so the loopback interface will do.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def descendants(pid: int) -> list[int]:
    """The processes that a process started, then those that they started (in ``/proc``)."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # The name in parentheses may hold spaces.
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    found = list(children[pid])
    for child in found:  # the list grows meanwhile
        found += children[child]
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants.

    They are found by their parents: torchrun gives each of its processes its own session, so
    killing its process group would miss them.
    """
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def together(rehearse: bool = False) -> int:
    """How many jobs may share the device: each holds GiB of its memory, and a core to compile.

    In a rehearsal one, because starting a process takes longer than its jobs.
    """
    return 1 if rehearse else max(2, min(8, usable_cores() // 2))


class Worker:
    """A process that has imported what jobs need and waits for a job."""

    def __init__(self, environment: dict[str, str], rehearse: bool) -> None:
        self.environment = environment
        self._rehearse = rehearse
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=child_environment(environment),
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def run(self, job: Job, limit: float) -> tuple[Outcome, str]:
        """Run a job for at most `limit` seconds; returns its outcome and the end of its output."""
        start = time.monotonic()
        line = {"function": job.function, "arguments": job.arguments, "rehearse": self._rehearse}
        line["until"] = time.time() + limit
        assert self._process.stdin is not None
        had: dict[str, Any] = {}
        answer: dict[str, Any] = {"so far": had}
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            while "so far" in answer:
                had = answer["so far"]
                text = self._answers.get(timeout=max(0.0, start + limit - time.monotonic()))
                answer = json.loads(text) if text else self._death()
        except BrokenPipeError:
            answer = self._death()
        except queue.Empty:
            answer = {"status": "timed out", "reason": f"ended after {limit:.0f} s"}
        answer = {"result": had, **answer}
        if answer["status"] == "timed out":
            self.stop()
        seconds = round(time.monotonic() - start, 2)
        printed = self._printed()
        self._log.seek(0)
        self._log.truncate()
        return Outcome(job.stage, job.name, seconds=seconds, **answer), printed

    def _death(self) -> dict[str, Any]:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": "the process closed its output but kept running"}
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        last = last_line(self._printed())
        return {"status": "failed", "reason": f"the process ended with {cause}: {last}"}

    def _printed(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _SAID))
        return self._log.read()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process and everything it started."""
        if self.alive:
            kill_tree(self._process.pid)
        self._process.wait()

    def close(self) -> None:
        """`stop`, and close the pipes and the log: a session starts hundreds of workers."""
        self.stop()
        self._reader.join(5)
        if self._reader.is_alive():
            return  # a detached child still holds its output open
        for file in (self._process.stdin, self._process.stdout, self._log):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()
