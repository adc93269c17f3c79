"""The windows, of the size that a network was trained on, that cover an image."""

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


def filled(window: Tensor, crop: tuple[int, int]) -> Tensor:
    """A window that reaches beyond the image, filled up with the mean colour."""
    return F.pad(window, (0, crop[1] - window.shape[3], 0, crop[0] - window.shape[2]))
