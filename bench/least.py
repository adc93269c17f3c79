"""The least bytes that a forward and a backward pass of each operator must move.

Each pass over the data reads its inputs and writes its outputs once. `size` is bytes per value of
x.
"""

from __future__ import annotations


def encode(*, B: int, C: int, N: int, K: int, size: int) -> tuple[int, int]:
    """Forward x, E and codewords; backward x, dx, dE, codewords and their gradient.

    E and codewords are float32.
    """
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
    """Tensors of x's size: forward x twice, residual, y; backward dy and x twice, dx, dresidual.

    A ReLU after a residual adds a bit mask. With frozen statistics one pass suffices, so dy and x
    are read once. If the result has two uses (`forked`), the first backward pass reads both
    gradients and x and writes g, the second reads g and x and writes dx. In training a normalised
    residual (`projected`) is read once more forward, and in both passes backward.
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
    """Logits and, per pixel, a label of one byte and a float32; backward the gradient as well.

    `low` and `high` count the pixels of an image before and after upsampling.
    """
    logits, pixels = size * B * C * low, B * high
    return logits + 5 * pixels, 2 * logits + 5 * pixels
