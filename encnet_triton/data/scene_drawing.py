"""The brushes that draw a scene: the looks of `scenes`.

Shapes are drawn at twice the size and averaged down, which smooths their edges; labels are sampled
at pixel centres. A brush draws inside its box alone and draws random numbers from the given
generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["BRUSHES", "Brush", "Canvas"]

_ZOOM = 2
_BACKGROUND = (222, 216, 203)
_SENSOR_NOISE = 5  # standard deviation, in levels

Colour = tuple[int, int, int]
BoxLike = tuple[int, int, int, int]


class Canvas:
    """A square picture and its label map (0 = background) under construction."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side = side
        size = (_ZOOM * side, _ZOOM * side)
        self._picture = Image.new("RGB", size, _BACKGROUND)
        self._labels = Image.new("L", size, 0)
        self._paint = ImageDraw.Draw(self._picture)
        self._mark = ImageDraw.Draw(self._labels)
        self._grain: list[tuple[BoxLike, int, float]] = []
        # One light that falls off across the picture, from a random direction.
        angle = rng.uniform(0, 2 * math.pi)
        ramp = np.linspace(-1, 1, side, dtype=np.float32)
        self._light = 9 * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])

    def rectangle(self, box: tuple[float, ...], colour: Colour, label: int | None = None) -> None:
        """Fill the pixels left..right-1, top..bottom-1; coordinates may be halves of a pixel."""
        left, top, right, bottom = (round(_ZOOM * c) for c in box)
        self._paint.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        if label is not None:
            self._mark.rectangle((left, top, right - 1, bottom - 1), fill=label)

    def ellipse(self, box: tuple[float, ...], colour: Colour, label: int | None = None) -> None:
        left, top, right, bottom = (round(_ZOOM * c) for c in box)
        self._paint.ellipse((left, top, right - 1, bottom - 1), fill=colour)
        if label is not None:
            self._mark.ellipse((left, top, right - 1, bottom - 1), fill=label)

    def polygon(self, points: NDArray[np.float64], colour: Colour, label: int) -> None:
        """Fill a polygon of P x 2 points (x, y)."""
        corners = [(x, y) for x, y in (_ZOOM * points).tolist()]
        self._paint.polygon(corners, fill=colour)
        self._mark.polygon(corners, fill=label)

    def line(self, points: NDArray[np.float64], colour: Colour, width: float) -> None:
        corners = [(x, y) for x, y in (_ZOOM * points).tolist()]
        self._paint.line(corners, fill=colour, width=round(_ZOOM * width), joint="curve")

    def grain(self, box: BoxLike, label: int, strength: float) -> None:
        """Ask for speckle of this strength on the pixels of `label` in `box`."""
        self._grain.append((box, label, strength))

    def noise(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Light, sensor noise and speckle of what has been drawn so far, side x side x 3."""
        # The sum of two uniform bytes is near enough to normal, and several times cheaper.
        pair = rng.integers(0, 256, (2, self.side, self.side, 3), np.uint8)
        total: NDArray[np.float32] = np.add(pair[0], pair[1], dtype=np.float32)
        total -= 255
        total *= _SENSOR_NOISE / math.sqrt(2 * (256**2 - 1) / 12)
        total += self._light[..., None]
        labels = self._label_map()
        for (left, top, right, bottom), label, strength in self._grain:
            speckle = rng.standard_normal((bottom - top, right - left), np.float32)
            speckle *= strength * (labels[top:bottom, left:right] == label)
            total[top:bottom, left:right] += speckle[..., None]
        return total

    def finish(self, noise: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The picture, side x side x 3, with `noise` added, and the label map, side x side."""
        picture = np.asarray(self._picture.reduce(_ZOOM)) + noise
        return np.clip(picture, 0, 255).astype(np.uint8), self._label_map()

    def _label_map(self) -> NDArray[np.uint8]:
        return np.asarray(self._labels)[_ZOOM - 1 :: _ZOOM, _ZOOM - 1 :: _ZOOM].copy()


Brush = Callable[[Canvas, BoxLike, int, np.random.Generator], None]


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(factor * channel)) for channel in colour)
    return red, green, blue


