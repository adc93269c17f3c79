"""Pictures: label maps in colour, overlays, and image | label | prediction panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from encnet_triton.files import replacing

_MARGIN = 8
_IGNORED = (0, 0, 0)


def palette_image(
    label: NDArray[np.integer], palette: Sequence[Sequence[int]] | NDArray[np.uint8]
) -> Image.Image:
    """A label map (H x W, values 0..255) as a palette PNG whose pixel values are the classes."""
    picture = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8))
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    picture.putpalette(colours.tobytes())  # turns the mode into "P" and keeps the values
    return picture


def overlay(image: Image.Image, label: Image.Image, opacity: float = 0.55) -> Image.Image:
    """The photo with the colours of a palette image laid over it."""
    return Image.blend(image.convert("RGB"), label.convert("RGB"), opacity)


def panel(
    image: NDArray[np.uint8],
    label: NDArray[np.integer],
    prediction: NDArray[np.integer],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str = "",
) -> Image.Image:
    """image | label | prediction side by side, with the names of the classes that occur below.

    Small images are enlarged without smoothing.
    """
    height, width = label.shape
    factor = max(1, round(300 / width))
    size = (width * factor, height * factor)
    parts = [
        Image.fromarray(image).resize(size, Image.Resampling.BILINEAR),
        palette_image(label, palette).convert("RGB").resize(size, Image.Resampling.NEAREST),
        palette_image(prediction, palette).convert("RGB").resize(size, Image.Resampling.NEAREST),
    ]
    font = ImageFont.load_default(14)
    total = 3 * size[0] + 4 * _MARGIN
    present = sorted({int(c) for c in np.unique(label)} | {int(c) for c in np.unique(prediction)})
    legend = _legend(present, classes, palette, total, font)
    canvas = Image.new("RGB", (total, size[1] + legend.height + 3 * _MARGIN + 20), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (name, part) in enumerate(zip(("image", "label", "prediction"), parts, strict=True)):
        left = _MARGIN + i * (size[0] + _MARGIN)
        caption = f"{name}   {title}" if i == 0 and title else name
        draw.text((left, _MARGIN // 2), caption, fill="black", font=font)
        canvas.paste(part, (left, _MARGIN + 16))
    canvas.paste(legend, (0, size[1] + 2 * _MARGIN + 16))
    return canvas


def comparison(
    rows: Sequence[tuple[NDArray[Any], ...]],
    headings: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | NDArray[np.uint8],
    height: int = 200,
) -> Image.Image:
    """Rows of an image and label maps, under headings, with the names of all classes in them.

    Args:
        rows: an H x W x 3 uint8 image, then H x W label maps; each row may have another size.
        headings: one for each column.
        classes, palette: names and RGB colours.
        height: of every row, in pixels.
    """
    pictures = []
    for image, *labels in rows:
        size = (max(1, round(image.shape[1] * height / image.shape[0])), height)
        tiles = [Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)]
        for label in labels:
            coloured = palette_image(label, palette).convert("RGB")
            tiles.append(coloured.resize(size, Image.Resampling.NEAREST))
        pictures.append(tiles)
    width = max(tile.width for tiles in pictures for tile in tiles)
    font = ImageFont.load_default(14)
    total = len(headings) * (width + _MARGIN) + _MARGIN
    present = sorted({int(c) for _, *labels in rows for label in labels for c in np.unique(label)})
    legend = _legend(present, classes, palette, total, font)
    top = _MARGIN + 20
    bottom = top + len(rows) * (height + _MARGIN)
    canvas = Image.new("RGB", (total, bottom + legend.height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        left = _MARGIN + column * (width + _MARGIN)
        draw.text((left, _MARGIN // 2), heading, fill="black", font=font)
        for row, tiles in enumerate(pictures):
            canvas.paste(tiles[column], (left, top + row * (height + _MARGIN)))
    canvas.paste(legend, (0, bottom))
    return canvas


def _legend(
    present: Sequence[int],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | NDArray[np.uint8],
    width: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    """Coloured boxes with class names, in as many rows as the width needs."""
    entries = [
        (classes[c], tuple(palette[c])) if c < len(classes) else ("(ignored)", _IGNORED)
        for c in present
    ]
    places, left, row = [], _MARGIN, 0
    for name, _ in entries:
        need = 22 + int(font.getlength(name)) + 2 * _MARGIN
        if left + need > width and left > _MARGIN:
            left, row = _MARGIN, row + 1
        places.append((left, row))
        left += need
    picture = Image.new("RGB", (width, (row + 1) * 22 + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y * 22 + 2, x + 15, y * 22 + 17), fill=colour, outline="black")
        draw.text((x + 21, y * 22 + 2), name, fill="black", font=font)
    return picture


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, making the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_figure(draw: Callable[[Any], None], size: tuple[float, float], path: Path) -> bool:
    """Write what a function draws on a matplotlib figure of so many inches, as a PNG.

    Returns:
        False, and writes nothing, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
