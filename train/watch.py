"""Ends a process whose run cannot continue: other ranks failed or are silent, or torchrun is gone.

A process that waits for another inside a library runs none of our code, so threads watch it. One
writes this rank's progress to the run's store every second and reads that of the others. Another,
which never waits for the network, checks what was read and ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

FIRST = 30 * 60.0
"""Seconds without progress that are allowed until the first step is done, and in validations and
saves: a graph may be compiled, or a large file written, by one rank while the others wait."""

_EVERY = 1.0  # seconds between two looks
_SILENT = 10.0  # seconds after which a rank that says nothing is called silent
_NO_STORE = 8.0  # seconds of refused connections after which the store is called gone
_PAUSED = 5.0  # seconds between two looks after which this process was suspended
_ORPHAN = 7.0  # seconds that a process without torchrun has for its last save
FAILED = "failed"

Item = TypeVar("Item")


def _key(rank: int) -> str:
    return f"rank/{rank}"


@dataclass
class Peer:
    """What is known about a rank: its counts of looks and marks, when each last changed, how many
    seconds it may go without a mark, its host and what it is doing."""

    looks: str = ""
    marks: str = ""
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    limit: float = FIRST
    host: str = ""
    doing: str = ""

    def read(self, text: str) -> None:
        """Record what a rank has reported."""
        looks, marks, limit, host, doing = text.split("|", 4)
        now = time.monotonic()
        if looks != self.looks:
            self.looks, self.heard = looks, now
        if marks != self.marks:
            self.marks, self.moved = marks, now
        self.limit, self.host, self.doing = float(limit), host, doing


class Watch:
    """Watches over this process until `stop`.

    Args:
        rank, size: of this process.
        store: of all ranks, a connection of its own; None in a world of one.
        agent: process number of the torchrun that started this process, or None.
    """

    def __init__(self, rank: int, size: int, store: dist.Store | None, agent: int | None) -> None:
        self.rank, self.size = rank, size
        self.failure: str | None = None
        self._store, self._agent = store, agent
        self._peers = [Peer() for _ in range(size)]
        self._looks = self._marks = 0
        self._limit, self._doing = FIRST, "starting"
        self._heard = time.monotonic()  # of the store
        self._own_marks, self._own_moved = 0, time.monotonic()
        self._refused: float | None = None  # since when the store refuses
        self._orphaned: float | None = None
        self._judging = True
        self._over = threading.Event()
        self._before_end: list[Callable[[], Any]] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> Watch:
        """Start watching."""
        loops = [self._judge] if self._store is None else [self._judge, self._talk]
        for loop in loops:
            thread = threading.Thread(target=loop, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def stop(self) -> None:
        """End the threads of a process that has finished its work."""
        self._over.set()
        for thread in self._threads:
            thread.join(5)

    def before_end(self, action: Callable[[], Any]) -> None:
        """Register a function to call if this process is ended here; it has a few seconds."""
        self._before_end.append(action)

    def mark(self, doing: str, limit: float | None = None) -> None:
        """Mark progress: what this rank is doing now; it may take ``limit`` seconds until the next
        mark."""
        self._marks += 1
        self._doing = doing
        if limit is not None:
            self._limit = limit

    def each(self, items: Iterable[Item], count: int) -> Iterator[Item]:
        """The items of an evaluation, each of which is progress."""
        for item in items:
            self.mark("evaluation")
            yield item

    def somebody_is(self, doing: str) -> bool:
        """Whether another rank has reported this activity within the last seconds."""
        return any(peer.doing == doing for peer in self._peers)

    @contextmanager
    def patiently(self, doing: str) -> Iterator[None]:
        """Work inside may take as long as the first step."""
        before = self._limit
        self.mark(doing, FIRST)
        yield
        self.mark(doing, before)

    def cause(self, sentence: str, lost: bool) -> str:
        """Report why this rank failed; the others are told, and end too.

        Args:
            lost: that it could not reach another rank. It then waits for a few seconds: the rank
                whose connection breaks is seldom the first to know why.
        """
        self._judging = False  # the caller ends this process
        deadline = time.monotonic() + 4
        while lost and self.failure is None and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = [r for r in self._others() if time.monotonic() - self._peers[r].heard > 3]
            if silent:
                sentence = f"{self._named(silent)} ended without a message"
                break
        if self.failure is not None:
            return f"ended because {self.failure}"
        if self._store is not None:
            telling = threading.Thread(target=self._publish, args=(sentence,), daemon=True)
            telling.start()
            telling.join(3)
        return sentence

    def _publish(self, sentence: str) -> None:
        assert self._store is not None
        try:
            self._store.compare_set(FAILED, "", f"rank {self.rank} failed: {sentence}")
        except RuntimeError:
            return  # the store is gone, and the others notice

    def _talk(self) -> None:
        """Exchange progress with the store; may wait for the network."""
        assert self._store is not None
        while not self._over.is_set():
            try:
                self._look(self._store)
                self._heard, self._refused = time.monotonic(), None
            except RuntimeError:  # torch's errors of a connection are such
                self._refused = self._refused or time.monotonic()
            self._over.wait(_EVERY)

    def _look(self, store: dist.Store) -> None:
        """Three requests, however many ranks there are: one store answers all of them."""
        self._looks += 1
        host = socket.gethostname()
        said = f"{self._looks}|{self._marks}|{self._limit}|{host}|{self._doing}"
        store.set(_key(self.rank), said)
        if store.check([FAILED]):
            self.failure = store.get(FAILED).decode()
        # Reading a rank that has said nothing yet would wait for it, so each is checked first.
        talking = [r for r, peer in enumerate(self._peers) if peer.looks or store.check([_key(r)])]
        for rank, text in zip(talking, store.multi_get([*map(_key, talking)]), strict=True):
            self._peers[rank].read(text.decode())

    def _judge(self) -> None:
        """Check what was read; waits for nothing."""
        last = time.monotonic()
        while not self._over.wait(_EVERY / 2):
            now = time.monotonic()
            if now - last > _PAUSED:
                self._forget(now - last)
            last = now
            sentence = self._verdict(now)
            if sentence is not None and self._judging:
                self.end(sentence)

    def _forget(self, pause: float) -> None:
        """Ignore time in which this process was suspended; schedulers suspend whole jobs."""
        for peer in self._peers:
            peer.heard += pause
            peer.moved += pause
        self._heard += pause
        self._own_moved += pause
        self._refused = None

    def _verdict(self, now: float) -> str | None:
        """Why this process must end, if it must."""
        if self.failure is not None:
            return f"ended because {self.failure}"
        if self._agent is not None and os.getppid() != self._agent:
            if self._orphaned is None:
                self._orphaned = now
                os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves and ends
            elif now - self._orphaned > _ORPHAN:
                return f"ended because its torchrun (process {self._agent}) is gone"
        if self._store is None:
            return None
        if self._marks != self._own_marks:
            self._own_marks, self._own_moved = self._marks, now
        still = now - self._own_moved
        if self._refused is not None and min(still, now - self._refused) > _NO_STORE:
            return "ended because torchrun or rank 0, which keeps all ranks' addresses, is gone"
        # What a silent rank said last may be from before its first step.
        talking = (peer.limit for peer in self._peers if now - peer.heard <= _SILENT)
        limit = max([self._limit, *talking])
        if min(still, now - max(peer.moved for peer in self._peers)) < limit:
            return None
        return self._silence(now, limit)

    def _silence(self, now: float, limit: float) -> str:
        """The message for when no rank has made progress for too long."""
        field = "" if limit == FIRST else " (--timeout)"
        waited = f"no rank has made progress for {limit:g} s{field}"
        if now - self._heard > _SILENT:
            host = self._peers[0].host or os.environ.get("MASTER_ADDR", "of rank 0")
            return (
                f"{waited}: this rank, on {socket.gethostname()}, has not reached rank 0's host "
                f"{host} for {now - self._heard:.0f} s"
            )
        silent = [r for r in self._others() if now - self._peers[r].heard > _SILENT]
        if silent:
            return f"{waited}: {self._named(silent)} has said nothing for as long"
        at: dict[str, list[int]] = {}
        for rank, peer in enumerate(self._peers):
            at.setdefault(peer.doing, []).append(rank)
        (doing, few), *rest = sorted(at.items(), key=lambda item: len(item[1]))
        if not rest:
            return f"{waited}: all ranks are at: {doing}"
        others = " or ".join(text for text, _ in rest)
        return f"{waited}: {self._named(few)} is at: {doing}, the others are at: {others}"

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} on host {self._peers[rank].host or '?'}" for rank in ranks)

    def end(self, sentence: str, status: int = 1) -> NoReturn:
        """Say why, and end this process at once: nothing is waited for but `before_end`."""
        prefix = f"[rank {self.rank}] " if self.size > 1 else ""
        os.write(2, f"{prefix}error: {sentence}\n".encode(errors="backslashreplace"))
        for action in self._before_end:
            thread = threading.Thread(target=action, daemon=True)
            thread.start()
            thread.join(2)
        os._exit(status)