def _patch(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    """A speckled ochre blob: sand, earth, gravel or a rug."""
    left, top, right, bottom = box
    angle = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    radius = 0.88 + sum(
        rng.uniform(0, 0.06) * np.cos(n * angle + rng.uniform(0, 2 * math.pi)) for n in (2, 3)
    )
    # A superellipse fills more of its box than an ellipse does.
    x = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.75 * radius
    y = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.75 * radius
    centre = np.array([left + right - 1, top + bottom - 1]) / 2
    half = np.array([right - left - 2, bottom - top - 2]) / 2
    points = centre + half * np.clip(np.stack([x, y], axis=1), -1, 1)
    canvas.polygon(points, _shade((205, 168, 104), rng.uniform(0.84, 1.1)), label)
    canvas.grain(box, label, rng.uniform(13, 20))


def _grid(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    """A slate box with rows of dark and lit compartments: a block of windows or of shelves."""
    left, top, right, bottom = box
    shade = rng.uniform(0.82, 1.15)
    canvas.rectangle(box, _shade((92, 104, 126), shade), label)
    body = (left + 1, top + 1, right - 1, bottom - 1)
    canvas.rectangle(body, _shade((136, 150, 172), shade))
    columns, rows = (right - left - 3) // 7, (bottom - top - 3) // 8
    start_x = left + (right - left - 7 * columns + 3) / 2
    start_y = top + (bottom - top - 8 * rows + 3) / 2
    lit = rng.random((rows, columns)) < 0.3
    for row in range(rows):
        for column in range(columns):
            x, y = start_x + 7 * column, start_y + 8 * row
            colour = (250, 214, 108) if lit[row, column] else _shade((52, 60, 84), shade)
            canvas.rectangle((x, y, x + 4, y + 5), colour)


def _panel(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    """A wooden frame around two bright panes: a cabin's front, a door, a poster or a windowpane."""
    left, top, right, bottom = box
    shade = rng.uniform(0.82, 1.15)
    canvas.rectangle(box, _shade((134, 84, 58), shade), label)
    pane = _shade((166, 212, 206), rng.uniform(0.88, 1.1))
    bar = top + (bottom - top) * rng.uniform(0.4, 0.6)
    canvas.rectangle((left + 2, top + 2, right - 2, bar - 1), pane)
    canvas.rectangle((left + 2, bar + 1, right - 2, bottom - 2), pane)
    gleam = np.array([[left + 3.5, bar - 3], [right - 4, top + 3.5]])
    canvas.line(gleam, (240, 250, 248), 1)


def _person(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    middle = (left + right) / 2
    head = (right - left) * 0.36
    waist = top + (bottom - top) * 0.62
    legs = _shade((52, 58, 92), rng.uniform(0.8, 1.2))
    shirt = ((214, 66, 70), (232, 126, 40), (222, 84, 140))[int(rng.integers(3))]
    canvas.rectangle((middle - head, waist, middle - 0.5, bottom), legs, label)
    canvas.rectangle((middle + 0.5, waist, middle + head, bottom), legs, label)
    canvas.rectangle((left + 0.5, top + 1.7 * head, right - 0.5, waist), shirt, label)
    canvas.ellipse((middle - head, top, middle + head, top + 2 * head), (238, 190, 158), label)


def _sea(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    shade = rng.uniform(0.9, 1.1)
    canvas.rectangle(box, _shade((58, 138, 200), shade), label)
    x = np.arange(left + 2, right - 1, 1.0)
    for y in range(top + 3, bottom - 2, 6):
        wave = y + 1 + 1.6 * np.sin(x / 2.6 + rng.uniform(0, 2 * math.pi))
        canvas.line(np.stack([x, wave], axis=1), _shade((196, 228, 244), shade), 1.2)


def _tree(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    """A row of round crowns along the box's long side."""
    left, top, right, bottom = box
    depth = min(right - left, bottom - top)
    length = max(right - left, bottom - top)
    upright = bottom - top > right - left
    count = round(length / (0.78 * depth))
    for along in np.linspace(0, length - depth, count).round().tolist():
        x, y = (left, top + along) if upright else (left + along, top)
        shade = rng.uniform(0.85, 1.1)
        canvas.ellipse((x, y, x + depth, y + depth), _shade((46, 106, 48), shade), label)
        canvas.ellipse((x + 2, y + 2, x + depth - 3, y + depth - 3), _shade((74, 148, 66), shade))
        for _ in range(5):
            u, v = rng.uniform(0.2, 0.65, 2) * depth
            leaf = (x + u, y + v, x + u + 4, y + v + 4)
            canvas.ellipse(leaf, _shade((124, 188, 92), shade))


def _road(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    canvas.rectangle(box, _shade((84, 86, 94), rng.uniform(0.88, 1.15)), label)
    upright = bottom - top > right - left
    middle = (left + right) / 2 if upright else (top + bottom) / 2
    low, high = (top, bottom) if upright else (left, right)
    for start in np.arange(low - rng.uniform(0, 9), high, 14).tolist():
        begin, end = max(low, start), min(high, start + 8)
        if end - begin >= 1:
            near, far = middle - 1.5, middle + 1.5
            dash = (near, begin, far, end) if upright else (begin, near, end, far)
            canvas.rectangle(dash, (240, 238, 228))


def _sofa(canvas: Canvas, box: BoxLike, label: int, rng: np.random.Generator) -> None:
    """A row of seats and a back rest, seen from above."""
    left, top, right, bottom = box
    shade = rng.uniform(0.88, 1.12)
    canvas.rectangle(box, _shade((122, 46, 96), shade), label)
    upright = bottom - top > right - left
    length = bottom - top if upright else right - left
    count = round(length / 22)
    edges = np.linspace(0, length - 6, count + 1)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if upright:
            seat = (left + 4, top + 3 + start + 1, right - 4, top + 3 + end - 1)
        else:
            seat = (left + 3 + start + 1, top + 4, left + 3 + end - 1, bottom - 4)
        canvas.rectangle(seat, _shade((196, 88, 154), shade))


BRUSHES: dict[str, Brush] = {
    "patch": _patch,
    "grid": _grid,
    "panel": _panel,
    "person": _person,
    "sea": _sea,
    "tree": _tree,
    "road": _road,
    "sofa": _sofa,
}
