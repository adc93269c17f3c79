"""Label photos: ``python -m encnet_triton.predict --checkpoint FILE photo.jpg``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from encnet_triton import options
from encnet_triton.inference import WHOLE_IMAGE_WARNING, ImageClassifier, find_images, read_image
from encnet_triton.inference.photos import label_photo, refuse_equal_names
from encnet_triton.models import CifarNet
from encnet_triton.weights import load_model

__all__ = ["find_images", "main", "read_image"]


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
    options.add_predictor_options(parser)
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, label every image, and say what was found."""
    device = options.pick_device(given.device)
    model, info = load_model(given.checkpoint, device)

    def tell(path: Path, found: list[tuple[str, float]]) -> None:
        text = ", ".join(f"{name} {share:.1%}" for name, share in found)
        console.print(f"{path}: {text}", highlight=False, markup=False)

    if isinstance(model, CifarNet):
        options.refuse_segmentation_options(given, make_parser())
        classifier = ImageClassifier(model, info, device)
        for path in find_images(given.inputs):
            tell(path, classifier.name(read_image(path)))
        return
    if given.whole_image:
        console.print(f"Warning: {WHOLE_IMAGE_WARNING}")
    predictor = options.make_predictor(given, model, info, device)
    paths = list(find_images(given.inputs))
    refuse_equal_names(paths)
    for path in paths:
        tell(path, label_photo(predictor, path, given.output))
    console.print(f"wrote {2 * len(paths)} pictures to {given.output}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, Console(soft_wrap=True)))


if __name__ == "__main__":
    sys.exit(main())
