"""``python -m encnet_triton.data``: check a data set, or prepare the labels of one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from encnet_triton.data import DATASETS, DataError, create_dataset, prepare
from encnet_triton.data.check import SplitReport, check_split

PREPARED = ("voc_aug", "pascal_context", "coco_voc")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m encnet_triton.data")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="count, decode and verify every file of a data set")
    check.add_argument("dataset", choices=[name for name in DATASETS if name != "scenes"])
    check.add_argument("--data", required=True, help="its folder")
    check.add_argument("--split", action="append", help="split to check (default: train and val)")
    check.add_argument("--every", type=int, default=1, help="look at one of so many images")
    check.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    check.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="option of the data set, for example label_order=alphabetical",
    )  # fmt: skip
    made = commands.add_parser("prepare", help="turn official masks that are no PNGs into PNGs")
    made.add_argument("dataset", choices=PREPARED)
    made.add_argument("--data", type=Path, required=True, help="VOC2012, VOC2010 or COCO's folder")
    made.add_argument("--sbd", type=Path, help="voc_aug: folder with cls/, train.txt, val.txt")
    made.add_argument("--mat", type=Path, help="pascal_context: folder of the .mat files")
    made.add_argument("--detail", type=Path, help="pascal_context: trainval_merged.json")
    made.add_argument("--split", action="append", help="coco_voc: train or val (default: both)")
    return parser.parse_args(arguments)


def dataset_options(given: list[str]) -> dict[str, Any]:
    """``name=value`` texts as options; whole numbers become int."""
    options: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise DataError(f"--option {text!r} must be NAME=VALUE")
        options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options


def run_check(options: argparse.Namespace, console: Console) -> bool:
    """Check each split; returns whether all is well."""
    maker = DATASETS[options.dataset]
    extra = dataset_options(options.option)
    well = True
    for split in options.split or getattr(maker, "splits", ("train", "val")):
        try:
            dataset = create_dataset(options.dataset, split, options.data, **extra)
        except DataError as error:
            console.print(f"[bold]{split}[/]: error: ", end="")
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            well = False
            continue
        progress = partial(
            track, description=split, console=console, transient=True,
            total=len(range(0, len(dataset), options.every)),
        )  # fmt: skip
        report = check_split(
            dataset,
            getattr(maker, "expected", {}).get(split, ()),
            every=options.every,
            workers=options.workers,
            progress=progress,
        )
        show(split, report, console)
        well = well and not report.problems
    return well


def show(split: str, report: SplitReport, console: Console) -> None:
    """Print what was found in a split."""
    sizes = ""
    if report.sizes:
        (h0, w0), (h1, w1) = report.sizes
        sizes = f", {h0} to {h1} pixels high, {w0} to {w1} wide"
    total = int(report.pixels.sum()) + report.ignored
    ignored = f", {report.ignored / total:.1%} of pixels ignored" if total else ""
    looked = "all" if report.looked_at == report.images else f"{report.looked_at:,}"
    state = f"{report.bad:,} cannot be used" if report.bad else "each can be used"
    console.print(
        f"[bold]{split}[/]: {report.images:,} images, looked at {looked}{sizes}{ignored}: {state}",
        soft_wrap=True,
    )
    for text in (*report.problems, *report.notes):
        console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)


def run_prepare(options: argparse.Namespace, console: Console) -> None:
    """Write the labels and print how many images each list has."""

    def progress(names: Iterable[str]) -> Iterable[str]:
        return track(list(names), options.dataset, console=console, transient=True)

    if options.dataset == "voc_aug":
        if options.sbd is None:
            raise DataError("prepare voc_aug needs --sbd, SBD's folder with cls/*.mat")
        found = prepare.prepare_voc_aug(options.data, options.sbd, progress)
    elif options.dataset == "pascal_context":
        found = prepare.prepare_pascal_context(
            options.data, mat=options.mat, detail=options.detail, progress=progress
        )
    else:
        found = {}
        for split in options.split or ("train", "val"):
            found |= prepare.prepare_coco_voc(options.data, split, progress)
    for name, count in found.items():
        console.print(f"{name}: {count:,} images")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 where a check found a problem, 2 for an error."""
    console = Console()
    try:
        options = parse(arguments)
        if options.command == "check":
            return 0 if run_check(options, console) else 1
        run_prepare(options, console)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
