"""Whether torch.compile can work on this machine."""

from __future__ import annotations

import os
import shutil
import sys

import torch


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, in one sentence, or None.

    It looks for what Inductor and Triton look for: they fail in the middle of the first step.
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
    return what and f"--compile is left out: {what}; the network runs eagerly"


def _program(variable: str, *names: str) -> bool:
    """Whether the program that an environment variable names, else one of ``names``, is there."""
    given = os.environ.get(variable)
    return any(shutil.which(name) for name in ([given] if given else names))
