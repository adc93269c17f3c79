"""`voc` and `voc_aug`: PASCAL VOC 2012 segmentation, 20 classes and background.

`voc_aug` adds the labels of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011), which
``python -m encnet_triton.data prepare voc_aug`` turns from .mat files into PNGs.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError
from encnet_triton.data.files import FileDataset, Pair, check_present, find_root, read_lines

__all__ = ["VOC", "VOCAug"]

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

LISTS = "ImageSets/Segmentation"
AUG_LABELS = "SegmentationClassAug"
_BELOW = ("VOC2012", "VOCdevkit/VOC2012")


def voc_palette(count: int) -> NDArray[np.uint8]:
    """The first ``count`` of VOC's 256 colours, as its PNGs and its test server have them.

    The bits of a label go to red, green and blue in turn, highest bit of the colour first.
    """
    labels = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def voc_root(root: str | os.PathLike[str]) -> Path:
    """The folder VOC2012, given it or one that it was unpacked in."""
    return find_root(root, _BELOW, LISTS, VOC.source)


def read_ids(listing: Path, source: str) -> list[str]:
    """Image names of a list file, one per line."""
    try:
        lines = read_lines(listing, "list file")
    except DataError as error:
        raise DataError(f"{error}; {source}") from None
    return [line.split()[0] for line in lines if line.strip()]


class VOC(FileDataset):
    """The official folders JPEGImages, SegmentationClass and ImageSets/Segmentation.

    In the files and here 0 is background, 1..20 are the classes, 255 is no class (outlines).

    Args:
        root: VOC2012, or the folder VOCdevkit was unpacked in.
        split: "train" (1,464 images), "val" (1,449), "trainval" (2,913), or "test" (1,456 without
            labels, from the test archive).
    """

    source = (
        "VOCtrainval_11-May-2012.tar and the test archive are at "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
    )
    expected: dict[str, tuple[int, ...]] = {
        "train": (1464,), "val": (1449,), "trainval": (2913,), "test": (1456,),
    }  # fmt: skip
    splits: tuple[str, ...] = ("train", "val")

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        base = voc_root(root)
        if split not in self.expected:
            raise DataError(f"VOC has no split {split!r}; it has {', '.join(self.expected)}")
        listing = base / LISTS / f"{self.list_of(split)}.txt"
        labels = base / self.labels_of(split)
        pairs: list[Pair] = [
            (
                base / "JPEGImages" / f"{name}.jpg",
                None if split == "test" else labels / f"{name}.png",
            )
            for name in read_ids(listing, self.source)
        ]
        if not pairs:
            raise DataError(f"the data set is empty: {listing} has no images")
        pairs = check_present(pairs, listing)
        super().__init__(
            pairs,
            CLASSES,
            values={c: c for c in range(len(CLASSES))} | {255: 255},
            allowed="VOC's labels have 0 (background), 1..20 and 255 (no class)",
            palette=voc_palette(len(CLASSES)),
        )

    @classmethod
    def labels_for(cls, count: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
        """Class names and colours of a network with ``count`` classes."""
        return CLASSES, voc_palette(len(CLASSES))

    def list_of(self, split: str) -> str:
        """Name of the split's list file."""
        return split

    def labels_of(self, split: str) -> str:
        """Folder of the split's labels."""
        return "SegmentationClass"


class VOCAug(VOC):
    """VOC 2012 with the labels of the Semantic Boundaries Dataset (SBD) for training.

    Args:
        root: VOC2012, prepared once with ``python -m encnet_triton.data prepare voc_aug``, or one
            that has SegmentationClassAug and trainaug.txt from elsewhere.
        split: "train" (10,582 images: SBD and VOC train without VOC val), "trainval" (12,031: all
            of SBD and VOC, for the test server only), "val" and "test" as `VOC` has them.
    """

    source = (
        VOC.source + "; SBD (benchmark.tgz) is at "
        "http://home.bharathh.info/pubs/codes/SBD/download.html; then run "
        "python -m encnet_triton.data prepare voc_aug"
    )
    expected = {"train": (10582,), "val": (1449,), "trainval": (12031,), "test": (1456,)}

    def list_of(self, split: str) -> str:
        return {"train": "trainaug", "trainval": "trainvalaug"}.get(split, split)

    def labels_of(self, split: str) -> str:
        return AUG_LABELS if split.startswith("train") else "SegmentationClass"
