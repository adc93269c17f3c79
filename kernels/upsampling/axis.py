"""Where the places of a map lie between those of the smaller map it is upsampled from.

One direction at a time: what a program of each kernel takes of it follows from that alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Optional

from ..runtime.launch import cdiv

# Forward: the most output rows of a program.
_MOST_ROWS = 9
# Backward: the most low columns that a program may own, and the widths to choose from.
LOW_COLUMNS = 32
_WIDTHS = (256, 128, 64, 32)


@dataclass(frozen=True)
class Axis:
    """One direction of the map, upsampled from `low` to `high` places."""

    low: int
    high: int
    align_corners: bool

    def before(self, place: int) -> int:
        """The low place at or before an output place, -1 where it is before all of them."""
        if self.align_corners:
            return place * (self.low - 1) // max(self.high - 1, 1)
        return max((2 * place + 1) * self.low - self.high, -1) // (2 * self.high)

    def first_after(self, index: int) -> int:
        """The first output place that does not lie before low place `index`."""
        if index < 0:
            return 0
        if index >= self.low:
            return self.high
        if self.align_corners:
            first = cdiv(index * max(self.high - 1, 1), max(self.low - 1, 1))
        else:
            first = cdiv(2 * self.high * index + self.high - self.low, 2 * self.low)
        return min(max(first, 0), self.high)

    @property
    def gaps(self) -> range:
        """The low places that outputs may lie at or after."""
        return range(0 if self.align_corners else -1, self.low)


@cache
def rows_of_part(axis: Axis) -> tuple[int, int]:
    """Output rows of a program of the forward pass, and in how many parts the rows of a gap come.

    A program has rows that lie between the same two low rows, or beyond the first or last one.
    """
    most = max(axis.first_after(i + 1) - axis.first_after(i) for i in axis.gaps)
    rows = max(1, min(most, _MOST_ROWS))
    return rows, cdiv(most, rows)


@cache
def strip_of(axis: Axis) -> Optional[tuple[int, int]]:
    """Low columns that a program of the backward pass owns, and the width that all theirs fit in.

    The pair with the fewest threads in total; None if even one low column touches too many.
    """
    found: list[tuple[int, int, int]] = []
    for width, own in itertools.product(_WIDTHS, range(1, LOW_COLUMNS + 1)):
        strips = range(0, axis.low, own)
        if all(axis.first_after(c + own) - axis.first_after(c - 1) <= width for c in strips):
            found.append((len(strips) * width, own, width))
    if not found:
        return None
    _, own, width = min(found)
    return own, width


@cache
def places_of_cell(axis: Axis) -> tuple[int, int]:
    """The most outputs between two low places, and how many there mostly are: those or one less."""
    counts = [axis.first_after(i + 1) - axis.first_after(i) for i in axis.gaps]
    most = max(counts)
    return most, most - 1 if most > 1 and 2 * counts.count(most) < len(counts) else most


@cache
def rows_of_segment(low: int, columns: int, processors: int) -> int:
    """Low rows of a program of the backward pass by cells, where `columns` programs are side by
    side: the number with which the busiest multiprocessor visits the fewest gaps between rows."""

    def gaps(own: int) -> int:
        return cdiv(columns * cdiv(low, own), processors) * (own + 1)

    return min(range(low, 0, -1), key=gaps)
