"""Whether jobs that need torch.compile run."""

from __future__ import annotations

import torch

from bench.gpu.job import LeftOut
from encnet_triton.train.compiling import compile_obstacle


def ask_for_compiler(rehearse: bool) -> None:
    """Raises LeftOut in a rehearsal, and where torch.compile cannot work."""
    if rehearse:
        raise LeftOut("compilation takes minutes; a rehearsal does without")
    if obstacle := compile_obstacle(torch.device("cuda")):
        raise LeftOut(obstacle)
