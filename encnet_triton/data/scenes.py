"""`scenes`: an embedded data set in which only global context can name most objects.

Four scene kinds (beach, village, city, room) are drawn procedurally; nothing is downloaded. Three
appearances occur in all of them and mean another class in each, like sand / earth and windowpane /
door in the paper: 12 of the 18 classes.

    appearance      beach      village   city         room
    grainy patch    sand       earth     gravel       rug
    grid of boxes   building   house     skyscraper   bookcase
    framed panel    cabin      door      poster       windowpane

Only one cue tells the kinds apart (sea, tree, road or sofa), along a side or in a corner. Every
pixel of the twelve classes lies more than `CUE_DISTANCE` = 54 pixels (in x or in y) from every cue
pixel, over a third of the 160-pixel side, so a network whose receptive field is at most
`RECEPTIVE_FIELD_LIMIT` pixels wide sees no cue around such an object and can do no better than
guess one of four. The layout and every other pixel are drawn before the kind is looked at: one
layout drawn in two kinds differs inside the cue's box alone, so no statistic of position, size,
number or shade reveals the kind.

An image depends on (seed, split, index) alone, and images of two splits never share a random
stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encnet_triton.data import scene_drawing as drawing
from encnet_triton.data.base import IGNORE_INDEX, DataError, Sample

__all__ = [
    "AMBIGUOUS",
    "CLASSES",
    "CUES",
    "CUE_DISTANCE",
    "KINDS",
    "RECEPTIVE_FIELD_LIMIT",
    "SIDE",
    "Scenes",
    "draw_scene",
    "stream_key",
]

SIDE = 160
RECEPTIVE_FIELD_LIMIT = SIDE // 3
CUE_DISTANCE = RECEPTIVE_FIELD_LIMIT + 1

KINDS = ("beach", "village", "city", "room")
CUES = ("sea", "tree", "road", "sofa")
AMBIGUOUS = {
    "patch": ("sand", "earth", "gravel", "rug"),
    "grid": ("building", "house", "skyscraper", "bookcase"),
    "panel": ("cabin", "door", "poster", "windowpane"),
}
CLASSES = ("background", "person", *CUES, *(name for names in AMBIGUOUS.values() for name in names))

_COLOURS = {
    "background": (232, 226, 212),
    "person": (222, 62, 84),
    "sea": (38, 118, 190),
    "tree": (52, 140, 62),
    "road": (74, 76, 84),
    "sofa": (150, 44, 110),
    "sand": (240, 206, 120),
    "earth": (146, 98, 52),
    "gravel": (158, 164, 128),
    "rug": (230, 120, 60),
    "building": (120, 150, 200),
    "house": (190, 80, 60),
    "skyscraper": (62, 70, 140),
    "bookcase": (110, 66, 30),
    "cabin": (70, 190, 180),
    "door": (250, 170, 170),
    "poster": (180, 110, 220),
    "windowpane": (130, 220, 250),
}

_SPLITS = {"train": (0, 2000), "val": (1, 200)}


class _Thing(NamedTuple):
    """How often an appearance occurs, and its size in pixels."""

    counts: tuple[float, ...]  # probabilities of 0, 1, 2, ... instances
    width: tuple[int, int]
    height: tuple[int, int]


_THINGS = {
    "patch": _Thing((0.10, 0.50, 0.40), (40, 64), (34, 56)),
    "grid": _Thing((0.10, 0.45, 0.45), (28, 46), (32, 56)),
    "panel": _Thing((0.10, 0.15, 0.25, 0.30, 0.20), (13, 20), (24, 36)),
    "person": _Thing((0.20, 0.30, 0.30, 0.20), (8, 10), (16, 21)),
}
_GAP = 3  # pixels between two objects
_CUE_LENGTH = (72, 132)
_CUE_DEPTH = (24, 30)


class Box(NamedTuple):
    """Pixel columns left..right-1 and rows top..bottom-1."""

    left: int
    top: int
    right: int
    bottom: int

    def near(self, other: Box, distance: int) -> bool:
        """Whether some pixel of each are at most `distance` apart in both x and y."""
        return (
            self.left - other.right < distance
            and other.left - self.right < distance
            and self.top - other.bottom < distance
            and other.top - self.bottom < distance
        )


def stream_key(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """The seed of one image's random stream; no two (seed, split, index) share it."""
    return seed, _SPLITS[split][0], index


