"""The views of an image, by scale and mirrored, that are averaged into one prediction."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPER_SCALES", "SINGLE_VIEW", "Views"]

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""The published code's; the paper says "multiple scales" and names none."""


@dataclass(frozen=True)
class Views:
    """Which views of an image are averaged into one prediction.

    Attributes:
        scales: relative to the size of a single view.
        flip: the mirrored image as well.
        released: as the published evaluation code does it. Logits of an image and of its mirror
            image are added and the exponential of the sum is averaged, without normalising it over
            the classes; the long edge is scaled; windows at the border are cut off, not moved, and
            what lies outside the image is black.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    released: bool = False

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise ValueError(f"scales must be one or more numbers in (0, 8], got {self.scales}")


SINGLE_VIEW = Views()
