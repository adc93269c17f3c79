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

import os
from collections.abc import Sequence
from pathlib import Path

from encnet_triton.data.base import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CLASSES,
    DataError,
)
from encnet_triton.data.files import FileDataset, Pair, check_present, read_lines

__all__ = ["Folder"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
VALIDATION_EVERY = 10


class Folder(FileDataset):
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
        folder = Path(root)
        if not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist or is not a folder")
        ignored = (ignore_label,) if isinstance(ignore_label, int) else tuple(ignore_label)
        names_file = folder / classes_file
        classes = _class_names(names_file, ignored, label_offset)
        first, last = -label_offset, len(classes) - 1 - label_offset
        listed = ", ".join(str(value) for value in ignored)
        super().__init__(
            _find_pairs(folder, split),
            classes,
            values={c - label_offset: c for c in range(len(classes))}
            | dict.fromkeys(ignored, IGNORE_INDEX),
            allowed=(
                f"the {len(classes)} classes of {names_file} stand for {first}..{last} "
                f"(ignored: {listed}; label_offset: {label_offset})"
            ),
            mean=mean,
            std=std,
        )


def _class_names(path: Path, ignored: tuple[int, ...], offset: int) -> tuple[str, ...]:
    lines = read_lines(path, "class names file")
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
    for number, line in enumerate(read_lines(listing, "list file"), start=1):
        if not line.strip():
            continue
        fields = [f.strip() for f in line.split("\t")] if "\t" in line else line.split()
        if len(fields) != 2:
            raise DataError(
                f"{listing} line {number} must be an image and a label path, got {line.strip()!r} "
                "(separate paths that contain spaces by a tab)"
            )
        pairs.append((root / fields[0], root / fields[1]))
    check_present(pairs, listing)
    return pairs


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
    pairs: list[Pair] = [(found[stem], marked[stem]) for stem in sorted(found)]
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
