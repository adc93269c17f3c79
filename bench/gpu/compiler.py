"""Whether jobs that need torch.compile can run."""

from __future__ import annotations

import torch

from bench.gpu.job import LeftOut
from encnet_triton.train.compiling import compile_obstacle


def ask_for_compiler(rehearse: bool) -> None:
    """Raise LeftOut in a rehearsal, and where torch.compile cannot work."""
    if rehearse:
        raise LeftOut("compiling takes minutes, so a rehearsal skips it")
    if obstacle := compile_obstacle(torch.device("cuda")):
        raise LeftOut(obstacle)
