"""Shared by data sets that read files: pairs of an image and a label file."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    LabelValueError,
    Sample,
    default_palette,
    few,
    read_content,
)
from encnet_triton.data.images import decode, open_image, read_label

__all__ = [
    "FileDataset",
    "Pair",
    "check_present",
    "composed",
    "find_root",
    "read_json",
    "read_lines",
    "read_text",
    "visible",
]

_BAD_VALUE = IGNORE_INDEX - 1

Pair = tuple[Path, Path | None]
"""An image and its label; None where there is no label, as in a test split."""


class FileDataset:
    """Images and their label files.

    Args:
        pairs: the files, in order.
        classes: names of the n classes.
        values: label value in the files -> class 0..n-1, or 255 for no class. Any other value in a
            file is an error.
        allowed: the end of that error's sentence: what the values mean.
        palette: n x 3 colours; `default_palette` if None.
        mean, std: RGB statistics in 0..1 for normalisation, ImageNet's by default.

    The label of an image without one is 255 everywhere.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: Sequence[str],
        *,
        values: Mapping[int, int],
        allowed: str,
        palette: NDArray[np.uint8] | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        self.classes = tuple(classes)
        self.palette = default_palette(len(self.classes)) if palette is None else palette
        self.mean = mean
        self.std = std
        self._pairs = list(pairs)
        self._values = dict(values)
        self._allowed = allowed
        self._table = bytes(self._values.get(value, _BAD_VALUE) for value in range(256))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.open(index)
        return Sample(decode(image), label)

    def open(self, index: int) -> Sample:
        image_path, label_path = self._pairs[index]
        image = open_image(image_path)
        size = (image.height, image.width)
        if label_path is None:
            return Sample(image, np.full(size, IGNORE_INDEX, np.uint8))
        label = self._read_label(label_path)
        if label.shape != size:
            turned = label.shape == size[::-1]
            raise DataError(
                f"image {image_path} is {image.width} x {image.height} pixels, but its "
                f"label {label_path} is {label.shape[1]} x {label.shape[0]}; they must be equal"
                + (" once both are turned as their EXIF orientation says" if turned else "")
            )
        return Sample(image, label)

    def label(self, index: int) -> NDArray[np.uint8]:
        """The label alone; does not open the image if the label has its own file."""
        path = self._pairs[index][1]
        return self.open(index).label if path is None else self._read_label(path)

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label file."""
        return any(label is not None for _, label in self._pairs)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Label values in the files that are no class."""
        return tuple(sorted(v for v, c in self._values.items() if c == IGNORE_INDEX))

    def name_of(self, index: int) -> str:
        return str(self._pairs[index][0])

    def _read_label(self, path: Path) -> NDArray[np.uint8]:
        """A label file's values turned into 0..n-1 and 255."""
        values = read_label(path)
        if values.dtype != np.uint8:
            return self._map_deep(values.astype(np.int64, copy=False), path)
        mapped = np.frombuffer(bytearray(values.tobytes()).translate(self._table), np.uint8)
        mapped = mapped.reshape(values.shape)
        if not self._fits(mapped):
            table = np.frombuffer(self._table, np.uint8)
            found = np.unique(values)
            self._refuse(found[table[found] == _BAD_VALUE], path)
        return mapped

    def _fits(self, mapped: NDArray[np.uint8]) -> bool:
        # 255 wraps to 0, so one maximum tells whether all values are classes or ignored.
        return bool((mapped + np.uint8(1)).max() <= len(self.classes))

    def _map_deep(self, values: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
        """As the table does, for labels of 16 or 32 bits."""
        found, inverse = np.unique(values, return_inverse=True)
        table = np.array(
            [self._values.get(value, _BAD_VALUE) for value in found.tolist()], np.uint8
        )
        if (table == _BAD_VALUE).any():
            self._refuse(found[table == _BAD_VALUE], path)
        return table[inverse].reshape(values.shape)

    def _refuse(self, bad: NDArray[np.int64] | NDArray[np.uint8], path: Path) -> None:
        values = tuple(bad.tolist())
        what = "value" if len(values) == 1 else "values"
        error = LabelValueError(f"label {path} has the {what} {few(values)}, but {self._allowed}")
        error.values = values
        raise error


def composed(name: str) -> str:
    """A name in composed Unicode form: é is one character, where macOS stores e and an accent."""
    return unicodedata.normalize("NFC", name)


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files that match a pattern below a folder, by name; no hidden ones such as macOS's ._x."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_text(path: Path, what: str) -> str:
    """A UTF-8 text file, or of UTF-16 with a byte order mark; DataError otherwise."""
    content = read_content(path, what)
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{what} {path} is not UTF-8 text: line {line} has the byte "
            f"0x{content[error.start]:02x}; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(f"{what} {path} is not text: it has bytes of zero")
    return text


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file; raises what `read_text` raises."""
    return re.split(r"\r\n|\r|\n", read_text(path, what))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; DataError if there is none."""
    try:
        document = json.loads(read_content(path, what))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DataError(f"{what} {path} does not hold a JSON object")
    return document


def check_present(pairs: Iterable[Pair], listing: Path) -> list[Pair]:
    """The pairs with their names as on disk, where an é may be stored in another form.

    Raises:
        DataError: files of the list do not exist; found now rather than hours into a run.
    """
    disk = _Disk()
    missing: list[Path] = []

    def found(path: Path) -> Path:
        there = disk.find(path)
        if there is None:
            missing.append(path)
        return there or path

    present = [(found(image), label and found(label)) for image, label in pairs]
    if missing:
        others = f" (nor do {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(f"{listing} names {missing[0]}, which does not exist{others}")
    return present


class _Disk:
    """Looks names up; on network storage, one listing per folder is far cheaper than one look-up
    per file."""

    def __init__(self) -> None:
        self._folders: dict[Path, tuple[Path, frozenset[str], dict[str, str]] | None] = {}

    def find(self, path: Path) -> Path | None:
        """The path as it is on disk; None if it is not there."""
        folder = self._folder(path.parent)
        if folder is None:
            return None
        place, names, by_composed = folder
        name = path.name if path.name in names else by_composed.get(composed(path.name))
        return None if name is None else place / name

    def _folder(self, path: Path) -> tuple[Path, frozenset[str], dict[str, str]] | None:
        if path not in self._folders:
            self._folders[path] = self._listed(path)
        return self._folders[path]

    def _listed(self, path: Path) -> tuple[Path, frozenset[str], dict[str, str]] | None:
        place: Path | None = path
        if not os.path.isdir(path):  # which is never an error, unlike Path's
            place = self.find(path) if path.parent != path else None
        if place is None or not os.path.isdir(place):
            return None
        names = os.listdir(place)
        return place, frozenset(names), {composed(name): name for name in sorted(names)}


def find_root(root: str | os.PathLike[str], below: Sequence[str], marker: str, source: str) -> Path:
    """The folder, among ``root`` and the paths ``below`` it, that holds ``marker``.

    Users give the folder they unpacked an archive into as often as the one inside it.
    """
    given = Path(root)
    if not given.is_dir():
        raise DataError(f"data folder {given} does not exist or is not a folder; {source}")
    places = [given, *(given / name for name in below)]
    for place in places:
        if (place / marker).is_dir():
            return place
    inside = "".join(f" or {name}/{marker}" for name in below)
    raise DataError(f"{given} has no folder {marker}{inside}; {source}")
