"""A scheduler's notice that a run must end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Inside of it, SIGTERM and SIGUSR1 only set ``requested``."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> StopRequest:
        wanted = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n)]
        self._previous = {number: signal.signal(number, self._request) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
