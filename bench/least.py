"""Bytes that a forward and a backward pass of each operator must move at least.

Inputs are read and outputs written once a pass over the data. `size` is the bytes of a value of x.
"""

from __future__ import annotations


def encode(*, B: int, C: int, N: int, K: int, size: int) -> tuple[int, int]:
    """x, E and codewords; x, dx, dE, codewords and their gradient. E and codewords are float32."""
    x, code, codewords = size * B * N * C, 4 * B * K * C, 4 * K * C
    return x + code + codewords, 2 * x + code + 2 * codewords


def batch_norm(
    *,
    B: int,
    C: int,
    N: int,
    size: int,
    residual: bool,
    relu: bool = True,
    frozen: bool = False,
    channels_last: bool = True,
    forked: bool = False,
    projected: bool = False,
) -> tuple[int, int]:
    """Tensors of x's size: x twice, residual, y; dy and x twice, dx, dresidual; a mask of bits.

    Frozen statistics need x, and dy and x, once. A result that has two uses (`forked`) needs both
    gradients and x, g written; g and x, dx. A residual that is normalised (`projected`), in
    training, is read once more forward, and by both passes backward.
    """
    whole = size * B * C * N
    rows, width = (B * N, C) if channels_last else (B * C, N)
    mask = rows * -(-width // 8) if residual and relu else 0
    forward = whole * (2 + (not frozen) + residual + projected) + (0 if frozen else mask)
    if forked:
        return forward, whole * (10 if projected else 7) + mask
    if projected:
        return forward, whole * 8 + mask * 2
    passes = 1 if frozen else 2
    reads = 2 if not frozen or relu or residual else 1
    return forward, whole * (reads * passes + 1 + bool(mask)) + mask * passes


def upsample(*, B: int, C: int, low: int, high: int, size: int) -> tuple[int, int]:
    """Logits, labels of a byte and a float32 per pixel; the gradient as well.

    `low` and `high` are pixels of an image before and after.
    """
    logits, pixels = size * B * C * low, B * high
    return logits + 5 * pixels, 2 * logits + 5 * pixels
