"""Files that a thread writes while the training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["Writer", "copied"]


class Writer:
    """Does one job at a time in a thread; what a job raises is raised in the caller's thread.

    Leaving it as a context waits for the last job. Its error is raised there too, unless another is
    on its way.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before this one, then begin."""
        self.finish()

        def work() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        # No daemon: a process that ends by itself has its files whole.
        self._thread = threading.Thread(target=work, name="writer", daemon=False)
        self._thread.start()

    def look(self) -> None:
        """Raise what a job has raised that is over; waits for none."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the job, and raise what it has raised."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the job; what it has raised is kept."""
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
    """Copies in memory of this machine, contiguous, and what waits until they are there.

    Of tensors on a GPU they are page-locked, so that nothing is waited for here; what the GPU does
    to the tensors from now on comes after the copy.
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
