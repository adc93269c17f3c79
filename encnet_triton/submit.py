"""Predictions for a test server: ``python -m encnet_triton.submit --checkpoint FILE --data DIR``.

Writes one zip archive in the layout of VOC 2012's or ADE20K's server, and verifies it before it is
renamed into place. Under torchrun the processes share the images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from encnet_triton import options
from encnet_triton.inference.submission import SERVERS, open_test_split, write_archive
from encnet_triton.weights import load_model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = options.Parser(
        prog="python -m encnet_triton.submit",
        description="Predict a test split and write the archive that its server takes.",
    )
    options.add_checkpoint(parser)
    parser.add_argument("--dataset", choices=tuple(SERVERS), help="default: the training run's")
    parser.add_argument("--data", help="its folder (default: the training run's)")
    parser.add_argument("--split", default="test", help="split to predict")
    parser.add_argument(
        "--output", type=Path, default=Path("submission.zip"), help="archive to write"
    )
    parser.add_argument(
        "--competition", choices=("comp5", "comp6"), default="comp6",
        help="VOC's: comp5 for a network that has seen VOC alone",
    )  # fmt: skip
    options.add_predictor_options(parser, whole_image=False)
    options.add_readers(parser)
    return parser


def run(given: argparse.Namespace, console: Console) -> None:
    """Load, predict, write."""
    options.refuse_place(given.output, "--output")
    device = options.pick_device(given.device)
    model, info = load_model(given.checkpoint, device)
    name = given.dataset or info.data["name"]
    dataset = open_test_split(info, given.checkpoint, name, given.split, given.data)
    rank, size = options.join_others(device)

    def progress(own: range) -> Iterable[int]:
        quiet = rank > 0 or not console.is_terminal
        return track(own, "predicting", console=console, transient=True, disable=quiet)

    count = write_archive(
        options.make_predictor(given, model, info, device),
        dataset,
        name,
        given.output,
        competition=given.competition,
        progress=progress,
        rank=rank,
        world_size=size,
        workers=options.reader_count(given.workers, device),
    )
    if rank == 0:
        console.print(f"wrote {count} predictions to {given.output}, read back and verified")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = make_parser().parse_args(arguments)
    return options.exit_status(lambda: run(given, options.make_console()))


if __name__ == "__main__":
    sys.exit(main())
