"""`folder`: a data set from image and label files of one's own.

Two layouts are understood below the root folder:

- a list file `train.txt`, `val.txt`, ... with one `image label` pair a line, relative to the root
  (separated by a tab if a line has one, else by white space);
- folders `images/train`, `images/val` and `labels/train`, `labels/val`, paired by file name without
  suffix; or `images` and `labels` alone, of which every tenth pair, in the order of names, is for
  validation.

`classes.txt` has one class name a line, in the order of label values. Labels are single-channel or
palette images whose pixel values are the classes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from encnet_triton.data.base import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CLASSES,
    UNREADABLE,
    DataError,
    Sample,
    decode,
    default_palette,
)

__all__ = ["Folder"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
VALIDATION_EVERY = 10

_BAD_VALUE = IGNORE_INDEX - 1
_SHALLOW_MODES = ("1", "L", "P")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")

Pair = tuple[Path, Path]


class Folder:
    """Images and labels of a folder; see the module docstring for its layouts.

    Args:
        root: the folder.
        split: "train", "val", or another name that has a list file or folders.
        classes_file: file with the class names, relative to the root. Names at its end that stand
            for an ignored label value ("void") are left out.
        ignore_label: label value or values in the files that are no class; 255 by default.
        label_offset: added to the other values, -1 for files whose first class is 1.
        mean, std: RGB statistics in 0..1 for normalisation, ImageNet's by default.

    Raises DataError, with one sentence that names the file, where something is missing or does not
    fit.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        classes_file: str | os.PathLike[str] = "classes.txt",
        ignore_label: int | Sequence[int] = IGNORE_INDEX,
        label_offset: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"data folder {self.root} does not exist or is not a folder")
        self.split = split
        self._ignored = (ignore_label,) if isinstance(ignore_label, int) else tuple(ignore_label)
        self._offset = label_offset
        self._classes_file = self.root / classes_file
        self.classes = _class_names(self._classes_file, self._ignored, label_offset)
        self.palette = default_palette(len(self.classes))
        self.mean = mean
        self.std = std
        self._pairs = _find_pairs(self.root, split)
        self._table = bytes(self._map_value(value) for value in range(256))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.open(index)
        return Sample(decode(image), label)

    def open(self, index: int) -> Sample:
        image_path, label_path = self._pairs[index]
        image = _open(image_path, "image")
        label = _open(label_path, "label")
        if image.size != label.size:
            raise DataError(
                f"image {image_path} is {image.width} x {image.height} pixels, but its "
                f"label {label_path} is {label.width} x {label.height}; they must be equal"
            )
        return Sample(image, self._read_label(label, label_path))

    def name_of(self, index: int) -> str:
        return str(self._pairs[index][0])

    def _map_value(self, value: int) -> int:
        if value in self._ignored:
            return IGNORE_INDEX
        mapped = value + self._offset
        return mapped if 0 <= mapped < len(self.classes) else _BAD_VALUE

    def _read_label(self, image: Image.Image, path: Path) -> NDArray[np.uint8]:
        """Decode a label file and turn its values into 0..n-1 and 255."""
        if image.mode not in _SHALLOW_MODES + _DEEP_MODES:
            raise DataError(
                f"label {path} has pixel format {image.mode}; a label must be a single-channel or "
                "palette image whose values are class numbers"
            )
        try:
            image.load()
        except UNREADABLE as error:
            raise DataError(f"label {path} is truncated or damaged ({error})") from error
        if image.mode in _DEEP_MODES:
            return self._map_deep(np.asarray(image).astype(np.int64), path)
        if image.mode == "1":
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        mapped = np.frombuffer(bytearray(image.tobytes()).translate(self._table), np.uint8)
        mapped = mapped.reshape(image.height, image.width)
        if not self._fits(mapped):
            table = np.frombuffer(self._table, np.uint8)
            values = np.unique(np.asarray(image))
            self._refuse(values[table[values] == _BAD_VALUE], path)
        return mapped

    def _fits(self, mapped: NDArray[np.uint8]) -> bool:
        # 255 wraps to 0, so one maximum tells whether all values are classes or ignored.
        return bool((mapped + np.uint8(1)).max() <= len(self.classes))

    def _map_deep(self, values: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
        """As the table does, for labels of 16 or 32 bits."""
        found, inverse = np.unique(values, return_inverse=True)
        table = np.array([self._map_value(value) for value in found.tolist()], np.uint8)
        if (table == _BAD_VALUE).any():
            self._refuse(found[table == _BAD_VALUE], path)
        return table[inverse].reshape(values.shape)

    def _refuse(self, bad: NDArray[np.int64] | NDArray[np.uint8], path: Path) -> None:
        shown = ", ".join(str(value) for value in bad[:5].tolist())
        more = ", ..." if len(bad) > 5 else ""
        first, last = -self._offset, len(self.classes) - 1 - self._offset
        ignored = ", ".join(str(value) for value in self._ignored)
        raise DataError(
            f"label {path} has the value {shown}{more}, but the {len(self.classes)} classes of "
            f"{self._classes_file} stand for {first}..{last} (ignored: {ignored}; "
            f"label_offset: {self._offset})"
        )


def _open(path: Path, what: str) -> Image.Image:
    try:
        # From memory, because Pillow would keep the file open until it is decoded.
        image = Image.open(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist") from None
    except UnidentifiedImageError:
        raise DataError(f"{what} {path} is not an image of a known format") from None
    except UNREADABLE as error:
        raise DataError(f"{what} {path} cannot be read ({error})") from error
    image.filename = str(path)  # type: ignore[attr-defined]
    return image


def _read_lines(path: Path, what: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path} cannot be read ({error})") from error


def _class_names(path: Path, ignored: tuple[int, ...], offset: int) -> tuple[str, ...]:
    lines = _read_lines(path, "class names file")
    names = [line.strip() for line in lines if line.strip()]
    while names and len(names) - 1 - offset in ignored:
        names.pop()
    if not 1 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{path} names {len(names)} classes; 1 to {MAX_CLASSES} are allowed")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DataError(f"{path} names the class {repeated[0]!r} twice")
    return tuple(names)


def _find_pairs(root: Path, split: str) -> list[Pair]:
    listing = root / f"{split}.txt"
    if listing.is_file():
        pairs = _listed_pairs(root, listing)
        where = str(listing)
    else:
        pairs = _folder_pairs(root, split)
        where = f"split {split!r} of {root}"
    if not pairs:
        raise DataError(f"the data set is empty: {where} has no images")
    return pairs


def _listed_pairs(root: Path, listing: Path) -> list[Pair]:
    pairs: list[Pair] = []
    for number, line in enumerate(_read_lines(listing, "list file"), start=1):
        if not line.strip():
            continue
        fields = [f.strip() for f in line.split("\t")] if "\t" in line else line.split()
        if len(fields) != 2:
            raise DataError(
                f"{listing} line {number} must be an image and a label path, got {line.strip()!r} "
                "(separate paths that contain spaces by a tab)"
            )
        pairs.append((root / fields[0], root / fields[1]))
    _check_present(pairs, listing)
    return pairs


def _check_present(pairs: Iterable[Pair], listing: Path) -> None:
    """Refuse a list with files that do not exist now rather than hours into a run."""
    # One listing a folder is far cheaper than one look-up a file on network storage.
    present: dict[Path, frozenset[str]] = {}
    missing: list[Path] = []
    for path in (path for pair in pairs for path in pair):
        if path.parent not in present:
            names = os.listdir(path.parent) if path.parent.is_dir() else []
            present[path.parent] = frozenset(names)
        if path.name not in present[path.parent]:
            missing.append(path)
    if missing:
        others = f" (nor do {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(f"{listing} names {missing[0]}, which does not exist{others}")


def _folder_pairs(root: Path, split: str) -> list[Pair]:
    images, labels = root / "images", root / "labels"
    whole = not any((images / name).is_dir() for name in ("train", "val", split))
    if not whole:
        images, labels = images / split, labels / split
    if not (images.is_dir() and labels.is_dir()) or (whole and split not in ("train", "val")):
        raise DataError(
            f"{root} has no split {split!r}: neither a list file {split}.txt nor folders "
            f"images/{split} and labels/{split} are there"
        )
    found = _files_by_stem(images, IMAGE_SUFFIXES)
    marked = _files_by_stem(labels, LABEL_SUFFIXES)
    alone = [found[stem] for stem in found if stem not in marked]
    if alone:
        others = f" (nor do {len(alone) - 1} others)" if len(alone) > 1 else ""
        raise DataError(f"image {alone[0]} has no label of the same name in {labels}{others}")
    pairs = [(found[stem], marked[stem]) for stem in sorted(found)]
    if whole:
        chosen = {"val": (0,), "train": range(1, VALIDATION_EVERY)}[split]
        return [pair for i, pair in enumerate(pairs) if i % VALIDATION_EVERY in chosen]
    return pairs


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files below a folder by their path without suffix, relative to it."""
    files: dict[str, Path] = {}
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or path.suffix.lower() not in suffixes:
                continue
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in files:
                raise DataError(f"{files[stem]} and {path} have the same name but for the suffix")
            files[stem] = path
    return files
