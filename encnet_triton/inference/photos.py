"""Photos to label: found, read, and written as pictures of their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from encnet_triton.data.base import DataError
from encnet_triton.data.files import visible
from encnet_triton.data.images import image_suffixes, read_image
from encnet_triton.inference.explaining import Explainer, explanation_picture
from encnet_triton.inference.predictor import Predictor
from encnet_triton.pictures import overlay, palette_image, save_png
from encnet_triton.unpickle import printable

__all__ = ["find_images", "label_photo", "other_files", "read_image", "refuse_clashes"]


def find_images(inputs: Sequence[Path]) -> Iterator[Path]:
    """The images among files and folders, in order; hidden files of folders are left out.

    Raises:
        ValueError: an input does not exist, or a folder has no images.
    """
    for path in inputs:
        if path.is_dir():
            there = (p for p in visible(path, "*") if not p.is_dir())
            found = [p for p in there if p.suffix.lower() in image_suffixes()]
            if not found:
                raise ValueError(f"folder {path} has no images ({', '.join(image_suffixes())})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"image {path} does not exist")


def other_files(inputs: Sequence[Path]) -> list[str]:
    """Names of files of folders that `find_images` leaves out: their suffix is no picture's."""
    there = (p for path in inputs if path.is_dir() for p in visible(path, "*") if not p.is_dir())
    return [printable(p.name) for p in there if p.suffix.lower() not in image_suffixes()]


def label_photo(
    predictor: Predictor, path: Path, output: Path, explain: Explainer | None = None
) -> list[tuple[str, float]]:
    """Write the pictures of `written`, the last where it is to be explained; returns (class, share
    of pixels)."""
    label_file, overlay_file, *explained_file = written(path, output, explain is not None)
    image = read_image(path)
    try:
        label = predictor(np.asarray(image)).cpu().numpy()
    except DataError as error:
        raise DataError(f"image {path}: {error}") from None
    info = predictor.info
    picture = palette_image(label, info.palette)
    save_png(picture, label_file)
    save_png(overlay(image, picture), overlay_file)
    if explain is not None:
        found = explanation_picture(explain(np.asarray(image)), info)
        save_png(found, *explained_file)
    values, counts = np.unique(label, return_counts=True)
    shares = [(info.classes[v], float(c) / label.size) for v, c in zip(values, counts, strict=True)]
    return sorted(shares, key=lambda item: -item[1])


def written(path: Path, output: Path, explained: bool) -> list[Path]:
    """The files of a photo's label, of its overlay and, if ``explained``, of its explanation."""
    kinds = ("label", "overlay", "explained") if explained else ("label", "overlay")
    return [output / f"{path.stem}_{what}.png" for what in kinds]


def refuse_clashes(paths: Sequence[Path], output: Path, explained: bool) -> None:
    """A ValueError if two photos would be written to one file, or over a file that is read."""
    own = {file.resolve(): path for path in paths for file in written(path, output, explained)}
    for path in paths:
        if (other := own.get(path.resolve())) is not None:
            raise ValueError(
                f"{path} is one of the images and would be overwritten by what is found in {other};"
                " give another --output, or leave it out"
            )
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise ValueError(
                f"{seen[path.stem]} and {path} would both be written as {path.stem}_label.png; "
                "label them in two calls with another --output"
            )
        seen[path.stem] = path
