"""What only a GPU can do: graphs, events, clocks, profilers; each with a stand-in for CPUs.

A rehearsal runs every line of the benchmark except those of `Gpu`.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from typing import TYPE_CHECKING, Any

import torch

from bench.apart import first_line

if TYPE_CHECKING:
    from encnet_triton.kernels.runtime.launch import Launch

# Twice the largest L2 cache of any GPU (126 MB): reading this much evicts all that a call left.
_FLUSH_BYTES = 256 * 2**20
# Flushes and replays queued in the stream at once: the GPU must never wait for Python.
_IN_FLIGHT = 10
_WARM_UP = 3
_CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")
# Where the profilers are when they are not on the path.
_TOOLS = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*", "/opt/nvidia/nsight-compute")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call.

    Attributes:
        median, p20, p80: on the device; the data caches are cold on a GPU.
        repeats: calls that were timed.
        host: median until the call returns to Python, with an empty stream.
        note: how it was measured, if not by replaying a graph.
    """

    median: float
    p20: float
    p80: float
    repeats: int
    host: float
    note: str = ""


def _times(found: Sequence[float], host: Sequence[float], note: str) -> Times:
    cut = statistics.quantiles(found, n=5, method="inclusive")
    return Times(
        statistics.median(found), cut[0], cut[3], len(found), statistics.median(host), note
    )


def _host_times(call: Callable[[], object], wait: Callable[[], None], count: int) -> list[float]:
    found = []
    for _ in range(count):
        wait()
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    wait()
    return found


class Gpu:
    """The current CUDA device."""

    kind = "cuda"

    def facts(self) -> dict[str, Any]:
        """Name, size and what nvidia-smi says of driver, clocks, power and temperature."""
        properties = torch.cuda.get_device_properties()
        found: dict[str, Any] = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "L2 MiB": round(properties.L2_cache_size / 2**20, 1),
            "CUDA": torch.version.cuda,
            "devices": torch.cuda.device_count(),
            "ncu": self.tool("ncu") or "not found",
            "compute-sanitizer": self.tool("compute-sanitizer") or "not found",
        }
        return found | self.clocks()

    def clocks(self) -> dict[str, str]:
        """What nvidia-smi reads now; empty where there is no nvidia-smi."""
        query = f"--query-gpu={','.join(_CLOCKS)}"
        command = ["nvidia-smi", query, "--format=csv,noheader", "-i", "0"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        values = [value.strip() for value in run.stdout.split(",")]
        return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}

    def tool(self, name: str) -> str | None:
        """Path of a profiler, or None."""
        folders = [folder for pattern in _TOOLS for folder in sorted(glob(pattern))]
        return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))

    def wait(self) -> None:
        torch.cuda.synchronize()

    def times(self, call: Callable[[], object], seconds: float, host_calls: int = 20) -> Times:
        """Replay a CUDA graph of the call, with the L2 cache flushed before each replay.

        The flush takes longer than Python needs to launch what follows, so no time of the host
        falls between the two events. It reads, because writing would leave the cache full of lines
        to be written back during the call. A call that cannot be captured is launched instead of a
        graph, and the note says so.
        """
        for _ in range(_WARM_UP):
            call()
        host = _host_times(call, self.wait, host_calls)
        note = ""
        try:
            replay = self._captured(call)
        except RuntimeError as error:
            # Ending the capture fails as well, and its error hides the cause.
            cause = error.__context__ or error
            note = f"launched, not replayed: {first_line(cause)[:120]}"
            self.wait()
            replay = call
        flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=self.kind)
        sink = torch.amax(flush, 0)
        pairs = [(event(), event()) for _ in range(_IN_FLIGHT)]
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < _IN_FLIGHT or time.perf_counter() < end:
            for begin, stop in pairs:
                torch.amax(flush, 0, out=sink)
                begin.record()
                replay()
                stop.record()
            self.wait()
            found += [begin.elapsed_time(stop) for begin, stop in pairs]
        return _times(found, host, note)

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.wait()
        # Tensors that reference cycles still hold belong to another stream and spoil a capture.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # The outer block restores the stream, which the end of a failed capture does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=side),
        ):
            kept = call()
        return _Replay(graph, kept)

    def extra_memory(self, call: Callable[[], object]) -> int:
        """Peak bytes that a call allocates, above what was allocated before it."""
        call()
        gc.collect()
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return max(0, torch.cuda.max_memory_allocated() - before)

    def obstacle(self, launches: Sequence[Launch]) -> str | None:
        """Compile launches; returns why they cannot be used, or None."""
        found = (launch.obstacle() for launch in launches)
        return next((reason for reason in found if reason), None)

    def profile(self, call: Callable[[], object]) -> None:
        """Run a call between the marks that ncu waits for."""
        self.wait()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        call()
        self.wait()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


@dataclass
class _Replay:
    """A captured call; what it returned must live as long as the graph."""

    graph: torch.cuda.CUDAGraph
    kept: object

    def __call__(self) -> None:
        self.graph.replay()


class StandIn:
    """A CPU in place of the GPU: the same methods, in a simple form."""

    kind = "cpu"
    stands_for = (
        "CUDA graphs, events and the L2 flush: calls timed by the host's clock",
        "peak memory of the allocator: not measured",
        "nvidia-smi: no clocks",
        "the compiler of kernels: they run in Triton's interpreter where a job needs them",
        "ncu and compute-sanitizer: sample output",
        "NCCL: gloo",
    )

    def facts(self) -> dict[str, Any]:
        return {"name": "rehearsal", "capability": "none"}

    def clocks(self) -> dict[str, str]:
        return {}

    def tool(self, name: str) -> str | None:
        return None

    def wait(self) -> None:
        pass

    def times(self, call: Callable[[], object], seconds: float, host_calls: int = 20) -> Times:
        found = _host_times(call, self.wait, 2)
        return _times(found, found, "on the host's clock")

    def extra_memory(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def obstacle(self, launches: Sequence[Launch]) -> str | None:
        return None

    def profile(self, call: Callable[[], object]) -> None:
        call()


def place(rehearse: bool) -> Gpu | StandIn:
    """The GPU, or what stands in for it."""
    return StandIn() if rehearse else Gpu()


def event() -> torch.cuda.Event:
    """A mark in the GPU's stream that records its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
