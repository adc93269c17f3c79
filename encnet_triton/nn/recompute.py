"""Activation checkpointing of residual blocks: less memory for more time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encnet_triton.nn.norm import kept_statistics

# A tensor, or one for either of the two things that use it.
Paths = TypeVar("Paths", Tensor, tuple[Tensor, Tensor])


def recomputed(
    block: nn.Module, x: Paths, forward: Callable[[Paths], Paths] | None = None
) -> Paths:
    """``block(x)``, for which backward keeps only ``x`` and recomputes the rest.

    Output and gradients are those of ``block(x)``. The running statistics of BatchNormAct layers
    move once, in the first pass. Layers that are synchronised over processes reduce once more, in
    the second. The block must not draw random numbers.

    Args:
        block: holds the layers.
        x: what it is given.
        forward: computes the block, if not the block itself.
    """
    function: Callable[..., Any] = forward or block

    def on_pair(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = function(tensors)
        return pair

    # Of its arguments `checkpoint` looks after the tensors.
    given = (on_pair, *x) if isinstance(x, tuple) else (function, x)
    run = partial(checkpoint, *given, use_reentrant=False, preserve_rng_state=False)
    # The compiler repeats operations, not Python code, so nothing moves twice there.
    y: Paths = run() if torch.compiler.is_compiling() else run(context_fn=partial(_contexts, block))
    return y


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first pass and for the second."""
    return nullcontext(), kept_statistics(block)
