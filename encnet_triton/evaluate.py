"""Score a checkpoint on a data set: ``python -m encnet_triton.evaluate --checkpoint FILE``.

Under torchrun the processes share the images; every image counts once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from encnet_triton import options
from encnet_triton.data import Dataset
from encnet_triton.files import write_json, write_text
from encnet_triton.inference import WHOLE_IMAGE_WARNING, ImageClassifier, Predictor
from encnet_triton.machine import report as machine
from encnet_triton.models import CifarNet
from encnet_triton.report import Html, facts, page, section
from encnet_triton.report.scored import class_sections, image_sections
from encnet_triton.scoring.classifier import Errors, measure_errors
from encnet_triton.scoring.segmentation import Evaluation, measure_scores, open_dataset
from encnet_triton.weights import load_model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.evaluate",
        description="Score a checkpoint on a data set.",
    )
    options.add_checkpoint(parser)
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
    parser.add_argument(
        "--report", type=Path, help="also write an HTML page with pictures (default: none)"
    )
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, score and print; under torchrun the processes share the images."""
    for name in ("json", "report"):
        if place := getattr(given, name):
            options.refuse_place(place, f"--{name}")
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
        if given.report and isinstance(found, Evaluation):
            sections = _sections(found, predictor, open_dataset(info, *where))
            write_text(page(f"{given.checkpoint} on {found.split}", sections), given.report)


def _sections(found: Evaluation, predictor: Predictor, dataset: Dataset) -> list[Html]:
    """The report of an evaluation."""
    rows: list[tuple[str, object]] = [
        ("data set", f"{found.dataset} {found.split}, {found.images:,} images"),
        ("views", found.views),
        *((one.name, one.sentence()) for one in found.protocols),
    ]
    return [
        facts(rows),
        *class_sections(found.scores, found.classes),
        *image_sections(predictor, dataset, found.scores),
        section("Machine", facts(machine()), folded=True),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
