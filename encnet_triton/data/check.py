"""Look at every file of a data set before a run does: ``python -m encnet_triton.data check``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, Dataset

__all__ = ["SplitReport", "check_split"]

MOST_PROBLEMS = 20


@dataclass
class SplitReport:
    """What a split holds.

    Attributes:
        images: how many there are.
        looked_at: how many of them were opened.
        sizes: (smallest, largest) height and width, in pixels; None if no image could be read.
        pixels: of each class, int64.
        ignored: pixels of no class.
        problems: one sentence each, at most `MOST_PROBLEMS` of ``bad``.
        bad: images that cannot be used.
        notes: what a person should know, which is no error.
    """

    images: int
    looked_at: int
    pixels: NDArray[np.int64]
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    ignored: int = 0
    problems: list[str] = field(default_factory=list)
    bad: int = 0
    notes: list[str] = field(default_factory=list)


Found = tuple[tuple[int, ...], NDArray[np.int64]] | str


def check_split(
    dataset: Dataset,
    expected: tuple[int, ...] = (),
    *,
    every: int = 1,
    workers: int = 4,
    progress: Callable[[Iterable[Found]], Iterable[Found]] = iter,
) -> SplitReport:
    """Decode every image and label; sizes must agree and label values be classes.

    Args:
        dataset: the split.
        expected: numbers of images that the published split has; none where it is not known.
        every: look at one of so many images.
        workers: threads that decode.
        progress: wraps what is found, to show how far it is.
    """
    n = len(dataset.classes)
    indices = range(0, len(dataset), every)
    report = SplitReport(len(dataset), len(indices), np.zeros(n, np.int64))
    if expected and len(dataset) not in expected:
        report.problems.append(
            f"{len(dataset):,} images, but the published split has "
            + " or ".join(f"{count:,}" for count in expected)
        )

    def look(index: int) -> Found:
        try:
            label = dataset[index].label
        except DataError as error:
            return str(error)
        return label.shape, np.bincount(label.ravel(), minlength=256)

    shapes: list[tuple[int, ...]] = []
    with ThreadPoolExecutor(workers) as pool:
        for found in progress(pool.map(look, indices)):
            if isinstance(found, str):
                report.bad += 1
                if len(report.problems) < MOST_PROBLEMS:
                    report.problems.append(found)
                continue
            shape, histogram = found
            shapes.append(shape)
            report.pixels += histogram[:n]
            report.ignored += int(histogram[dataset.ignore_index])
    if shapes:
        heights, widths = zip(*shapes, strict=True)
        report.sizes = (min(heights), min(widths)), (max(heights), max(widths))
    absent = [dataset.classes[c] for c in range(n) if report.pixels[c] == 0]
    if absent and report.pixels.any():
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        report.notes.append(f"{len(absent)} of {n} classes do not occur: {shown}")
    return report
