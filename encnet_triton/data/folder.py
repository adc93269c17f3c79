"""`folder`: a data set from your own image and label files.

Two layouts are understood below the root folder:

- a list file `train.txt`, `val.txt`, ... with one `image label` pair per line, relative to the root
  (separated by a tab if a line has one, else by white space);
- folders `images/train`, `images/val` and `labels/train`, `labels/val`, paired by file name without
  suffix; or `images` and `labels` alone, of which about a tenth is for validation: which pairs
  depends on their names only, so that files that are added move none. Folders below them count,
  linked ones too; hidden files and folders do not.

`classes.txt` has one class name per line, in the order of label values. Labels are single-channel
or palette images whose pixel values are the classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from encnet_triton.data.base import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CLASSES,
    DataError,
    few,
)
from encnet_triton.data.files import FileDataset, Pair, check_present, composed, read_lines
from encnet_triton.data.images import image_suffixes
from encnet_triton.unpickle import printable

__all__ = ["Folder"]

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
VALIDATION_EVERY = 10
# Folders that other data sets have in place of "train" and "val".
_SPLITS = frozenset(
    ("train", "training", "trn", "val", "valid", "validation", "dev", "eval", "test", "testing")
)


class Folder(FileDataset):
    """Images and labels of a folder; see the module docstring for its layouts.

    Args:
        root: the folder.
        split: "train", "val", or another name that has a list file or folders.
        classes_file: file with the class names, relative to the root. Names at its end for an
            ignored label value ("void") are left out.
        ignore_label: label value or values in the files that mean no class, also as text "0,255".
            255 if None, unless `label_map` gives it a class.
        label_offset: added to the other values, -1 for files whose first class is 1.
        label_map: label value in the files -> class 0..n-1, or 255 for none, also as text
            "255=1,7=0". A class that is given values here has no others.
        mean, std: RGB statistics in 0..1 for normalisation, ImageNet's by default.

    Attributes:
        notes: a sentence each on files that are left out: images of no known suffix, labels
            without an image.

    Raises DataError, with one sentence that names the file, where something is missing or does not
    fit.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        classes_file: str | os.PathLike[str] = "classes.txt",
        ignore_label: int | str | Sequence[int] | None = None,
        label_offset: int = 0,
        label_map: Mapping[int, int] | str | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist or is not a folder")
        (offset,) = _numbers("label_offset", label_offset, most=1)
        mapped = _mapping(label_map)
        if ignore_label is None:
            ignored = tuple(value for value in (IGNORE_INDEX,) if value not in mapped)
        else:
            ignored = _numbers("ignore_label", ignore_label)
        twice = [value for value in ignored if mapped.get(value, IGNORE_INDEX) != IGNORE_INDEX]
        if twice:
            raise DataError(f"ignore_label and label_map both name the label value {twice[0]}")
        names_file = folder / os.fspath(classes_file)
        classes = _class_names(names_file, ignored, offset)
        beyond = [c for c in mapped.values() if not (0 <= c < len(classes) or c == IGNORE_INDEX)]
        if beyond:
            raise DataError(
                f"label_map names the class {beyond[0]}, but {names_file} has the classes "
                f"0..{len(classes) - 1} (and {IGNORE_INDEX} is none)"
            )
        values = {c - offset: c for c in range(len(classes)) if c not in mapped.values()}
        first, last = -offset, len(classes) - 1 - offset
        pairs, self.notes = _find_pairs(folder, split)
        super().__init__(
            pairs,
            classes,
            values=values | dict.fromkeys(ignored, IGNORE_INDEX) | mapped,
            allowed=(
                f"the {len(classes)} classes of {names_file} stand for {first}..{last} "
                f"(ignored: {', '.join(map(str, ignored)) or 'none'}; label_offset: {offset}; "
                f"label_map: {','.join(f'{v}={c}' for v, c in mapped.items()) or 'none'})"
            ),
            mean=_statistics("mean", mean, 0),
            std=_statistics("std", std, 1e-6),
        )


def _numbers(name: str, value: object, most: int = MAX_CLASSES) -> tuple[int, ...]:
    """One whole number, several, or a text of them with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        if any(isinstance(part, bool | float) for part in parts) or not 1 <= len(parts) <= most:
            raise ValueError
        return tuple(int(part) for part in parts)  # type: ignore[call-overload,arg-type]
    except (TypeError, ValueError):
        allowed = "a whole number" if most == 1 else "whole numbers such as 255 or 0,255"
        raise DataError(f"{name} is {value!r}, but must be {allowed}") from None


def _mapping(given: Mapping[int, int] | str | None) -> dict[int, int]:
    """Label value -> class, from a mapping or from "255=1,7=0"."""
    if given is None:
        return {}
    try:
        if isinstance(given, str):
            pairs = [tuple(map(int, part.split("="))) for part in given.split(",")]
        else:
            pairs = [(int(value), int(number)) for value, number in given.items()]
        made = {value: number for value, number in pairs}
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f"label_map is {given!r}, but must be pairs VALUE=CLASS such as 255=1,7=0"
        ) from None
    if len(made) < len(pairs):
        raise DataError(f"label_map is {given!r}, which names a label value twice")
    return made


def _statistics(name: str, value: object, least: float) -> tuple[float, float, float]:
    """Three numbers of RGB, from `least` to 1."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        red, green, blue = (float(part) for part in parts)  # type: ignore[attr-defined]
        if not all(least <= one <= 1 for one in (red, green, blue)):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"{name} is {value!r}, but must be three numbers of 0 to 1 such as 0.5,0.5,0.5"
        ) from None
    return red, green, blue


