"""`ade20k`: ADEChallengeData2016, scene parsing with 150 classes (Zhou et al., CVPR 2017)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encnet_triton.data.base import DataError, default_palette
from encnet_triton.data.files import FileDataset, Pair, find_root, visible

__all__ = ["ADE20K"]

CLASSES = tuple(
    name.strip()
    for name in """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin
board, shower, radiator, glass, clock, flag
""".replace("\n", " ").split(",")
)

_FOLDERS = {"train": ("training",), "val": ("validation",), "trainval": ("training", "validation")}


class ADE20K(FileDataset):
    """The official folders ``images`` and ``annotations``, each with ``training`` and
    ``validation``.

    In the files 0 is what belongs to no class and 1..150 are the classes; here 255 and 0..149.

    Args:
        root: ADEChallengeData2016, or the folder it was unpacked in.
        split: "train" (20,210 images), "val" (2,000), "trainval", or "test": the unlabelled images
            of ``release_test/testing``, for a submission.
    """

    source = (
        "ADEChallengeData2016.zip (and release_test.zip for the split test) are at "
        "http://sceneparsing.csail.mit.edu"
    )
    expected = {"train": (20210,), "val": (2000,), "trainval": (22210,), "test": (3352,)}
    splits = ("train", "val")

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        if split == "test":
            base = find_root(root, ("release_test", "../release_test"), "testing", self.source)
            pairs: list[Pair] = [(path, None) for path in visible(base / "testing", "*.jpg")]
        else:
            pairs = self._labelled(Path(root), split)
        if not pairs:
            raise DataError(f"split {split!r} of {root} has no images; {self.source}")
        super().__init__(
            pairs,
            CLASSES,
            values={0: 255} | {c + 1: c for c in range(len(CLASSES))},
            allowed="ADE20K's annotations have 0 (no class) and 1..150",
        )

    @classmethod
    def labels_for(cls, count: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
        """Class names and colours of a network with ``count`` classes."""
        return CLASSES, default_palette(len(CLASSES))

    def _labelled(self, root: Path, split: str) -> list[Pair]:
        if split not in _FOLDERS:
            raise DataError(f"ADE20K has no split {split!r}; it has {', '.join(_FOLDERS)}, test")
        base = find_root(root, ("ADEChallengeData2016",), "images", self.source)
        pairs: list[Pair] = []
        for name in _FOLDERS[split]:
            images, labels = base / "images" / name, base / "annotations" / name
            for folder in (images, labels):
                if not folder.is_dir():
                    raise DataError(f"folder {folder} does not exist; {self.source}")
            marked = {path.stem for path in visible(labels, "*.png")}
            for path in visible(images, "*.jpg"):
                if path.stem not in marked:
                    raise DataError(f"image {path} has no annotation in {labels}; {self.source}")
                pairs.append((path, labels / f"{path.stem}.png"))
        return pairs
