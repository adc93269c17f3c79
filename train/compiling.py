"""Whether torch.compile can work on this machine, and what training with CUDA graphs needs."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

from encnet_triton.train.config import REDUCE_OVERHEAD


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, in one sentence, or None.

    Checks what Inductor and Triton need, which would otherwise fail in the middle of the first
    step.
    """
    what = None
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            what = "Triton is not installed"
        else:
            if not _program("CC", "gcc", "clang"):
                what = "Triton finds no C compiler (gcc or clang on PATH, or CC)"
            elif torch.cuda.get_device_capability(device) < (7, 0):
                what = f"{torch.cuda.get_device_name(device)} is older than Triton supports"
    else:
        name = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        if not _program("CXX", name):
            what = f"there is no C++ compiler ({name} on PATH, or CXX)"
    return what and f"--compile is ignored: {what}; the network runs eagerly"


def _program(variable: str, *names: str) -> bool:
    """Whether the program that an environment variable names, else one of ``names``, is there."""
    given = os.environ.get(variable)
    return any(shutil.which(name) for name in ([given] if given else names))


def records_graphs(mode: bool | str, device: torch.device) -> bool:
    """Whether a network compiled in this mode is replayed as CUDA graphs."""
    return mode == REDUCE_OVERHEAD and device.type == "cuda"


def fix_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient of zeros, for backward passes that add to it in place.

    Otherwise autograd keeps the first gradient itself as the parameter's. From a CUDA graph, that
    lies in the graph's memory, and the next micro-batch would overwrite what it should add to.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
