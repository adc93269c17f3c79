"""A job, which runs in its own process, and its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "failed", "timed out", "does not fit", "left out"]


class Wrong(Exception):
    """The result of a job is wrong; the message says what differs and by how much. `result` is what
    the job found anyway.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class LeftOut(Exception):
    """A job cannot run on this machine; the message says why."""


listeners: list[Callable[[dict[str, Any]], None]] = []


def so_far(result: dict[str, Any]) -> None:
    """Report what a job has found so far: it is kept if the process dies or hangs."""
    for listener in listeners:
        listener(result)


@dataclass(frozen=True)
class Job:
    """What a worker runs.

    Attributes:
        stage, name: together unique.
        function: "module:function"; called with (arguments, rehearse), returns a dictionary for
            JSON.
        arguments: a dictionary for JSON.
        seconds: its approximate time on a current GPU.
        limit: seconds after which it is ended.
        alone: whether it measures time, so that nothing else may run beside it.
        environment: variables of its process.
        goes_on: it reports what it has `so_far` and finds an earlier try's results in
            arguments["before"]; if its process dies or hangs, it is tried again as long as each try
            finds more.
    """

    stage: str
    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    limit: float = 120.0
    alone: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    goes_on: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.name


@dataclass(frozen=True)
class Outcome:
    """One line of results.jsonl.

    Attributes:
        seconds: what the job took.
        result: what its function found.
        reason: one sentence, if it found nothing or something wrong.
    """

    stage: str
    name: str
    status: Status
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.name

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in ({}, "")}
