"""The interface of data sets, and what all of them share.

A data set is a sequence of `Sample`s plus what a model trained on it must know:
class names, palette, mean and standard deviation. Labels are uint8 everywhere: 0..n-1 are classes,
255 is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_CLASSES",
    "DataError",
    "Dataset",
    "LabelValueError",
    "Sample",
    "class_difference",
    "default_palette",
    "few",
    "mean_colour",
    "read_content",
]

IGNORE_INDEX = 255
# One uint8 value is the ignored label and one marks a bad value while a label is checked.
MAX_CLASSES = 254

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """A file or option of a data set cannot be used; the message is one sentence for the user."""


class LabelValueError(DataError):
    """A label file has values that stand for no class: ``values``."""

    values: tuple[int, ...] = ()


def few(values: Sequence[object], most: int = 5) -> str:
    """Numbers or names with commas; only the first of many."""
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")


class Sample(NamedTuple):
    """One image and its label map.

    `image` is a PIL image in RGB (any mode that `images.decode` takes, and perhaps not decoded yet,
    when it comes from `Dataset.open`); `label` is uint8, H x W, of the image's size.
    """

    image: Image.Image
    label: NDArray[np.uint8]


class Dataset(Protocol):
    """Interface of every data set. Objects must be picklable: loader workers get a copy."""

    classes: tuple[str, ...]
    """Names of the n classes, in the order of their label values."""
    palette: NDArray[np.uint8]
    """n x 3 RGB colours for label maps."""
    ignore_index: int
    """The label value that is no class, always 255."""
    mean: tuple[float, float, float]
    """RGB mean for normalisation, in 0..1."""
    std: tuple[float, float, float]
    """RGB standard deviation for normalisation, in 0..1."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The decoded sample; DataError if a file is missing, damaged or does not fit."""
        ...

    def open(self, index: int) -> Sample:
        """As `__getitem__`, but the image may be undecoded, to be decoded at a smaller scale."""
        ...

    def name_of(self, index: int) -> str:
        """How to find the sample: the image's path, or the split and number of drawn data."""
        ...


def read_content(path: Path, what: str) -> bytes:
    """The content of a file; ``what`` describes it in errors.

    Raises:
        DataError: it is missing, not a file, or cannot be read; names it.
    """
    try:
        if not path.is_file():  # reading a pipe might never end
            there = "is not a file" if path.exists() else "does not exist"
            raise DataError(f"{what} {path} {there}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read ({error})") from error


def class_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The first class in which two lists differ, "class 3 is 'a', not 'b'"; None if they do not."""
    for number, (one, other) in enumerate(zip_longest(ours, theirs)):
        if one != other:
            shown = ("missing" if name is None else repr(name) for name in (one, other))
            return f"class {number} is {', not '.join(shown)}"
    return None


def mean_colour(mean: tuple[float, ...]) -> tuple[int, int, int]:
    """The RGB mean (0..1) as a uint8 colour, for the area outside an augmented image."""
    red, green, blue = (round(255 * channel) for channel in mean)
    return red, green, blue


def default_palette(count: int) -> NDArray[np.uint8]:
    """`count` x 3 distinct RGB colours, always the same; used for data sets without colours."""
    # Hue by the golden ratio keeps any prefix of the list well spread; brightness alternates
    # between neighbours.
    hue = (0.58 + 0.618034 * np.arange(count)) % 1.0
    value = np.array([0.92, 0.62, 0.78])[np.arange(count) % 3]
    saturation = np.array([0.60, 0.75, 0.45])[(np.arange(count) // 3) % 3]
    channel = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    colour = value[:, None] * (1 + saturation[:, None] * (np.clip(channel, 0, 1) - 1))
    palette: NDArray[np.uint8] = np.round(255 * colour).astype(np.uint8)
    return palette
