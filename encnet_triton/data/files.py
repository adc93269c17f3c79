"""What the data sets that read files share: pairs of an image and a label file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from encnet_triton.data.base import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    UNREADABLE,
    DataError,
    Sample,
    decode,
    default_palette,
)

__all__ = ["FileDataset", "Pair", "check_present", "find_root", "open_image", "read_lines"]

_BAD_VALUE = IGNORE_INDEX - 1
_SHALLOW_MODES = ("1", "L", "P")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")

Pair = tuple[Path, Path | None]
"""An image and its label; None where there is no label, as in a test split."""


class FileDataset:
    """Images and their label files.

    Args:
        pairs: the files, in order.
        classes: names of the n classes.
        values: label value in the files -> class 0..n-1, or 255 for what is no class. Any other
            value in a file is an error.
        allowed: the end of that error's sentence: what the values stand for.
        palette: n x 3 colours; `default_palette` if None.
        mean, std: RGB statistics in 0..1 for normalisation, ImageNet's by default.

    The label of an image without one is 255 everywhere.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: Sequence[str],
        *,
        values: Mapping[int, int],
        allowed: str,
        palette: NDArray[np.uint8] | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        self.classes = tuple(classes)
        self.palette = default_palette(len(self.classes)) if palette is None else palette
        self.mean = mean
        self.std = std
        self._pairs = list(pairs)
        self._values = dict(values)
        self._allowed = allowed
        self._table = bytes(self._values.get(value, _BAD_VALUE) for value in range(256))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.open(index)
        return Sample(decode(image), label)

    def open(self, index: int) -> Sample:
        image_path, label_path = self._pairs[index]
        image = open_image(image_path, "image")
        if label_path is None:
            return Sample(image, np.full((image.height, image.width), IGNORE_INDEX, np.uint8))
        label = open_image(label_path, "label")
        if image.size != label.size:
            raise DataError(
                f"image {image_path} is {image.width} x {image.height} pixels, but its "
                f"label {label_path} is {label.width} x {label.height}; they must be equal"
            )
        return Sample(image, self._read_label(label, label_path))

    def name_of(self, index: int) -> str:
        return str(self._pairs[index][0])

    def _read_label(self, image: Image.Image, path: Path) -> NDArray[np.uint8]:
        """Decode a label file and turn its values into 0..n-1 and 255."""
        if image.mode not in _SHALLOW_MODES + _DEEP_MODES:
            raise DataError(
                f"label {path} has pixel format {image.mode}; a label must be a single-channel or "
                "palette image whose values are class numbers"
            )
        try:
            image.load()
        except UNREADABLE as error:
            raise DataError(f"label {path} is truncated or damaged ({error})") from error
        if image.mode in _DEEP_MODES:
            return self._map_deep(np.asarray(image).astype(np.int64), path)
        if image.mode == "1":
            image = Image.fromarray(np.asarray(image).astype(np.uint8))
        mapped = np.frombuffer(bytearray(image.tobytes()).translate(self._table), np.uint8)
        mapped = mapped.reshape(image.height, image.width)
        if not self._fits(mapped):
            table = np.frombuffer(self._table, np.uint8)
            values = np.unique(np.asarray(image))
            self._refuse(values[table[values] == _BAD_VALUE], path)
        return mapped

    def _fits(self, mapped: NDArray[np.uint8]) -> bool:
        # 255 wraps to 0, so one maximum tells whether all values are classes or ignored.
        return bool((mapped + np.uint8(1)).max() <= len(self.classes))

    def _map_deep(self, values: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
        """As the table does, for labels of 16 or 32 bits."""
        found, inverse = np.unique(values, return_inverse=True)
        table = np.array(
            [self._values.get(value, _BAD_VALUE) for value in found.tolist()], np.uint8
        )
        if (table == _BAD_VALUE).any():
            self._refuse(found[table == _BAD_VALUE], path)
        return table[inverse].reshape(values.shape)

    def _refuse(self, bad: NDArray[np.int64] | NDArray[np.uint8], path: Path) -> None:
        shown = ", ".join(str(value) for value in bad[:5].tolist())
        more = ", ..." if len(bad) > 5 else ""
        raise DataError(f"label {path} has the value {shown}{more}, but {self._allowed}")


def open_image(path: Path, what: str) -> Image.Image:
    """An opened, not yet decoded image; DataError for a file that is missing or no image."""
    try:
        # From memory, because Pillow would keep the file open until it is decoded.
        image = Image.open(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist") from None
    except UnidentifiedImageError:
        raise DataError(f"{what} {path} is not an image of a known format") from None
    except UNREADABLE as error:
        raise DataError(f"{what} {path} cannot be read ({error})") from error
    image.filename = str(path)  # type: ignore[attr-defined]
    return image


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file; DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path} cannot be read ({error})") from error


def check_present(pairs: Iterable[Pair], listing: Path) -> None:
    """Refuse files of a list that do not exist now rather than hours into a run."""
    # One listing a folder is far cheaper than one look-up a file on network storage.
    present: dict[Path, frozenset[str]] = {}
    missing: list[Path] = []
    for path in (path for pair in pairs for path in pair if path is not None):
        if path.parent not in present:
            names = os.listdir(path.parent) if path.parent.is_dir() else []
            present[path.parent] = frozenset(names)
        if path.name not in present[path.parent]:
            missing.append(path)
    if missing:
        others = f" (nor do {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(f"{listing} names {missing[0]}, which does not exist{others}")


def find_root(root: str | os.PathLike[str], below: Sequence[str], marker: str, source: str) -> Path:
    """The folder, among ``root`` and the paths ``below`` it, that holds ``marker``.

    People give the folder they have unpacked an archive in as often as the one inside of it.
    """
    given = Path(root)
    if not given.is_dir():
        raise DataError(f"data folder {given} does not exist or is not a folder; {source}")
    places = [given, *(given / name for name in below)]
    for place in places:
        if (place / marker).is_dir():
            return place
    inside = "".join(f" or {name}/{marker}" for name in below)
    raise DataError(f"{given} has no folder {marker}{inside}; {source}")
