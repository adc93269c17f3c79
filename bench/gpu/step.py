"""Training steps of whole networks, ours and stock, and the memory that was predicted for them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from bench import step
from bench.gpu.compiler import ask_for_compiler
from bench.gpu.device import place
from bench.passes import is_compiled
from bench.static import memory

SMALL = step.Shape("demo", 2, 32, 5, "float32")


def _shape(arguments: dict[str, Any], rehearse: bool) -> step.Shape:
    return SMALL if rehearse else step.Shape(**arguments["shape"])


def measure(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """What `bench step` measures of one variant, and images per second."""
    device, variant = place(rehearse), arguments["variant"]
    if is_compiled(variant):
        ask_for_compiler(rehearse)
    shape = _shape(arguments, rehearse)
    seconds = 0.0 if rehearse else 4.0
    found = asdict(step.measure(variant, shape, torch.device(device.kind), seconds))
    return {
        **found,
        "images/s": 1e3 * shape.batch / found["total"],
        "clocks": device.clocks(),
    }


def predict(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Peak MiB of an eager step above weights and momentum; fake tensors, no device."""
    shape = _shape(arguments, rehearse)
    found = {}
    for variant in ("ours", "stock"):
        one = memory.predict(variant, shape)
        # `measure` counts from when there are weights but no momentum, which is as large.
        found[variant] = (one.peak - one.state / 2) / 2**20
    return found
