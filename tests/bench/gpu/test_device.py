"""What only a device can do, on a stand-in for torch.cuda."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.device import Gpu


class FakeCuda:
    """As much of torch.cuda as `Gpu` calls, with a clock of its own: a replay takes 2 ms."""

    def __init__(self, capture: bool) -> None:
        self.now, self.log, self.can_capture = 0.0, [], capture
        self.Event, self.Stream, self.CUDAGraph = self.event, self.current_stream, self.graph_object
        self.profiler = SimpleNamespace(
            start=lambda: self.log.append("start"), stop=lambda: self.log.append("stop")
        )

    def event(self, enable_timing: bool) -> object:
        mark = SimpleNamespace()
        mark.record = lambda: setattr(mark, "at", self.now)
        mark.elapsed_time = lambda other: other.at - mark.at
        return mark

    def graph_object(self) -> object:
        def replay() -> None:
            self.now += 2.0

        return SimpleNamespace(replay=replay)

    def current_stream(self) -> object:
        return SimpleNamespace(wait_stream=lambda other: None)

    def stream(self, side: object) -> object:
        return nullcontext()

    def graph(self, graph: object, stream: object) -> object:
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return nullcontext()

    def synchronize(self) -> None:
        self.log.append("wait")

    def reset_peak_memory_stats(self) -> None: ...

    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 740


@pytest.mark.parametrize("capture", [True, False])
def test_a_gpu_replays_graphs_and_says_when_it_cannot(capture, monkeypatch) -> None:
    fake = FakeCuda(capture)
    monkeypatch.setattr(torch, "cuda", fake)
    gpu = Gpu()
    gpu.kind = "cpu"  # where the memory of the flush is taken

    def call() -> None:
        fake.now += 5.0

    times = gpu.times(call, seconds=0.0, host_calls=2)
    assert times.median == (2.0 if capture else 5.0) and times.repeats == 10
    note = "launched, not replayed: operation not permitted when stream is capturing"
    assert times.note == ("" if capture else note)
    assert gpu.extra_memory(call) == 640
    fake.log.clear()
    gpu.profile(lambda: fake.log.append("call"))
    assert fake.log == ["wait", "start", "call", "wait", "stop"]


def test_clocks_are_read_from_nvidia_smi(monkeypatch) -> None:
    line = "580.10, 1980 MHz, 3201 MHz, 1980 MHz, 35\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=line))
    assert Gpu().clocks()["clocks.sm"] == "1980 MHz"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices"))
    assert Gpu().clocks() == {}
