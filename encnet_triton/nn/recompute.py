"""Activation checkpointing of residual blocks: less memory for more time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encnet_triton.nn.norm import kept_statistics

# A tensor, or one for either of the two things that use it.
Paths = TypeVar("Paths", Tensor, tuple[Tensor, Tensor])


def recomputed(block: nn.Module, x: Paths) -> Paths:
    """``block(x)``, for which backward keeps only ``x`` and recomputes the rest.

    Output and gradients are those of ``block(x)``. The running statistics of BatchNormAct layers
    move once, in the first pass. Layers that are synchronised over processes reduce once more, in
    the second. The block must not draw random numbers.
    """

    def on_pair(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = block(tensors)
        return pair

    # Of its arguments `checkpoint` looks after the tensors.
    given = (on_pair, *x) if isinstance(x, tuple) else (block, x)
    run = partial(checkpoint, *given, use_reentrant=False, preserve_rng_state=False)
    # The compiler repeats operations, not Python code, so nothing moves twice there.
    y: Paths = run() if torch.compiler.is_compiling() else run(context_fn=partial(_contexts, block))
    return y


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first pass and for the second."""
    return nullcontext(), kept_statistics(block)
