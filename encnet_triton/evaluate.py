"""Score a checkpoint on a data set: ``python -m encnet_triton.evaluate --checkpoint FILE``.

Under torchrun the processes share the images; every image counts once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from encnet_triton import options
from encnet_triton.files import write_json
from encnet_triton.inference import WHOLE_IMAGE_WARNING, ImageClassifier
from encnet_triton.models import CifarNet
from encnet_triton.scoring.classifier import Errors, measure_errors
from encnet_triton.scoring.segmentation import Evaluation, measure_scores
from encnet_triton.weights import load_model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.evaluate",
        description="Score a checkpoint on a data set.",
        formatter_class=options.Help,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.safetensors of a run")
    parser.add_argument("--dataset", help="name of the data set (default: the training run's)")
    parser.add_argument("--data", help="its folder (default: the training run's)")
    parser.add_argument("--split", help="split to score (default: the training run's validation)")
    options.add_predictor_options(parser)
    parser.add_argument(
        "--protocol", choices=("softmax", "released"), default="softmax",
        help="released: as the published code, see docs/evaluation.md",
    )  # fmt: skip
    options.add_readers(parser)
    parser.add_argument(
        "--json", type=Path, help="also write the scores to this file (default: none)"
    )
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, score and print; under torchrun the processes share the images."""
    if given.json:
        options.refuse_place(given.json, "--json")
    device = options.pick_device(given.device)
    model, info = load_model(given.checkpoint, device)
    where = (given.checkpoint, given.dataset, given.split, given.data)
    found: Errors | Evaluation
    if isinstance(model, CifarNet):
        options.refuse_segmentation_options(given, make_parser())
        rank, size = options.join_others(device)
        if rank > 0:  # the images are few and small
            return
        found = measure_errors(ImageClassifier(model, info, device), *where)
    else:
        rank, size = options.join_others(device)
        if given.whole_image and rank == 0:
            console.print(f"Warning: {WHOLE_IMAGE_WARNING}")
        released = given.protocol == "released"
        predictor = options.make_predictor(given, model, info, device, released)
        workers = options.reader_count(given.workers, device)
        found = measure_scores(predictor, *where, rank=rank, world_size=size, workers=workers)
    if rank == 0:
        found.show(console)
        if given.json:
            write_json(found.as_dict(), given.json)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
