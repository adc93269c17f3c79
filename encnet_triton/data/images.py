"""The one image reader of training, evaluation, checks and predictions, so that all get the same
image:

- Images and labels are turned upright by their EXIF orientation, as a viewer shows them.
- An image is RGB of 8 bits per channel. Of 16 bits the high byte is taken, for a range of 0 to
  65535; a file that uses only the lowest 12 bits would be almost black and is refused. 32-bit
  integers and floats have no known range and are refused.
- A label has the numbers that are in the file, whatever its depth, 1 to 32 bits.
- Only image formats are opened, and no image of more than 178,956,970 pixels.
"""

from __future__ import annotations

import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from encnet_triton.data.base import DataError, read_content
from encnet_triton.unpickle import printable

__all__ = ["MOST_PIXELS", "decode", "open_image", "read_image", "read_label"]

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Largest picture that Pillow opens."""

# No other formats: for PostScript, say, Pillow would start a program.
_FORMATS = (
    "JPEG", "MPO", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF",
)  # fmt: skip
_LOSSY = ("JPEG", "MPO")  # can be decoded at a smaller scale, and is unusable for labels
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_IN_32 = ("PNG", "PPM")  # older Pillows have no mode of 16 bits for these
_LABELS = ("1", "L", "P", "I", *_SIXTEEN_BITS)
_NARROW = re.compile(r"(?:L;?(?P<bits>[24]?)|1;)R?(?P<inverted>I?)R?")

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: Path) -> Image.Image:
    """An upright image that `decode` makes RGB, of its final size.

    A JPEG that need not be turned is not decoded yet, so that it can be decoded at a smaller scale.

    Raises:
        DataError: it is missing, no image, damaged, too large or not of 8 or 16 bits; names it.
    """
    image = _open(path, "image")
    if image.format not in _LOSSY or _orientation(image) in _TURNS:
        image = _decoded(image, str(path))
    # Not before: Pillow would map an undecoded TIFF of that name into memory, and not turn it.
    image.filename = str(path)  # type: ignore[attr-defined]
    return image


def read_image(path: Path) -> Image.Image:
    """An upright RGB image; raises what `open_image` raises."""
    return decode(open_image(path))


def decode(image: Image.Image) -> Image.Image:
    """Decode an opened image to RGB, upright.

    Raises:
        DataError: it is cut short, damaged, or not of 8 or 16 bits per channel; names the file.
    """
    return _decoded(image, str(getattr(image, "filename", "")) or "image")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    deep = image.mode in _SIXTEEN_BITS or (
        image.mode == "I" and getattr(image, "format", None) in _SIXTEEN_IN_32
    )
    if image.mode not in _EIGHT_BITS and not deep:
        raise DataError(
            f"{name}: pixel format {image.mode!r} is not supported; images must have 8 bits a "
            "channel, or 16 without sign"
        )
    sixteen = deep or ";16" in _raw_mode(image)
    try:
        image.load()
        orientation = _orientation(image)
        most = int(np.asarray(image).max()) if sixteen else 0
        if deep:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif sixteen:  # Pillow has kept the high byte alone
            most *= 256
        if image.mode != "RGB":
            image = image.convert("RGB")
        if orientation in _TURNS:
            image = _turned(image, orientation)
    except Exception as error:  # damage can make Pillow raise anything
        raise DataError(f"{name}: the image is truncated or damaged ({_why(error)})") from error
    if sixteen and 0 < most < 4096:
        raise DataError(
            f"{name} has 16 bits per channel, but its values are below "
            f"{256 * (most // 256 + 1):,} of 65,536: scale it to 8 bits by the range that you mean"
        )
    return image


def read_label(path: Path) -> NDArray[np.uint8] | NDArray[np.int64]:
    """The values of a label file, H x W, upright: uint8, or int64 where it has more than 8 bits.

    Raises:
        DataError: it is missing, no image, damaged, too large, or has no single number per pixel.
    """
    image = _open(path, "label")
    lossy = "JPEG" if image.format in _LOSSY else _lossy_inside(image)
    if lossy:
        raise DataError(f"label {path} is a {lossy}, which alters values: save labels as PNG")
    gif = image.format == "GIF"
    if image.mode not in _LABELS:
        raise DataError(
            f"label {path} has pixel format {image.mode}; a label must be a single-channel or "
            "palette image whose values are class numbers"
        )
    raw, most = _raw_mode(image), _most(image)
    try:
        image.load()
        orientation = _orientation(image)
        if orientation in _TURNS:
            image = _turned(image, orientation)
        values = np.asarray(image)
    except Exception as error:  # damage can make Pillow raise anything
        raise DataError(f"label {path} is truncated or damaged ({_why(error)})") from error
    if image.mode not in ("1", "L", "P"):
        return _spread(values.astype(np.int64), 65535, most)
    narrow = _NARROW.fullmatch(raw)
    if image.mode == "1":
        return (values ^ bool(narrow and narrow["inverted"])).astype(np.uint8)
    if gif:
        return _as_saved(image, values)
    if narrow and narrow["inverted"]:
        values = 255 - values
    if narrow and narrow["bits"]:
        most = 2 ** int(narrow["bits"]) - 1
    return _spread(values, 255, most)


def _most(image: Image.Image) -> int | None:
    """The largest number that a PGM says it has, which Pillow makes the largest of 8 or 16 bits."""
    arguments = _arguments(image) if image.format == "PPM" else None
    return arguments[1] if isinstance(arguments, tuple) and len(arguments) > 1 else None


def _spread(values: NDArray[Any], full: int, most: int | None) -> NDArray[Any]:
    """Undo what Pillow did to numbers of 0 to `most`: it has spread them over 0 to `full`."""
    if most is None or most >= full:
        return values
    return ((values.astype(np.int64) * most + full // 2) // full).astype(values.dtype)


def _as_saved(image: Image.Image, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The greys of a GIF whose palette is grey: programs renumber its entries as they save one."""
    palette = np.asarray(image.getpalette() or (), np.uint8).reshape(-1, 3)
    grey = len(palette) > values.max(initial=0) and (palette == palette[:, :1]).all()
    return palette[:, 0][values] if grey else values


