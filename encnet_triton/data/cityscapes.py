"""`cityscapes`: folders laid out as Cityscapes, 19 classes (Cordts et al., CVPR 2016)."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, default_palette
from encnet_triton.data.files import FileDataset, Pair, find_root, visible

__all__ = ["Cityscapes"]

# Label number in the files of every class that is scored; all others are no class.
_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


class Cityscapes(FileDataset):
    """``leftImg8bit/<split>/<city>/*`` and ``gtFine/<split>/<city>/*_gtFine_labelIds.png``.

    Args:
        root: the folder that holds leftImg8bit.
        split: "train" (2,975 images), "val" (500), or "test" (1,525, without labels).
    """

    source = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip are at https://www.cityscapes-dataset.com"
    expected = {"train": (2975,), "val": (500,), "test": (1525,)}
    splits = ("train", "val")

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        if split not in self.expected:
            raise DataError(f"Cityscapes has no split {split!r}; it has train, val, test")
        base = find_root(root, ("cityscapes",), f"leftImg8bit/{split}", self.source)
        images = visible(base / "leftImg8bit" / split, f"*/*{_IMAGE}")
        if not images:
            raise DataError(f"{base / 'leftImg8bit' / split} has no */*{_IMAGE}; {self.source}")
        pairs: list[Pair] = []
        for path in images:
            place = base / "gtFine" / split / path.parent.name
            label = place / (path.name.removesuffix(_IMAGE) + _LABEL)
            if split != "test" and not label.is_file():
                raise DataError(f"image {path} has no label {label}; {self.source}")
            pairs.append((path, None if split == "test" else label))
        super().__init__(
            pairs,
            tuple(_IDS),
            values=dict.fromkeys(range(34), 255)
            | {255: 255}
            | {number: c for c, number in enumerate(_IDS.values())},
            allowed="Cityscapes' labelIds have 0..33",
        )

    @classmethod
    def labels_for(cls, count: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
        """Class names and colours of a network with ``count`` classes."""
        return tuple(_IDS), default_palette(len(_IDS))