def _class_names(path: Path, ignored: tuple[int, ...], offset: int) -> tuple[str, ...]:
    lines = read_lines(path, "class names file")
    names = [composed(line.strip()) for line in lines if line.strip()]
    while names and len(names) - 1 - offset in ignored:
        names.pop()
    if not 1 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{path} names {len(names)} classes; 1 to {MAX_CLASSES} are allowed")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DataError(f"{path} names the class {repeated[0]!r} twice")
    strange = [name for name in names if not name.isprintable()]
    if strange:
        raise DataError(f"{path} names the class {strange[0]!r}, which cannot be printed")
    return tuple(names)


def _find_pairs(root: Path, split: str) -> tuple[list[Pair], list[str]]:
    """The pairs, and a sentence each on what is left out."""
    if not split:
        raise DataError("the split has no name; give one, such as train or val")
    listing, notes = root / f"{split}.txt", list[str]()
    if listing.is_file():
        pairs = _listed_pairs(root, listing)
        where = str(listing)
    else:
        pairs, notes = _folder_pairs(root, split)
        where = f"split {split!r} of {root}"
    if not pairs:
        raise DataError(" ".join([f"the data set is empty: {where} has no images", *notes]))
    return pairs, notes


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
    return check_present(pairs, listing)


def _folder_pairs(root: Path, split: str) -> tuple[list[Pair], list[str]]:
    images, labels = root / "images", root / "labels"
    whole = not any((images / name).is_dir() for name in ("train", "val", split))
    if whole:
        _refuse_other_splits(images)
    else:
        images, labels = images / split, labels / split
    if not (images.is_dir() and labels.is_dir()) or (whole and split not in ("train", "val")):
        raise DataError(
            f"{root} has no split {split!r}: neither a list file {split}.txt nor folders "
            f"images/{split} and labels/{split} are there"
        )
    found, others = _files_by_stem(images, image_suffixes())
    marked, _ = _files_by_stem(labels, LABEL_SUFFIXES)
    alone = [found[stem] for stem in found if stem not in marked]
    if alone:
        more = f" (nor do {len(alone) - 1} others)" if len(alone) > 1 else ""
        raise DataError(f"image {alone[0]} has no label of the same name in {labels}{more}")
    notes = [
        f"{_count(paths, what)}: {few([printable(path.name) for path in paths])}"
        for what, paths in (
            (f"in {images} left out, whose suffix is none of a known picture", others),
            (f"in {labels} without an image", [marked[s] for s in marked if s not in found]),
        )
        if paths
    ]
    names = sorted(found)
    if whole:
        held = _for_validation(names)
        names = [name for name in names if (name in held) == (split == "val")]
    return [(found[name], marked[name]) for name in names], notes


def _count(paths: Sequence[Path], what: str) -> str:
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''} {what}"


def _refuse_other_splits(images: Path) -> None:
    """A folder of images that is divided, though not as it is here, would be mixed."""
    if not images.is_dir():
        return
    found = sorted(p.name for p in images.iterdir() if p.name.lower() in _SPLITS and p.is_dir())
    if found:
        raise DataError(
            f"{images} has the folders {', '.join(found)}: name those that are meant train and "
            "val, here and among the labels, or list their files in train.txt and val.txt"
        )


def _for_validation(names: Sequence[str]) -> set[str]:
    """About one in `VALIDATION_EVERY`, at least one, whatever other names there are."""
    numbers = {name: int.from_bytes(sha256(name.encode()).digest()[:8], "big") for name in names}
    chosen = {name for name in names if numbers[name] % VALIDATION_EVERY == 0}
    return chosen or set(sorted(names, key=numbers.__getitem__)[:1])


def _files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Path], list[Path]]:
    """Files below a folder by their path without suffix, relative to it; and other files."""
    files: dict[str, Path] = {}
    others: list[Path] = []
    for entry in _walk(folder):
        path = Path(entry.path)
        if path.suffix.lower() not in (*suffixes, ""):
            others.append(path)
            continue
        if entry.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there")
        if not path.suffix:
            continue
        stem = composed(path.relative_to(folder).with_suffix("").as_posix())
        if stem in files:
            raise DataError(f"{files[stem]} and {path} have the same name but for the suffix")
        files[stem] = path
    return files, others


def _walk(
    folder: Path, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    """The files below a folder that are not hidden, nor in a hidden folder; follows links."""
    status = folder.stat()
    this = (status.st_dev, status.st_ino)
    if this in above:
        raise DataError(f"folder {folder} is a link to a folder that it lies in; remove the link")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(Path(entry.path), above | {this})
        else:
            yield entry
