"""Writing files in a thread while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["Writer", "copied"]


class Writer:
    """Runs one job at a time in a thread; a job's error is raised in the caller's thread.

    As a context manager it waits for the last job on exit and raises that job's error, unless
    another error is being raised.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the previous job, then start this one."""
        self.finish()

        def work() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        # Not a daemon: the process does not exit before the file is complete.
        self._thread = threading.Thread(target=work, name="writer", daemon=False)
        self._thread.start()

    def look(self) -> None:
        """Raise the error of a job that has ended; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the job, and raise its error."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the job; its error is kept for `finish`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.wait()


def copied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Contiguous copies in host memory, and a function that waits until they are complete.

    Copies of GPU tensors are in page-locked memory, so this call does not wait for the GPU; what
    the GPU is asked to do to the tensors later happens after the copy.
    """
    found = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        found[name] = copy.copy_(tensor.detach(), non_blocking=True)
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return found, lambda: None
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return found, done.synchronize