def _cue_box(rng: np.random.Generator) -> Box:
    length = int(rng.integers(*_CUE_LENGTH, endpoint=True))
    depth = int(rng.integers(*_CUE_DEPTH, endpoint=True))
    # Drawn past both ends and then clipped, so that corners are as common as the middle of a side.
    along = int(np.clip(rng.integers(-24, SIDE - length + 24, endpoint=True), 0, SIDE - length))
    far = SIDE - depth
    sides = (
        Box(along, 0, along + length, depth),
        Box(along, far, along + length, SIDE),
        Box(0, along, depth, along + length),
        Box(far, along, SIDE, along + length),
    )
    return sides[int(rng.integers(len(sides)))]


def _layout(rng: np.random.Generator) -> tuple[Box, list[tuple[str, Box]]]:
    """Boxes of the cue and of everything else; independent of the scene kind."""
    cue = _cue_box(rng)
    placed: list[tuple[str, Box]] = []
    for what, thing in _THINGS.items():
        distance = _GAP if what == "person" else CUE_DISTANCE
        for _ in range(int(rng.choice(len(thing.counts), p=thing.counts))):
            width = int(rng.integers(*thing.width, endpoint=True))
            height = int(rng.integers(*thing.height, endpoint=True))
            corners = rng.integers(0, (SIDE - width, SIDE - height), size=(40, 2), endpoint=True)
            for left, top in corners.tolist():
                box = Box(left, top, left + width, top + height)
                if not box.near(cue, distance) and not any(box.near(b, _GAP) for _, b in placed):
                    placed.append((what, box))
                    break
    return cue, placed


def draw_scene(kind: int, key: tuple[int, ...]) -> Sample:
    """Draw the layout of random stream `key` as scene `KINDS[kind]`.

    Returns a 160 x 160 RGB image and its uint8 label map (indices into `CLASSES`). Two kinds drawn
    with one key differ in the cue's box, in the labels of the ambiguous objects, and nowhere else.
    """
    shared, cue_only = (np.random.default_rng((*key, stream)) for stream in (0, 1))
    cue, placed = _layout(shared)
    canvas = drawing.Canvas(SIDE, shared)
    for what, box in placed:
        name = what if what == "person" else AMBIGUOUS[what][kind]
        drawing.BRUSHES[what](canvas, box, CLASSES.index(name), shared)
    noise = canvas.noise(shared)
    name = CUES[kind]
    drawing.BRUSHES[name](canvas, cue, CLASSES.index(name), cue_only)
    image, label = canvas.finish(noise)
    return Sample(Image.fromarray(image), label)


class Scenes:
    """The embedded data set; see the module docstring. Kinds take turns, so all are equally common.

    Args:
        split: "train" or "val".
        size: number of images, 2000 for train and 200 for val by default.
        seed: another seed gives another data set of the same kind.
    """

    classes = CLASSES
    ignore_index = IGNORE_INDEX
    mean = (0.79, 0.76, 0.72)
    std = (0.18, 0.17, 0.17)

    def __init__(self, split: str = "train", *, size: int | None = None, seed: int = 0) -> None:
        if split not in _SPLITS:
            raise DataError(f"scenes has no split {split!r}; it has {', '.join(_SPLITS)}")
        size = _SPLITS[split][1] if size is None else size
        if size < 1:
            raise DataError(f"scenes: size must be at least 1 image, got {size}")
        if seed < 0:
            raise DataError(f"scenes: seed must not be negative, got {seed}")
        self.split = split
        self.seed = seed
        self.palette: NDArray[np.uint8] = np.array([_COLOURS[c] for c in CLASSES], np.uint8)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._size:
            raise IndexError(f"scenes {self.split} has images 0..{self._size - 1}, not {index}")
        return draw_scene(index % len(KINDS), stream_key(self.seed, self.split, index))

    def open(self, index: int) -> Sample:
        return self[index]

    def name_of(self, index: int) -> str:
        return f"scenes {self.split} {index}"
