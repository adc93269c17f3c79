"""One label map from the logits of many windows, one tile of pixels at a time.

At full resolution the class scores of an image of 683 x 512 pixels are 200 MB for 150 classes, and
those of its windows as much again. The network's logits are 1/64 of that. So the logits of all
windows are kept at low resolution, and each tile of the image is made from the windows that cover
it: their logits are upsampled there, their probabilities averaged, and the best class is taken
while they are in a cache. A tile has R x X pixels of n classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from encnet_triton.kernels.upsampling.tiles import Span, in_threads, runs, span

__all__ = ["View", "merged_labels"]

# Entries of a tile: two of them (values, and their average) fit into a cache of 1 MiB.
TILE_ENTRIES = 128 * 1024
# On an accelerator a tile only bounds the memory.
TILE_ENTRIES_ACCELERATOR = 16 * 1024 * 1024

_Run = tuple[int, int]  # start and stop


@dataclass(frozen=True)
class View:
    """A network's output for an image at one size.

    Attributes:
        size: height and width of the image in this view.
        crop: height and width of a window.
        tops, lefts: where windows start; each of the first with each of the second.
        windows: of each window, by its top and left, its logits and, with flip, those of its mirror
            image, mirrored back; as released, their sum. h x w x n each, float32 or float64,
            contiguous.
    """

    size: tuple[int, int]
    crop: tuple[int, int]
    tops: Sequence[int]
    lefts: Sequence[int]
    windows: dict[tuple[int, int], list[Tensor]]


def merged_labels(
    views: Sequence[View], size: tuple[int, int], *, align_corners: bool, released: bool = False
) -> Tensor:
    """The class of each pixel whose scores are the highest, H x W int64.

    The scores of a window are its probabilities, or, as released, the exponentials of its logits.
    A view's are the average over the windows at a pixel, and are resized to the image. Those of all
    views are added.

    Args:
        views: of one image, at least one.
        size: H and W of the image.
        align_corners: how logits are upsampled.
        released: see above; views are then resized with corners aligned, else never so.
    """
    merge = _Merge(views, size, align_corners, released)
    labels = torch.empty(size, dtype=torch.int64, device=merge.like.device)

    def work(tile: tuple[_Run, _Run]) -> None:
        (top, bottom), (left, right) = tile
        labels[top:bottom, left:right] = merge.best(*tile)

    for _ in in_threads(work, list(merge.tiles()), labels.device):
        pass
    return labels


class _Axis:
    """Bilinear interpolation in one direction; keeps the weights of runs that come again."""

    def __init__(self, low: int, full: int, align_corners: bool, like: Tensor) -> None:
        self._given = (low, full, align_corners, like)
        self._known: dict[_Run, Span] = {}

    def __call__(self, run: _Run) -> Span:
        found = self._known.get(run)
        if found is None:
            low, full, align_corners, like = self._given
            found = self._known[run] = span(low, full, *run, align_corners, like)
        return found


class _Scores:
    """Class scores of any part of a view."""

    def __init__(self, view: View, align_corners: bool, released: bool) -> None:
        self._view, self._released = view, released
        like = next(iter(view.windows.values()))[0]
        low = like.shape[:2]
        self._rows, self._columns = (
            _Axis(low[i], view.crop[i], align_corners, like) for i in range(2)
        )

    def cells(self) -> Iterator[tuple[_Run, _Run]]:
        """The parts of the view that are covered by the same windows throughout."""
        height, width = self._view.size
        rows = _covered((0, height), self._view.tops, self._view.crop[0])
        columns = _covered((0, width), self._view.lefts, self._view.crop[1])
        return product((run for run, _ in rows), [run for run, _ in columns])

    def average(self, rows: _Run, columns: _Run) -> Tensor:
        """Scores of a part, R x X x n, averaged over the windows at each pixel."""
        view, parts = self._view, []
        across = _covered(columns, view.lefts, view.crop[1])
        for down, tops in _covered(rows, view.tops, view.crop[0]):
            beside = [self._cell(down, part, tops, lefts) for part, lefts in across]
            parts.append(beside[0] if len(beside) == 1 else torch.cat(beside, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, rows: _Run, columns: _Run) -> Tensor | None:
        """Logits of a part that one window alone covers, unmirrored; None for another."""
        view = self._view
        ((_, tops), *more) = _covered(rows, view.tops, view.crop[0])
        ((_, lefts), *others) = _covered(columns, view.lefts, view.crop[1])
        if more or others or len(tops) * len(lefts) > 1:
            return None
        low, *mirrored = view.windows[tops[0], lefts[0]]
        return None if mirrored else self._upsampled(low, rows, columns, tops[0], lefts[0])

    def _cell(self, rows: _Run, columns: _Run, tops: list[int], lefts: list[int]) -> Tensor:
        total: Tensor | None = None
        for top, left in product(tops, lefts):
            for low in self._view.windows[top, left]:
                values = self._upsampled(low, rows, columns, top, left)
                values = values.exp_() if self._released else values.softmax(2)
                total = values if total is None else total.add_(values)
        assert total is not None  # every pixel is in a window
        return total.div_(len(tops) * len(lefts))

    def _upsampled(self, low: Tensor, rows: _Run, columns: _Run, top: int, left: int) -> Tensor:
        return _resized(
            low,
            self._rows((rows[0] - top, rows[1] - top)),
            self._columns((columns[0] - left, columns[1] - left)),
        )


class _Merge:
    """The scores of all views at the pixels of the image."""

    def __init__(
        self, views: Sequence[View], size: tuple[int, int], align_corners: bool, released: bool
    ) -> None:
        self._views, self._size = views, size
        self._alone = len(views) == 1 and views[0].size == size
        self._scores = [_Scores(view, align_corners, released) for view in views]
        self.like = next(iter(views[0].windows.values()))[0]
        self._axes = [
            [_Axis(view.size[i], size[i], released, self.like) for i in range(2)] for view in views
        ]

    def tiles(self) -> Iterator[tuple[_Run, _Run]]:
        """Cut the image into tiles; those of a single view as large as the image into its cells."""
        most = TILE_ENTRIES if self.like.device.type == "cpu" else TILE_ENTRIES_ACCELERATOR
        # A tile may be larger in a view than in the image.
        growth = max(1.0, *(math.prod(v.size) / math.prod(self._size) for v in self._views))
        edge = max(8, math.isqrt(int(most / (self.like.shape[2] * growth))))
        whole = [((0, self._size[0]), (0, self._size[1]))]
        for rows, columns in self._scores[0].cells() if self._alone else whole:
            yield from product(_cut(rows, edge), _cut(columns, edge))

    def best(self, rows: _Run, columns: _Run) -> Tensor:
        """The classes of a tile, R x X."""
        if self._alone:
            # Neither probabilities nor exponentials change which logit of a window is the largest.
            logits = self._scores[0].logits(rows, columns)
            if logits is not None:
                return logits.argmax(2)
        total: Tensor | None = None
        for view, scores, axes in zip(self._views, self._scores, self._axes, strict=True):
            if view.size == self._size:
                found = scores.average(rows, columns)
            else:
                down, across = axes[0](rows), axes[1](columns)
                seen = ((s.low.start, s.low.stop) for s in (down, across))
                found = _resized(scores.average(*seen), _moved(down), _moved(across))
            total = found if total is None else total.add_(found)
        assert total is not None  # there is at least one view
        return total.argmax(2)


def _covered(run: _Run, starts: Sequence[int], window: int) -> list[tuple[_Run, list[int]]]:
    """Cut a run where windows start or end; each part with the starts of those that cover it."""
    edges = {edge for start in starts for edge in (start, start + window) if run[0] < edge < run[1]}
    return [
        ((start, stop), [s for s in starts if s <= start and stop <= s + window])
        for start, stop in pairwise(sorted({*run, *edges}))
    ]


def _cut(run: _Run, longest: int) -> Iterator[_Run]:
    return ((run[0] + a, run[0] + b) for a, b in runs(run[1] - run[0], longest))


def _moved(of: Span) -> Span:
    """A span of inputs that are there from its first on."""
    return of._replace(low=slice(0, of.weight.shape[1]))


def _resized(low: Tensor, rows: Span, columns: Span) -> Tensor:
    """The part of a bilinearly resized map h x w x n that two spans name, R x X x n."""
    part = low[rows.low, columns.low]
    wide = columns.weight.expand(len(part), *columns.weight.shape).bmm(part)
    return (rows.weight @ wide.flatten(1)).view(-1, *wide.shape[1:])
