"""CIFAR-10 (Krizhevsky, 2009): all images of a split as one array.

Three layouts are read: the official ``cifar-10-batches-py`` and ``cifar-10-batches-bin``, and
folders of PNGs ``train/<class>/*.png`` and ``test/<class>/*.png``.
"""

from __future__ import annotations

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, read_content
from encnet_triton.data.files import visible
from encnet_triton.data.images import read_image
from encnet_triton.unpickle import NUMBERS, load_pickle

__all__ = ["CLASSES", "MEAN", "STD", "Images", "load_cifar10"]

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIDE, COUNT = 32, {"train": 50000, "test": 10000}
SOURCE = "its archives are at https://www.cs.toronto.edu/~kriz/cifar.html"

_BATCH = "batch of CIFAR-10"
_RECORD = 1 + 3 * SIDE * SIDE
_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


class Images(NamedTuple):
    """A split: images, uint8, N x 3 x 32 x 32 RGB; labels, uint8, N."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def load_cifar10(root: str | os.PathLike[str], split: str) -> Images:
    """Read a split, "train" or "test".

    Args:
        root: the folder that an official archive was unpacked in, or its inner folder, or one with
            ``train`` and ``test``.

    Raises:
        DataError: nothing there, or a file is damaged; one sentence that names it.
    """
    if split not in COUNT:
        raise DataError(f"CIFAR-10 has no split {split!r}; it has train and test")
    base = Path(root)
    if not base.is_dir():
        raise DataError(f"data folder {base} does not exist or is not a folder; {SOURCE}")
    for folder in (base, base / "cifar-10-batches-bin", base / "cifar-10-batches-py"):
        for suffix, read in ((".bin", _read_binary), ("", _read_pickle)):
            paths = [folder / f"{name}{suffix}" for name in _FILES[split]]
            if paths[0].is_file():
                return _joined([read(path) for path in paths])
    if (base / split).is_dir():
        return _read_folder(base / split)
    raise DataError(
        f"{base} has neither cifar-10-batches-bin nor cifar-10-batches-py nor a folder {split} "
        f"of PNGs; {SOURCE}"
    )


def _joined(parts: list[Images]) -> Images:
    return Images(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _checked(images: NDArray[np.uint8], labels: NDArray[np.uint8], path: Path) -> Images:
    """The images and labels of a file; DataError if they are not a complete batch."""
    count = len(labels) if labels.ndim == 1 else 0
    shapes = [(count, 3 * SIDE * SIDE), (count, 3, SIDE, SIDE)]
    if not count or images.shape not in shapes:
        raise DataError(
            f"{path} is damaged: its images are {images.shape} and its labels {labels.shape}, but "
            f"must be N x {3 * SIDE * SIDE} and N"
        )
    if labels.max() >= len(CLASSES):
        raise DataError(f"{path} is damaged: it has the label {labels.max()}, but they are 0..9")
    return Images(images.reshape(-1, 3, SIDE, SIDE), labels)


def _read_binary(path: Path) -> Images:
    content = read_content(path, _BATCH)
    if len(content) % _RECORD:
        raise DataError(f"{path} is cut short: {len(content)} bytes are not whole records")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return _checked(records[:, 1:], records[:, 0], path)


def _read_pickle(path: Path) -> Images:
    try:
        # The official files are from Python 2; copies that people re-saved are from Python 3.
        document = load_pickle(io.BytesIO(read_content(path, _BATCH)), NUMBERS, encoding="bytes")
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} is not a batch of CIFAR-10: it does not hold a dictionary")
    images, labels = (_small(document, name, path) for name in ("data", "labels"))
    return _checked(images, labels, path)


def _small(document: dict[Any, Any], name: str, path: Path) -> NDArray[np.uint8]:
    """An entry that is an array or list of whole numbers of 0 to 255."""
    value = document.get(name, document.get(name.encode()))
    if isinstance(value, list) and all(type(one) is int and 0 <= one < 256 for one in value):
        return np.array(value, np.uint8)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        small: NDArray[np.uint8] = value.astype(np.uint8)
        if (small == value).all():
            return small
    raise DataError(f"{path} is not a batch of CIFAR-10: its {name!r} are not numbers of 0 to 255")


def _read_folder(folder: Path) -> Images:
    places = [(folder / name, label) for label, name in enumerate(CLASSES)]
    missing = [place for place, _ in places if not place.is_dir()]
    if missing:
        raise DataError(f"folder {missing[0]} does not exist; there must be one for each class")
    files = [(path, label) for place, label in places for path in visible(place, "*.png")]

    def read(path: Path) -> NDArray[np.uint8]:
        image = read_image(path)
        if image.size != (SIDE, SIDE):
            raise DataError(f"image {path} is {image.width} x {image.height}, but must be 32 x 32")
        return np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, [path for path, _ in files]))
    if not images:
        raise DataError(f"{folder} has no PNGs in its class folders")
    labels = np.array([label for _, label in files], np.uint8)
    return _checked(np.stack(images), labels, folder)
