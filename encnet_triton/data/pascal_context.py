"""`pascal_context`: PASCAL-Context, 59 classes and background (Mottaghi et al., CVPR 2014).

The official masks have 459 labels. ``python -m encnet_triton.data prepare pascal_context`` turns
them, from the .mat files or from the Detail JSON, into PNGs with 0 for background and 1..59 in the
order of the official numbers, which is alphabetical. PNGs from elsewhere with 60 values use one of
three orders, which their content does not reveal, so `label_order` must then be given.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, default_palette
from encnet_triton.data.files import (
    FileDataset,
    Pair,
    check_present,
    find_root,
    read_json,
    read_lines,
)
from encnet_triton.data.voc import read_ids

__all__ = ["PascalContext"]

# Official number, of 459, of each of the 59 classes that are scored.
OFFICIAL = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird":
    25, "boat": 31, "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car":
    59, "cat": 65, "ceiling": 68, "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup":
    104, "curtain": 105, "dog": 113, "door": 115, "fence": 144, "floor": 158, "flower": 159,
    "food": 162, "grass": 187, "ground": 189, "horse": 207, "keyboard": 220, "light": 232,
    "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295, "platform":
    296, "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk":
    354, "sign": 355, "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train":
    416, "tree": 420, "truck": 424, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454,
    "wood": 458,
}  # fmt: skip

CLASSES = tuple(OFFICIAL)
VOC_FIRST = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "table", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor", "bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "cloth",
    "computer", "cup", "door", "fence", "floor", "flower", "food", "grass", "ground", "keyboard",
    "light", "mountain", "mouse", "curtain", "platform", "sign", "plate", "road", "rock",
    "shelves", "sidewalk", "sky", "snow", "bedclothes", "track", "tree", "truck", "wall", "water",
    "window", "wood",
)  # fmt: skip
LABEL_ORDERS = ("alphabetical", "voc_first", "stanford")
LABELS = "SegmentationClassContext"
LISTS = "ImageSets/SegmentationContext"
# Beside prepared PNGs; says in which order their values are.
MARK = "label_order.json"
_STANFORD_LIST = "59_labels.txt"
_STANFORD_NAMES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


class PascalContext(FileDataset):
    """Images of VOC 2010 and PNGs with one of 60 values per pixel.

    Args:
        root: VOC2010, with JPEGImages and the labels in SegmentationClassContext.
        split: "train" (4,998 images by the official lists, 4,996 in the Detail JSON), "val" (5,105
            or 5,104) or "trainval", from ImageSets/SegmentationContext, else <root>/<split>.txt,
            else ImageSets/Main.
        labels_folder: folder of the PNGs, relative to the root.
        label_order: order of the values in PNGs that were not prepared here: "alphabetical" (as
            PyTorch-Encoding, and mmsegmentation's converter), "voc_first" (VOC's 20 classes, then
            the others), or "stanford": as in the file 59_labels.txt of the official site, which
            must then be in the root or the labels' folder.
        background_label: value of the background in the PNGs: 0 (the classes are then 1..59) or 255
            (the classes are then 0..58).
        num_classes: 59, the background is ignored, or 60, it is class 0.

    Raises DataError where something is missing or the order of the labels is not known.
    """

    source = (
        "the images are VOC 2010's (http://host.robots.ox.ac.uk/pascal/VOC/voc2010), the masks "
        "trainval.tar.gz (https://www.cs.stanford.edu/~roozbeh/pascal-context) or the Detail API's "
        "trainval_merged.json (https://codalabuser.blob.core.windows.net/public/"
        "trainval_merged.json); then run python -m encnet_triton.data prepare pascal_context"
    )
    expected = {"train": (4998, 4996), "val": (5105, 5104), "trainval": (10103, 10100)}
    splits = ("train", "val")

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        labels_folder: str = LABELS,
        label_order: str | None = None,
        background_label: int = 0,
        num_classes: int = 59,
    ) -> None:
        if split not in self.expected:
            raise DataError(f"pascal_context has no split {split!r}; it has train, val, trainval")
        if background_label not in (0, 255):
            raise DataError(f"background_label is {background_label}, but must be 0 or 255")
        if num_classes not in (59, 60):
            raise DataError(f"num_classes of pascal_context is {num_classes}, but must be 59 or 60")
        below = ("VOC2010", "VOCdevkit/VOC2010")
        base = find_root(root, below, "JPEGImages", self.source)
        labels = base / labels_folder
        if not labels.is_dir():
            raise DataError(f"{labels} does not exist; {self.source}")
        pairs, listing = _pairs(base, labels, split, self.source)
        pairs = check_present(pairs, listing)
        order = _order(labels, base, label_order)
        first = 1 if background_label == 0 else 0
        shift = num_classes - 59
        values = {first + i: CLASSES.index(name) + shift for i, name in enumerate(order)}
        values[background_label] = 0 if num_classes == 60 else 255
        super().__init__(
            pairs,
            self.labels_for(num_classes)[0],
            values=values,
            allowed=(
                f"{background_label} is background and {first}..{first + 58} are the classes "
                "(background_label says which)"
            ),
        )

    @classmethod
    def labels_for(cls, count: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
        """Class names and colours of a network with 59 or 60 classes."""
        names = (("background",) if count == 60 else ()) + CLASSES
        return names, default_palette(len(names))


def _pairs(base: Path, labels: Path, split: str, source: str) -> tuple[list[Pair], Path]:
    """The files of a split and the list they are named in."""
    places = (base / LISTS, base, base / "ImageSets" / "Main")
    parts = ("train", "val") if split == "trainval" else (split,)
    for place in places:
        listings = [place / f"{part}.txt" for part in parts]
        if all(listing.is_file() for listing in listings):
            names = [name for listing in listings for name in read_ids(listing, source)]
            if not names:
                raise DataError(f"the data set is empty: {listings[0]} has no images")
            images = base / "JPEGImages"
            return [(images / f"{n}.jpg", labels / f"{n}.png") for n in names], listings[0]
    tried = ", ".join(str(place / f"{split}.txt") for place in places)
    raise DataError(f"no list of the split {split!r}: none of {tried} exists; {source}")


def _order(labels: Path, base: Path, given: str | None) -> tuple[str, ...]:
    """The 59 class names in the order of their values in the PNGs."""
    mark = labels / MARK
    if mark.is_file():
        prepared = str(read_json(mark, "mark of the preparation").get("label_order"))
        if given not in (None, prepared):
            raise DataError(f"label_order is {given!r}, but {mark} says {prepared!r}")
        given = prepared
    if given not in LABEL_ORDERS:
        got = "is not given" if given is None else f"is {given!r}"
        raise DataError(
            f"label_order {got}: which class the values 1..59 in {labels} stand for cannot be "
            f"seen from the files; give {', '.join(LABEL_ORDERS[:2])} or {LABEL_ORDERS[2]}"
        )
    if given == "stanford":
        return _stanford_order(labels, base)
    return CLASSES if given == "alphabetical" else VOC_FIRST


def _stanford_order(labels: Path, base: Path) -> tuple[str, ...]:
    for place in (labels, base):
        if (place / _STANFORD_LIST).is_file():
            lines = read_lines(place / _STANFORD_LIST, "list of classes")
            break
    else:
        raise DataError(
            f"label_order 'stanford' is the order of the file {_STANFORD_LIST} of the official "
            f"site, which is neither in {labels} nor in {base}"
        )
    names = [line.split(":")[-1].replace(" ", "") for line in lines if line.strip()]
    names = [_STANFORD_NAMES.get(name, name) for name in names]
    if sorted(names) != sorted(CLASSES):
        strange = sorted(set(names) ^ set(CLASSES))
        raise DataError(
            f"{place / _STANFORD_LIST} does not name the 59 classes: {', '.join(strange[:4])}"
        )
    return tuple(names)
