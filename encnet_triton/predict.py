"""Label photos: ``python -m encnet_triton.predict --checkpoint FILE photo.jpg``.

Under torchrun the processes share the photos. If one cannot be read, the others are still labelled
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from encnet_triton import options
from encnet_triton.data import DataError
from encnet_triton.data.base import few
from encnet_triton.files import make_folder
from encnet_triton.inference import WHOLE_IMAGE_WARNING, ImageClassifier, find_images, read_image
from encnet_triton.inference.explaining import Explainer
from encnet_triton.inference.photos import label_photo, other_files, refuse_clashes
from encnet_triton.models import CifarNet
from encnet_triton.weights import ModelInfo, load_model

__all__ = ["find_images", "main", "read_image"]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.predict",
        description="Label photos: writes a palette PNG and an overlay of each. With a classifier: "
        "prints the likeliest classes.",
    )
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER",
        help="a folder stands for its images, without subfolders",
    )  # fmt: skip
    options.add_checkpoint(parser)
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write")
    parser.add_argument(
        "--explain", action="store_true",
        help="of an EncNet: also draw the codewords of the pixels, the gates of the channels and "
        "the classes that the context predicts",
    )  # fmt: skip
    options.add_predictor_options(parser)
    return parser


Label = Callable[[Path], list[tuple[str, float]]]


def make_labeller(
    given: argparse.Namespace, model: nn.Module, info: ModelInfo, device: torch.device
) -> Label:
    """What to do with a photo; returns the classes found in it and their shares."""
    if isinstance(model, CifarNet):
        classifier = ImageClassifier(model, info, device)
        return lambda path: classifier.name(read_image(path))
    make_folder(given.output, "the output folder")
    explain = Explainer(model, info, device) if given.explain else None
    predictor = options.make_predictor(given, model, info, device)
    return lambda path: label_photo(predictor, path, given.output, explain)


def run(given: argparse.Namespace, console: Console) -> int:
    """Load, label every image, and print what was found; returns 1 if some could not be read."""
    device = options.pick_device(given.device)
    model, info = load_model(given.checkpoint, device)
    classifying = isinstance(model, CifarNet)
    if classifying:
        options.refuse_segmentation_options(given, make_parser())
    paths = list(find_images(given.inputs))
    if not classifying:
        refuse_clashes(paths, given.output, given.explain)
    label = make_labeller(given, model, info, device)
    rank, size = options.join_others(device)
    if rank == 0 and (others := other_files(given.inputs)):
        console.print(f"left out, not named as pictures are: {few(others)}")
    if given.whole_image and rank == 0:
        console.print(f"Warning: {WHOLE_IMAGE_WARNING}")
    bad: list[str] = []
    for path in paths[rank::size]:
        try:
            found = label(path)
        except DataError as error:
            bad.append(str(error))
            continue
        console.print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in found)}")
    bad = options.gathered(bad)
    if rank == 0:
        if not classifying:
            each = 3 if given.explain else 2
            console.print(f"wrote {each * (len(paths) - len(bad))} pictures to {given.output}")
        if bad:
            print(f"error: {len(bad)} of {len(paths)} images cannot be read:", file=sys.stderr)
            print(*(f"  {sentence}" for sentence in bad), sep="\n", file=sys.stderr)
    options.gathered([])  # torchrun ends the others as soon as one has ended with 1
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