def _lossy_inside(image: Image.Image) -> str:
    """The name of a lossy compression of a TIFF or of WebP and the like, or ""."""
    if image.format in ("WEBP", "AVIF", "JPEG2000"):
        return str(image.format)
    compression = str(image.info.get("compression", ""))
    return "TIFF of JPEGs" if image.format == "TIFF" and "jpeg" in compression else ""


def _open(path: Path, what: str) -> Image.Image:
    """An opened picture, as it lies in the file."""
    try:
        content = read_content(path, what)
        if not content:
            raise DataError(f"{what} {path} is empty")
        # From memory, because Pillow would keep the file open until it is decoded.
        image = Image.open(io.BytesIO(content), formats=_known())
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{what} {path} is not an image of a known format ({', '.join(_known())})"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{what} {path} has more than the {MOST_PIXELS:,} pixels that are read; cut it into "
            "parts"
        ) from None
    except Exception as error:  # damage can make Pillow raise anything
        raise DataError(f"{what} {path} cannot be read ({_why(error)})") from error
    return image


@cache
def image_suffixes() -> tuple[str, ...]:
    """Suffixes of the formats that are read, such as ".jpg"; the usual ones first."""
    found = sorted(s for s, name in Image.registered_extensions().items() if name in _known())
    usual = [s for s in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp") if s in found]
    return tuple(dict.fromkeys([*usual, *found]))


@cache
def _known() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _arguments(image: Image.Image) -> Any:
    """What Pillow's decoder is told of the file; None once it is decoded."""
    tiles: Any = getattr(image, "tile", None)
    return tiles[0][3] if tiles else None


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, in Pillow's words; "" once it is decoded."""
    arguments = _arguments(image)
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else ""


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # its EXIF is damaged; no viewer would turn it
        return 1
    return found if isinstance(found, int) else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turned = image.transpose(_TURNS[orientation])
    turned.info.clear()  # else its EXIF would have it turned again
    return turned


def _why(error: Exception) -> str:
    return printable(str(error)) or type(error).__name__
