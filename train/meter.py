"""Averages since the last record, kept on the device until they are read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from encnet_triton.train.distributed import all_reduce_sum


class Meter:
    """Losses, throughput and the share of time spent waiting for data.

    The first step of a process (compilation, worker start-up) is left out of the throughput.

    Args:
        device: where the losses are.
        names: of the averaged values.
    """

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.device = device
        self._names = names
        self._warm = False
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._losses = torch.zeros(len(self._names), device=self.device)
        self._of_step = torch.zeros_like(self._losses)
        self._finite = 0  # steps that are averaged
        self._images = 0
        self._wait = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the enclosed time as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def add(self, terms: Sequence[Tensor]) -> None:
        """Add one micro-batch to the sums over a step, without reading it back."""
        values: list[Tensor] = [t.detach() for t in terms]
        self._of_step += torch.stack([v.to(self._losses.dtype) for v in values])

    def count(self, images: int, finite: bool = True) -> None:
        """End of a step of ``images`` images (over all ranks), whose losses were finite or are left
        out of the averages."""
        if finite:
            self._losses += self._of_step
            self._finite += 1
        self._of_step = torch.zeros_like(self._losses)
        if not self._warm:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._warm = True
            self._start, self._wait = time.perf_counter(), 0.0
            return
        self._images += images

    def summary(self, ranks: int) -> dict[str, float | None]:
        """Averages of this interval over its steps and all ranks; waits for the device.

        The losses are None if no step of the interval had a finite loss, and ``images_per_second``
        is None if the process's first step was the only one.
        """
        sums = all_reduce_sum(self._losses / (max(1, self._finite) * ranks)).tolist()
        losses = sums if self._finite else [None] * len(sums)
        seconds = time.perf_counter() - self._start
        return {
            **{name: value for name, value in zip(self._names, losses, strict=True)},
            "images_per_second": self._images / seconds if self._images else None,
            "data_wait": self._wait / seconds if seconds else 0.0,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library has no such figure there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
