"""Check every file of a data set before a run does: ``python -m encnet_triton.data check``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, Dataset, LabelValueError, few
from encnet_triton.data.folder import Folder

__all__ = [
    "SplitReport",
    "UnlabelledError",
    "check_split",
    "first_look",
    "label_of",
    "refuse_unlabelled",
]

MOST_PROBLEMS = 20
FIRST_LOOK = 20


class UnlabelledError(DataError):
    """No pixel of a split has a label."""


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
        notes: warnings that are not errors.
    """

    images: int
    looked_at: int
    pixels: NDArray[np.int64]
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    ignored: int = 0
    problems: list[str] = field(default_factory=list)
    bad: int = 0
    notes: list[str] = field(default_factory=list)


Found = tuple[tuple[int, ...], NDArray[np.int64]] | DataError


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
        expected: allowed numbers of images of the published split; none if unknown.
        every: look at every n-th image.
        workers: threads that decode.
        progress: wraps the results, to show progress.
    """
    if every < 1 or workers < 1:
        raise ValueError(f"every {every} and workers {workers} must be at least 1")
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
            return error
        return label.shape, np.bincount(label.ravel(), minlength=256)

    shapes: list[tuple[int, ...]] = []
    wrong: list[LabelValueError] = []
    with ThreadPoolExecutor(workers) as pool:
        for found in progress(pool.map(look, indices)):
            if isinstance(found, DataError):
                report.bad += 1
                if isinstance(found, LabelValueError):
                    wrong.append(found)
                elif len(report.problems) < MOST_PROBLEMS:
                    report.problems.append(str(found))
                continue
            shape, histogram = found
            shapes.append(shape)
            report.pixels += histogram[:n]
            report.ignored += int(histogram[dataset.ignore_index])
    if wrong:
        report.problems.append(_wrong_values(wrong))
        if isinstance(dataset, Folder):
            report.notes.append(_what_values_mean(dataset, wrong))
    if shapes:
        heights, widths = zip(*shapes, strict=True)
        report.sizes = (min(heights), min(widths)), (max(heights), max(widths))
    if shapes and not report.pixels.any() and has_labels(dataset):
        report.problems.append(_nothing_labelled(dataset, len(shapes)))
    absent = [dataset.classes[c] for c in range(n) if report.pixels[c] == 0]
    if absent and report.pixels.any():
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        report.notes.append(f"{len(absent)} of {n} classes do not occur: {shown}")
    if lone := _lone_class(dataset, report.pixels, report.ignored):
        report.notes.append(lone)
    report.notes += _left_out_files(dataset)
    return report


def has_labels(dataset: Dataset) -> bool:
    """False for the test split of a published data set."""
    return bool(getattr(dataset, "has_labels", True))


def label_of(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    """A label; does not open the image if the label has its own file."""
    read = getattr(dataset, "label", None)
    label: NDArray[np.uint8] = dataset.open(index).label if read is None else read(index)
    return label


def refuse_unlabelled(dataset: Dataset, what: str) -> None:
    """Look for a labelled pixel, in the order of the images.

    Raises:
        UnlabelledError: there is none; begins with ``what``.
    """
    for index in range(len(dataset)):
        if (label_of(dataset, index) != dataset.ignore_index).any():
            return
    raise UnlabelledError(f"{what}: {_nothing_labelled(dataset, len(dataset))}")


def first_look(dataset: Dataset) -> list[str]:
    """Warnings before a run: files left out, and what `FIRST_LOOK` labels, evenly spaced, say."""
    if not hasattr(dataset, "label"):  # drawn
        return []
    indices = np.linspace(0, len(dataset) - 1, min(FIRST_LOOK, len(dataset))).round().astype(int)
    found = np.zeros(256, np.int64)
    for index in indices.tolist():
        found += np.bincount(label_of(dataset, index).ravel(), minlength=256)
    note = _lone_class(dataset, found[: len(dataset.classes)], int(found[dataset.ignore_index]))
    noted = [f"in {len(indices)} of {len(dataset)} labels, {note}"] if note else []
    return noted + _left_out_files(dataset)


def _left_out_files(dataset: Dataset) -> list[str]:
    return list(getattr(dataset, "notes", ()))


def _left_out(dataset: Dataset) -> tuple[int, ...]:
    """Label values in the files that are ignored."""
    return tuple(getattr(dataset, "left_out", (dataset.ignore_index,)))


def _wrong_values(wrong: list[LabelValueError]) -> str:
    """The first label, and the values of all others: what is wrong is mostly the same in each."""
    if not (others := wrong[1:]):
        return str(wrong[0])
    values = few(sorted({value for error in others for value in error.values}), most=20)
    labels = "1 more label has" if len(others) == 1 else f"{len(others):,} more labels have"
    return f"{wrong[0]}; {labels} such values: {values}"


def _what_values_mean(dataset: Dataset, wrong: list[LabelValueError]) -> str:
    """The options for label values that stand for no class."""
    bad = {value for error in wrong for value in error.values}
    ignored = ",".join(map(str, sorted({*_left_out(dataset), *bad}))) if len(bad) <= 8 else "V,..."
    return (
        f"if these values mean no class, say --ignore-label {ignored}; if the first class is 1, "
        "--label-offset -1; --label-map VALUE=CLASS,... gives any value a class, counted from 0"
    )


def _nothing_labelled(dataset: Dataset, count: int) -> str:
    values = ", ".join(map(str, _left_out(dataset)))
    return (
        f"no pixel of {count} images has a class; all have an ignored label value ({values}), or "
        "there are no labels"
    )


def _lone_class(dataset: Dataset, pixels: NDArray[np.int64], ignored: int) -> str | None:
    """A warning about labels with only one of several classes, such as masks of 0 and 255."""
    (present,) = pixels.nonzero()
    if len(dataset.classes) == 1 or len(present) != 1:
        return None
    (only,) = present.tolist()
    note = f"{dataset.classes[only]!r} is the only class, no pixel has another"
    values = _left_out(dataset)
    if ignored:
        other = next(c for c in range(len(dataset.classes)) if c != only)
        note += (
            f"; {ignored / (ignored + int(pixels.sum())):.1%} of the pixels are ignored (label "
            f"value {', '.join(map(str, values))})"
        )
        if values == (dataset.ignore_index,):  # the default
            note += (
                f": if that stands for {dataset.classes[other]!r}, say --label-map "
                f"{values[0]}={other}"
            )
    return note
