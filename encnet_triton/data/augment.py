"""Training augmentation in one warp: flip, scale, rotation and crop are one affine map.

Image (bilinear) and label (nearest) are each resampled once, straight from the decoded file into
the crop. What lies outside the image becomes `fill` and the ignored label. Coordinates are
continuous: pixel j covers [j, j + 1), its centre is j + 1/2, so scaling by s takes centre (j + 1/2)
to s (j + 1/2), as `align_corners=False` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from encnet_triton.data.base import IGNORE_INDEX
from encnet_triton.data.images import decode

__all__ = ["Augment", "Warp", "make_warp", "warp_image", "warp_label"]

SCALE_BY = ("short", "long", "image")

# Bilinear sampling reads 2 x 2 source pixels; below this scale it would skip some, so the source is
# halved (or quartered, ...) first. At 0.6 a halved source is enlarged by 1.2.
_REDUCE_BELOW = 0.6

_BILINEAR, _PAD_BORDER = 0, 1  # torch's numbers for grid_sample's modes


@dataclass(frozen=True)
class Warp:
    """Map from output to source, in continuous pixels: x = a X + b Y + c, y = d X + e Y + f."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    @property
    def scale(self) -> float:
        """Output pixels per source pixel."""
        return 1 / math.sqrt(abs(self.a * self.e - self.b * self.d))

    def reduced(self, factor: int) -> Warp:
        """The same map into a source whose pixels are `factor` times as wide and high."""
        values = (self.a, self.b, self.c, self.d, self.e, self.f)
        return Warp(*(value / factor for value in values))

    def bounds(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Source pixels (left, top, right, bottom) that bilinear sampling may read."""
        x = [self.a * i + self.b * j + self.c for i in (0, width) for j in (0, height)]
        y = [self.d * i + self.e * j + self.f for i in (0, width) for j in (0, height)]
        return (
            math.floor(min(x)) - 1,
            math.floor(min(y)) - 1,
            math.ceil(max(x)) + 1,
            math.ceil(max(y)) + 1,
        )


def make_warp(
    source: tuple[int, int],
    *,
    scale: float,
    degrees: float,
    flip: bool,
    offset: tuple[float, float],
) -> Warp:
    """Compose flip, scale, rotation and crop, in this order, into one map from crop to source.

    Args:
        source: height and width of the source.
        scale: size of the scaled image over that of the source.
        degrees: rotation about the centre of the scaled image, counter-clockwise as seen, positive
            as in PIL.
        flip: mirror left and right.
        offset: (y, x) of the crop's first pixel in the scaled and rotated image; may be negative.
    """
    height, width = source
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Crop -> scaled image: turn back about its centre. The y axis points down.
    centre_x, centre_y = scale * width / 2, scale * height / 2
    shift_x, shift_y = offset[1] - centre_x, offset[0] - centre_y
    a, b, c = cosine, -sine, cosine * shift_x - sine * shift_y + centre_x
    d, e, f = sine, cosine, sine * shift_x + cosine * shift_y + centre_y
    a, b, c, d, e, f = (value / scale for value in (a, b, c, d, e, f))
    if flip:
        a, b, c = -a, -b, width - c
    return Warp(a, b, c, d, e, f)


def warp_image(
    image: Image.Image, warp: Warp, size: tuple[int, int], fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Sample an image bilinearly at the `warp` of each pixel centre.

    `image` may be opened but not decoded: a JPEG is then decoded at 1/2, 1/4 or 1/8 where the warp
    shrinks it enough. Outside counts as pixels of colour `fill`. Returns uint8, size[0] x size[1] x
    3. Raises DataError for a damaged file.
    """
    image, warp = _shrink(image, warp)
    wanted = warp.bounds(*size)
    if not (wanted[0] < image.width and wanted[1] < image.height and min(wanted[2:]) > 0):
        return np.full((*size, 3), fill, np.uint8)
    source, corner = _padded_region(image, wanted, fill)
    # Half a level more, because conversion to uint8 truncates.
    source += 0.5
    channels_first = torch.from_numpy(source).permute(2, 0, 1)[None]
    grid = _grid(warp, size, corner, source.shape)
    planes = torch.grid_sampler_2d(channels_first, grid, _BILINEAR, _PAD_BORDER, False)[0]
    output = np.empty((*size, 3), np.uint8)
    for channel, plane in enumerate(planes.numpy()):
        np.copyto(output[..., channel], plane, casting="unsafe")
    return output


def warp_label(
    label: NDArray[np.uint8], warp: Warp, size: tuple[int, int], outside: int = IGNORE_INDEX
) -> NDArray[np.uint8]:
    """Take the label under the `warp` of each pixel centre. Returns uint8, size[0] x size[1]."""
    coefficients = (warp.a, warp.b, warp.c, warp.d, warp.e, warp.f)
    sampled = Image.fromarray(label).transform(
        (size[1], size[0]),
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.NEAREST,
        fillcolor=outside,
    )
    return np.asarray(sampled)


def _shrink(image: Image.Image, warp: Warp) -> tuple[Image.Image, Warp]:
    """The image, decoded to RGB, with blocks of pixels averaged where the warp shrinks much."""
    factor = 1
    while warp.scale * factor <= _REDUCE_BELOW and min(image.size) >= 16 * factor:
        factor *= 2
    if factor == 1:
        return decode(image), warp
    # Skips most of the inverse cosine transform of a JPEG; does nothing for other formats.
    width = image.width
    image.draft("RGB", (image.width // factor, image.height // factor))
    drafted = 2 ** round(math.log2(width / image.width))
    image = decode(image)
    if drafted < factor:
        image = image.reduce(factor // drafted)
    return image, warp.reduced(factor)


def _padded_region(
    image: Image.Image, wanted: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """The wanted part of an image, with one pixel of `fill` along each side that goes outside.

    One pixel is enough, because the sampler repeats it. Returns float32 h x w x 3 and the column
    and row of its first pixel in the image.
    """
    left, top = max(wanted[0], -1), max(wanted[1], -1)
    right, bottom = min(wanted[2], image.width + 1), min(wanted[3], image.height + 1)
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    rows, columns = slice(box[1] - top, box[3] - top), slice(box[0] - left, box[2] - left)
    source = np.empty((bottom - top, right - left, 3), np.float32)
    source[: rows.start] = source[rows.stop :] = fill
    source[:, : columns.start] = source[:, columns.stop :] = fill
    source[rows, columns] = np.asarray(image.crop(box))
    return source, (left, top)


def _grid(
    warp: Warp, size: tuple[int, int], corner: tuple[int, int], source: tuple[int, ...]
) -> torch.Tensor:
    """Positions in the source region, 1 x H x W x 2 (x, y), scaled to -1..1 between its edges."""
    scale_x, scale_y = 2 / source[1], 2 / source[0]
    x = np.arange(size[1]) + 0.5
    y = np.arange(size[0]) + 0.5
    # One complex number is one (x, y) pair: a single outer sum fills the grid.
    row = scale_x * warp.a * x + 1j * (scale_y * warp.d * x)
    column_x = scale_x * (warp.b * y + warp.c - corner[0]) - 1
    column_y = scale_y * (warp.e * y + warp.f - corner[1]) - 1
    column = column_x + 1j * column_y
    row_pairs = torch.from_numpy(row.astype(np.complex64))
    column_pairs = torch.from_numpy(column.astype(np.complex64))
    return torch.view_as_real(column_pairs[:, None] + row_pairs)[None]


class Augment:
    """Random flip, scale, rotation and crop of a training sample.

    Scale s is uniform in `scale`: the scaled image's short (or long) edge is s x `base_size`
    pixels, or, with `scale_by` "image" or without a `base_size`, s times its own. The rotation is
    uniform in +-`rotation` degrees about the centre. The crop lies anywhere in the scaled image;
    along an axis where that is smaller, the image lies anywhere in the crop, or, with `top_left`,
    at its beginning. Offsets are whole pixels, so that without scale and rotation the crop is an
    exact copy.

    Args:
        crop: height and width of the output, or one number for both.
        base_size: edge length that scale 1 stands for, in pixels.
        scale: range of s.
        scale_by: "short", "long" or "image".
        rotation: largest angle in degrees, 0..180.
        flip: probability of mirroring left and right.
        ignore_index: label outside the image.
        fill: RGB colour outside the image, 0..255.
        top_left: where an image lies along an axis on which it is smaller than the crop.

    Raises ValueError for a value out of range.
    """

    def __init__(
        self,
        crop: int | Sequence[int],
        *,
        base_size: int | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        scale_by: str = "short",
        rotation: float = 10.0,
        flip: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        fill: Sequence[int] = (124, 116, 104),
        top_left: bool = False,
    ) -> None:
        sizes = (crop, crop) if isinstance(crop, int) else tuple(crop)
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"crop must be a positive size or (height, width), got {crop!r}")
        if base_size is not None and base_size < 1:
            raise ValueError(f"base_size must be at least 1 pixel, got {base_size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two positive numbers, smaller first, got {scale!r}")
        if scale_by not in SCALE_BY:
            raise ValueError(f"scale_by must be one of {', '.join(SCALE_BY)}, got {scale_by!r}")
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation must be within 0..180 degrees, got {rotation}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must be a probability within 0..1, got {flip}")
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"ignore_index must be within 0..255, got {ignore_index}")
        if len(fill) != 3 or not all(0 <= channel <= 255 for channel in fill):
            raise ValueError(f"fill must be three RGB values within 0..255, got {fill!r}")
        self.crop = (sizes[0], sizes[1])
        self.base_size = base_size
        self.scale = (scale[0], scale[1])
        self.scale_by = scale_by
        self.rotation = rotation
        self.flip = flip
        self.ignore_index = ignore_index
        self.fill = (fill[0], fill[1], fill[2])
        self.top_left = top_left

    def draw(self, source: tuple[int, int], rng: np.random.Generator) -> Warp:
        """The warp for a source of this height and width; always takes five numbers from `rng`."""
        height, width = source
        scale, degrees, flip, y, x = rng.random(5).tolist()
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        if self.base_size is not None and self.scale_by != "image":
            edge = min(source) if self.scale_by == "short" else max(source)
            scale *= self.base_size / edge
        offset = [_offset(y, scale * height, self.crop[0]), _offset(x, scale * width, self.crop[1])]
        if self.top_left:
            offset = [max(0, first) for first in offset]
        return make_warp(
            source,
            scale=scale,
            degrees=self.rotation * (2 * degrees - 1),
            flip=flip < self.flip,
            offset=(offset[0], offset[1]),
        )

    def __call__(
        self, image: Image.Image, label: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Augment one sample.

        Args:
            image: RGB, or opened and not decoded yet (then faster; it cannot be used afterwards).
            label: uint8, of the image's height x width.
            rng: the same state gives the same crop.

        Returns the image, uint8 h x w x 3, and the label, uint8 h x w. Raises DataError for a
        damaged file.
        """
        warp = self.draw(label.shape, rng)
        return (
            warp_image(image, warp, self.crop, self.fill),
            warp_label(label, warp, self.crop, self.ignore_index),
        )


def _offset(uniform: float, image: float, crop: int) -> int:
    """First pixel of a crop along one axis, any whole pixel; negative for a smaller image."""
    slack = round(image) - crop
    places = math.floor(uniform * (abs(slack) + 1))
    return places if slack >= 0 else -places
