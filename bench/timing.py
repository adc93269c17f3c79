"""Time and extra memory of a function, measured in the calling process."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu.device import Gpu

_MAX_REPEATS = 50


@dataclass(frozen=True)
class Measurement:
    """Milliseconds per call, and peak memory above what was in use before the first call.

    Attributes:
        median, p20, p80: of `repeats` calls, after warm-up.
        extra_mib: peak resident memory (CPU) or allocated memory (GPU) of all calls, above what was
            in use before the first one.
        host: median milliseconds until a call returned to Python on a GPU; 0 on a CPU.
    """

    median: float
    p20: float
    p80: float
    repeats: int
    extra_mib: float
    host: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def resident() -> int:
    """Resident bytes of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak() -> None:
    """Reset the kernel's high-water mark of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most resident bytes since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; memory can only be measured on Linux")


def measure(
    call: Callable[[], object], device: torch.device, seconds: float = 4.0, warm_up: int = 2
) -> Measurement:
    """Call at least three times and for about `seconds`; the first calls are not timed.

    On a GPU, `bench.gpu.device.Gpu` measures time and memory.
    """
    if device.type == "cuda":
        gpu = Gpu()
        extra = gpu.extra_memory(call)
        found = gpu.times(call, seconds)
        return Measurement(
            found.median, found.p20, found.p80, found.repeats, extra / 2**20, found.host
        )
    forget_peak()
    before = resident()
    for _ in range(warm_up):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < _MAX_REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    cut = statistics.quantiles(times, n=5, method="inclusive")
    return Measurement(
        median=statistics.median(times),
        p20=cut[0],
        p80=cut[3],
        repeats=len(times),
        extra_mib=max(0, peak_resident() - before) / 2**20,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB on the GPU reads and writes: the limit in practice."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / (measure(lambda: target.copy_(source), device, 1.0).median / 1e3)
