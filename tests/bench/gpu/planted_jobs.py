"""Jobs that end in every way a job can."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.job import LeftOut, Wrong, so_far


def fine(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    print("a word on standard output is no answer")
    return {"given": arguments, "rehearse": rehearse}


def wrong(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    raise Wrong("dx is off by 1.0e+00")


def left_out(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    raise LeftOut("there is no such tool")


def fails(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")


def out_of_memory(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB.")


def dies(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    print("Aborted by the driver", file=sys.stderr, flush=True)
    os.abort()


def hangs(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """With a child in a session of its own, as torchrun starts its workers."""
    so_far({"found": 1})
    so_far({"found": 2})
    code = "import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    Path(arguments["file"]).write_text(str(child.pid))
    time.sleep(600)
    return {}
