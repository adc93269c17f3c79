"""Activation checkpointing of residual blocks: less memory for more time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encnet_triton.nn.norm import kept_statistics


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, for which backward keeps only ``x`` and recomputes the rest.

    Output and gradients are those of ``block(x)``. The running statistics of BatchNormAct layers
    move once, in the first pass. Layers that are synchronised over processes reduce once more, in
    the second. The block must not draw random numbers.
    """
    run = partial(checkpoint, block, x, use_reentrant=False, preserve_rng_state=False)
    # The compiler repeats operations, not Python code, so nothing moves twice there.
    y: Tensor = (
        run() if torch.compiler.is_compiling() else run(context_fn=partial(_contexts, block))
    )
    return y


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first pass and for the second."""
    return nullcontext(), kept_statistics(block)
