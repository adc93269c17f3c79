"""Smoke test: the device, each operator against float64, collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import passes
from bench.apart import complaint
from bench.gpu import exact
from bench.gpu.device import place
from bench.gpu.job import Wrong
from bench.gpu.processes import LOOPBACK, streamed, torchrun
from bench.report import machine
from encnet_triton.kernels import upsample_argmax
from encnet_triton.machine import report

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def environment(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """What a bug report needs, and facts about the device."""
    device = place(rehearse)
    found: dict[str, Any] = dict(report())
    return {"machine": machine(torch.device(device.kind)), "device": device.facts(), **found}


def limits(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """The device's limits: bytes copied, bfloat16 products, the shortest replay."""
    device = place(rehearse)
    kind, size = device.kind, arguments["bytes"]
    source = torch.empty(size, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    n = arguments["matrix"]
    a, b = (torch.randn(n, n, device=kind, dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros(1, device=kind)
    copy = device.times(lambda: target.copy_(source), 1.0)
    product = device.times(lambda: a @ b, 1.0)
    shortest = device.times(lambda: one.fill_(1.0), 0.2)
    return {
        "copy GB/s": 2 * size / copy.median / 1e6,
        "bfloat16 TFLOP/s": 2 * n**3 / product.median / 1e9,
        "replay of one fill, us": 1e3 * shortest.median,
        "launch from Python, us": 1e3 * shortest.host,
        "clocks after": device.clocks(),
    }


def operator(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Forward and backward of one operator against float64; errors relative to the norm."""
    name, dtype = arguments["operator"], DTYPES[arguments["dtype"]]
    device = torch.device(place(rehearse).kind)
    ours = passes.PASSES[name]("ours", device, dtype, **arguments["shape"])
    wanted = exact.exact(name, ours)
    # The first call asks the plan, the second records its launches, the third replays them.
    for _ in range(3):
        errors = exact.compared(name, exact.results(ours), wanted, dtype)
    return {"errors": errors}


def argmax(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """The label map of `upsample_argmax`: where it differs, float64 must see almost a tie."""
    device, low, high = place(rehearse).kind, arguments["low"], arguments["high"]
    torch.manual_seed(0)
    logits = torch.randn(2, arguments["classes"], low, low, device=device)
    labels = upsample_argmax(logits, (high, high))
    assert isinstance(labels, Tensor)
    return exact.compared_labels(logits, labels)


def ranks(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Synchronised batch norm and DDP in a group of processes that share the device."""
    device = place(rehearse)
    backend = "gloo" if rehearse else arguments["backend"]
    command = ["-m", "bench.gpu.ranks", "--device", device.kind, "--backend", backend]
    status, printed = streamed(torchrun(arguments["processes"], command), **LOOPBACK)
    if status:
        raise Wrong(complaint(printed))
    return {"ranks": next(line for line in printed.splitlines() if "correct on" in line)}
