"""`coco_voc`: MS-COCO with VOC's 20 classes, for pre-training (paper, section 3.3).

The labels are drawn once from COCO's instances by ``python -m encnet_triton.data prepare
coco_voc``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError
from encnet_triton.data.files import FileDataset, Pair, check_present, find_root
from encnet_triton.data.voc import CLASSES, read_ids, voc_palette

__all__ = ["CocoVOC"]

LABELS = "voc_labels"
# COCO's category number of VOC's classes 1..20, in VOC's order.
CATEGORIES = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
# Images with as few pixels of the 20 classes as this, or fewer, are left out.
LEAST_PIXELS = 1000


class CocoVOC(FileDataset):
    """Images of train2017 and val2017 that show more than 1,000 pixels of VOC's classes.

    Label values are VOC's: 0 is background, which here includes COCO's other 60 classes.

    Args:
        root: COCO's folder, with train2017, val2017 and annotations.
        split: "train" or "val".
    """

    source = (
        "train2017.zip, val2017.zip and annotations_trainval2017.zip are at https://cocodataset.org"
        "; then run python -m encnet_triton.data prepare coco_voc"
    )
    # How many images are left depends on COCO's release.
    expected: dict[str, tuple[int, ...]] = {"train": (), "val": ()}
    splits = ("train", "val")

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        if split not in self.expected:
            raise DataError(f"coco_voc has no split {split!r}; it has train, val")
        base = find_root(root, ("coco",), f"{split}2017", self.source)
        listing = base / LABELS / f"{split}2017.txt"
        pairs: list[Pair] = [
            (base / f"{split}2017" / f"{name}.jpg", labels_folder(base, split) / f"{name}.png")
            for name in read_ids(listing, self.source)
        ]
        if not pairs:
            raise DataError(f"the data set is empty: {listing} has no images")
        pairs = check_present(pairs, listing)
        super().__init__(
            pairs,
            CLASSES,
            values={c: c for c in range(len(CLASSES))} | {255: 255},
            allowed="coco_voc's labels have 0 (background), 1..20 and 255 (crowds)",
            palette=voc_palette(len(CLASSES)),
        )

    @classmethod
    def labels_for(cls, count: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
        """Class names and colours of a network with ``count`` classes."""
        return CLASSES, voc_palette(len(CLASSES))


def labels_folder(base: Path, split: str) -> Path:
    """Where the prepared labels of a split are."""
    return base / LABELS / f"{split}2017"
