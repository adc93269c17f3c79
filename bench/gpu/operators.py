"""Time and memory of each operator and its peers at the shapes of real networks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config as inductor

from bench.cases import BUDGET, CASES
from bench.gpu.compiler import ask_for_compiler
from bench.gpu.device import Gpu, StandIn, place
from bench.gpu.job import LeftOut
from bench.passes import PASSES, VARIANTS, Pass, is_compiled, least_bytes, needs_gpu

_SECONDS = 0.6  # of replays: this long for the forward pass, and again for both passes


@dataclass(frozen=True)
class Shape:
    """An operator at a shape.

    Attributes:
        operator: a name in `passes.PASSES`, or "cifar" for the whole network.
        shape: arguments of its pass.
        small: the same for a rehearsal.
        peers: whether the peers are measured as well.
        predicted: microseconds forward and backward that were predicted for an H100, as text; None
            if there is no prediction.
    """

    operator: str
    shape: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    predicted: tuple[str, str] | None = None
    peers: bool = True


_SMALL: dict[str, dict[str, Any]] = {
    "encode": {"B": 2, "C": 24, "size": 6, "K": 5},
    "batch_norm": {"B": 2, "C": 8, "size": 6, "residual": True},
    "upsample": {"B": 2, "C": 7, "low": 4, "high": 16},
}

SHAPES: dict[str, Shape] = {
    "encode C512 K32": Shape("encode", BUDGET["encode"], _SMALL["encode"], ("31", "53")),
    "batch_norm residual C256": Shape("batch_norm", BUDGET["batch_norm"], _SMALL["batch_norm"]),
    "upsample C150": Shape("upsample", BUDGET["upsample"], _SMALL["upsample"], ("101", "143")),
    "encode C1024 K32": Shape("encode", {"B": 16, "C": 1024, "size": 60, "K": 32}, peers=False),
    "batch_norm C64": Shape("batch_norm", {"B": 16, "C": 64, "size": 120, "residual": False}),
    "cifar 16k64d": Shape("cifar", {}),
    "encode C16 K16 32x32": Shape("encode", {"B": 128, "C": 16, "size": 32, "K": 16}, peers=False),
    "encode C32 K16 16x16": Shape("encode", {"B": 128, "C": 32, "size": 16, "K": 16}, peers=False),
    "encode C64 K16 8x8": Shape("encode", {"B": 128, "C": 64, "size": 8, "K": 16}, peers=False),
}


def variants(name: str) -> tuple[str, ...]:
    """Variants to measure at a shape, ours first."""
    operator = SHAPES[name].operator
    if not SHAPES[name].peers:
        return ("ours",)
    return CASES["cifar"].variants if operator == "cifar" else VARIANTS[operator]


def _built(name: str, variant: str, rehearse: bool) -> Callable[[], Pass]:
    device = torch.device(place(rehearse).kind)
    shape = SHAPES[name]
    if shape.operator == "cifar":
        return lambda: CASES["cifar"].build(variant, device, None)  # type: ignore[return-value]
    sizes = shape.small if rehearse else shape.shape
    dtype = torch.float32 if rehearse else torch.bfloat16
    return lambda: PASSES[shape.operator](variant, device, dtype, **sizes)


def prepare(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Call a variant once, to fill the compilers' caches."""
    variant = arguments["variant"]
    if is_compiled(variant):
        ask_for_compiler(rehearse)
    call = _built(arguments["shape"], variant, rehearse)
    if not is_compiled(variant):
        call()()
        return {}
    # Other jobs use the device now, so Inductor must not keep which configuration was the fastest:
    # the measuring process compares them again, alone.
    with inductor.patch(autotune_local_cache=False):
        call()()
    return {}


def measure(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Forward, and forward with backward: microseconds on the device and the host, and MiB."""
    device, name, variant = place(rehearse), arguments["shape"], arguments["variant"]
    if is_compiled(variant):
        ask_for_compiler(rehearse)
    if needs_gpu(variant) and rehearse:
        raise LeftOut("a Triton kernel, which needs a GPU")
    step = _built(name, variant, rehearse)()
    found = {"shape": SHAPES[name].shape, "extra MiB": device.extra_memory(step) / 2**20}
    forward = _timed(device, lambda: step.forward().detach())
    gc.collect()
    both = _timed(device, step)
    found |= {"forward": forward, "both": both}
    found["backward us"] = both["us"] - forward["us"]
    if SHAPES[name].operator in PASSES:
        least = least_bytes(SHAPES[name].operator, torch.bfloat16.itemsize, SHAPES[name].shape)
        found["least bytes"] = least
    return found


def _timed(device: Gpu | StandIn, call: Callable[[], object]) -> dict[str, Any]:
    times = device.times(call, _SECONDS)
    found: dict[str, Any] = {
        "us": 1e3 * times.median,
        "p20 us": 1e3 * times.p20,
        "p80 us": 1e3 * times.p80,
        "repeats": times.repeats,
        "host us": 1e3 * times.host,
    }
    return found | ({"note": times.note} if times.note else {})
