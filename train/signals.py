"""A request to stop a run, from a scheduler or a user, and how the ranks agree on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from encnet_triton.train.distributed import all_reduce_sum

_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")  # the last one is of a terminal that closes
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_SHOW_CURSOR = "\x1b[?25h"  # the progress line hides the cursor and would not restore it
_NOTICE = "stopping after this step, then saving; press Ctrl-C again to stop at once\n"


class StopRequest:
    """While it is entered, SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C only set ``requested``.

    Those that are ignored stay so: nohup ignores SIGHUP.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            # Python runs no signal handler while this process waits for another inside a library.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.isatty(2):
                os.write(2, (_SHOW_CURSOR + _NOTICE).encode())

    def __enter__(self) -> StopRequest:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._request) for number in heeded}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def agree(loss: Tensor, requested: bool) -> Callable[[], tuple[bool, bool]]:
    """Start moving (loss not finite anywhere, stop requested anywhere) to the host.

    Call what it returns once the backward pass has been launched: on a GPU only then is the copy
    waited for, so the device never runs out of work.
    """
    flags = torch.stack([(~torch.isfinite(loss)).float(), torch.full_like(loss, requested).float()])
    all_reduce_sum(flags)
    if not flags.is_cuda:
        return lambda: _both(flags)
    host = torch.empty(2, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def read() -> tuple[bool, bool]:
        done.synchronize()
        return _both(host)

    return read


def _both(flags: Tensor) -> tuple[bool, bool]:
    bad, stop = flags.tolist()
    return bool(bad), bool(stop)
