"""Time and extra memory of one function, measured in the process that calls."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_MAX_REPEATS = 50


@dataclass(frozen=True)
class Measurement:
    """Milliseconds a call, and the peak of memory above the state before the first call.

    Attributes:
        median, p20, p80: of `repeats` calls, after warm-up.
        extra_mib: peak resident memory (CPU) or allocated memory (GPU) of all calls, above the
            state before the first one.
    """

    median: float
    p20: float
    p80: float
    repeats: int
    extra_mib: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def resident() -> int:
    """Bytes resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak() -> None:
    """Let the kernel's high-water mark start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes resident at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; memory is measured on Linux alone")


def measure(
    call: Callable[[], object], device: torch.device, seconds: float = 4.0, warm_up: int = 2
) -> Measurement:
    """Call at least three times and for about `seconds`; the first calls are not timed."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        forget_peak()
        before = resident()
    for _ in range(warm_up):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < _MAX_REPEATS):
        times.append(_once(call, device))
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_resident()
    times.sort()
    cut = statistics.quantiles(times, n=5, method="inclusive")
    return Measurement(
        median=statistics.median(times),
        p20=cut[0],
        p80=cut[3],
        repeats=len(times),
        extra_mib=max(0, peak - before) / 2**20,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 1 GiB on the GPU reads and writes: the limit in practice."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / (measure(lambda: target.copy_(source), device, 1.0).median / 1e3)


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = event(), event()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def event() -> torch.cuda.Event:
    """A mark in the GPU's stream that keeps its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
