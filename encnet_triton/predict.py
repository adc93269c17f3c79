"""Label photos: ``python -m encnet_triton.predict --checkpoint FILE photo.jpg``.

Checkpoints of classifiers name them instead, see `encnet_triton.classification`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console

from encnet_triton import classification
from encnet_triton.classification import ImageClassifier
from encnet_triton.command_line import exit_status
from encnet_triton.evaluate import add_view_arguments, pick_device, views_of
from encnet_triton.inference import WHOLE_IMAGE_WARNING, Predictor
from encnet_triton.models import CifarNet
from encnet_triton.pictures import overlay, palette_image, save_png
from encnet_triton.weights.checkpoint import load_model

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def find_images(inputs: Sequence[Path]) -> Iterator[Path]:
    """The images among files and folders, in order.

    Raises:
        ValueError: an input does not exist, or a folder holds no image.
    """
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"folder {path} holds no image ({', '.join(SUFFIXES)})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"image {path} does not exist")


def read_image(path: Path) -> Image.Image:
    """An RGB image, turned upright as the camera's EXIF says.

    Raises:
        ValueError: the file is no image, or a truncated one.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


def predict(predictor: Predictor, path: Path, output: Path) -> list[tuple[str, float]]:
    """Write ``<stem>_label.png`` and ``<stem>_overlay.png``; returns (class, share of pixels)."""
    image = read_image(path)
    label = predictor(np.asarray(image)).cpu().numpy()
    info = predictor.info
    picture = palette_image(label, info.palette)
    save_png(picture, output / f"{path.stem}_label.png")
    save_png(overlay(image, picture), output / f"{path.stem}_overlay.png")
    values, counts = np.unique(label, return_counts=True)
    shares = [(info.classes[v], float(c) / label.size) for v, c in zip(values, counts, strict=True)]
    return sorted(shares, key=lambda item: -item[1])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m encnet_triton.predict",
        description="Label photos: writes a palette PNG and an overlay of each. With a classifier: "
        "prints the likeliest classes.",
    )
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.safetensors of a run")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write")
    parser.add_argument("--whole-image", action="store_true", help="no windows; see the warning")
    add_view_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, label every image, and say what was found."""
    device = pick_device(options.device)
    model, info = load_model(options.checkpoint, device)
    if isinstance(model, CifarNet):
        classification.refuse_segmentation_options(options, make_parser())
        pictures = ((path, read_image(path)) for path in find_images(options.inputs))
        classifier = ImageClassifier(model, info, device)
        classification.predict(classifier, pictures, console)
        return
    if options.whole_image:
        console.print(f"Warning: {WHOLE_IMAGE_WARNING}")
    predictor = Predictor(
        model,
        info,
        device=device,
        whole_image=options.whole_image,
        views=views_of(options),
        batch=options.batch,
    )
    paths = list(find_images(options.inputs))
    _refuse_equal_names(paths)
    for path in paths:
        shares = predict(predictor, path, options.output)
        found = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        console.print(f"{path}: {found}", highlight=False, markup=False)
    console.print(f"wrote {2 * len(paths)} pictures to {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: run(options, Console(soft_wrap=True)))


def _refuse_equal_names(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise ValueError(
                f"{seen[path.stem]} and {path} would both be written as {path.stem}_label.png; "
                "label them in two calls with another --output"
            )
        seen[path.stem] = path


if __name__ == "__main__":
    sys.exit(main())
