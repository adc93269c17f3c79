"""Windows of the training size that cover an image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["WHOLE_IMAGE_WARNING", "filled", "resized", "window_starts"]

WHOLE_IMAGE_WARNING = (
    "Whole images go through the network at once: the Encoding layer sums over more pixels than in "
    "training, so its batch normalisation sees other statistics. The default is windows."
)


def window_starts(size: int, window: int, flush: bool = True) -> list[int]:
    """Offsets of windows covering ``size`` pixels, about 2/3 of a window apart.

    The last is moved to end with the image, or, with ``flush`` False, reaches beyond it.
    """
    if size <= window:
        return [0]
    stride = max(1, window * 2 // 3)
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) if flush else i * stride for i in range(count)]


def resized(
    height: int, width: int, base_size: int | None, scale_by: str, scale: float = 1.0
) -> tuple[int, int]:
    """Size of an image whose short or long edge has been scaled to ``base_size`` pixels, or that
    keeps its own, times ``scale``."""
    factor = scale
    if base_size is not None and scale_by != "image":
        edge = min(height, width) if scale_by == "short" else max(height, width)
        factor *= base_size / edge
    return max(1, round(height * factor)), max(1, round(width * factor))


def filled(window: Tensor, crop: tuple[int, int], colour: Tensor | None = None) -> Tensor:
    """A window that reaches beyond the image, filled up below and on the right.

    Args:
        window: 1 x 3 x h x w, normalised.
        crop: height and width to fill up to; where the window has more, it keeps it.
        colour: 1 x 3 x 1 x 1, normalised; None for 0, which is the mean colour.
    """
    height, width = (max(n, size) for n, size in zip(crop, window.shape[2:], strict=True))
    if (height, width) == window.shape[2:]:
        return window
    if colour is None:
        return F.pad(window, (0, width - window.shape[3], 0, height - window.shape[2]))
    whole = colour.expand(len(window), -1, height, width).clone()
    whole[:, :, : window.shape[2], : window.shape[3]] = window
    return whole
