"""``python -m encnet_triton.data``: check a data set, or prepare the labels of one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from encnet_triton import options
from encnet_triton.cores import usable_cores
from encnet_triton.data import DATASETS, DataError, create_dataset, prepare
from encnet_triton.data.check import SplitReport, check_split

_OPTIONS = {
    "ignore_label": "folder: label values that are no class, such as 0,255 (default: 255)",
    "label_offset": "folder: added to the other values (default: 0)",
    "label_map": "folder: label values and their classes, such as 255=1,7=0 (default: none)",
    "classes_file": "folder: file of the class names (default: classes.txt)",
    "labels_folder": "pascal_context: folder of the PNGs (default: SegmentationClassContext)",
    "label_order": "pascal_context: alphabetical, voc_first or stanford (no default)",
    "background_label": "pascal_context: 0 or 255 (default: 0)",
    "num_classes": "pascal_context: 59 or 60 (default: 59)",
}
_NAMES = ("classes_file", "labels_folder", "label_order")
PREPARED = ("voc_aug", "pascal_context", "coco_voc")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(prog="python -m encnet_triton.data")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="count, decode and verify every file of a data set")
    check.add_argument("dataset", choices=[name for name in DATASETS if name != "scenes"])
    check.add_argument("--data", required=True, help="its folder")
    check.add_argument("--split", action="append", help="split to check (default: train and val)")
    check.add_argument("--every", type=options.whole(1), default=1, help="check every n-th image")
    check.add_argument(
        "--workers", type=options.whole(1, 1024), default=min(16, usable_cores()),
        help="images decoded at once",
    )  # fmt: skip
    for name, about in _OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        check.add_argument(flag, dest=f"option_{name}", metavar=name.upper(), help=about)
    check.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="any option of the data set, for example label_order=alphabetical (default: none)",
    )  # fmt: skip
    made = commands.add_parser("prepare", help="convert official masks that are not PNGs to PNGs")
    made.add_argument("dataset", choices=PREPARED)
    made.add_argument("--data", type=Path, required=True, help="VOC2012, VOC2010 or COCO's folder")
    made.add_argument(
        "--sbd", type=Path, help="voc_aug: folder with cls/, train.txt, val.txt (no default)"
    )
    made.add_argument(
        "--mat", type=Path, help="pascal_context: folder of the .mat files (no default)"
    )
    made.add_argument(
        "--detail", type=Path, help="pascal_context: trainval_merged.json (no default)"
    )
    made.add_argument(
        "--split", action="append", choices=("train", "val"),
        help="coco_voc: train or val (default: both)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def dataset_options(given: argparse.Namespace) -> dict[str, Any]:
    """The data set's options by name; whole numbers become int, but for names."""
    found = {
        name: value for name in _OPTIONS if (value := getattr(given, f"option_{name}")) is not None
    }
    for text in given.option:
        name, separator, value = text.partition("=")
        if not separator:
            raise DataError(f"--option {text!r} must be NAME=VALUE")
        if name in ("name", "root", "split"):
            raise DataError(f"--option {text!r} is not an option of the data set; see --help")
        found[name] = value
    return {
        name: int(value) if name not in _NAMES and re.fullmatch("-?[0-9]{1,9}", value) else value
        for name, value in found.items()
    }


def run_check(given: argparse.Namespace, console: Console) -> bool:
    """Check each split; returns whether there were no problems."""
    maker = DATASETS[given.dataset]
    extra = dataset_options(given)
    well = True
    for split in given.split or getattr(maker, "splits", ("train", "val")):
        try:
            dataset = create_dataset(given.dataset, split, given.data, **extra)
        except DataError as error:
            console.print(f"{split}: error: {error}")
            well = False
            continue
        progress = partial(
            track, description=escape(split), console=console, transient=True,
            total=len(range(0, len(dataset), given.every)), disable=not console.is_terminal,
        )  # fmt: skip
        report = check_split(
            dataset,
            getattr(maker, "expected", {}).get(split, ()),
            every=given.every,
            workers=given.workers,
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
        sizes = f", {_range(h0, h1)} pixels high, {_range(w0, w1)} wide"
    total = int(report.pixels.sum()) + report.ignored
    ignored = f", {report.ignored / total:.1%} of pixels ignored" if total else ""
    looked = "all" if report.looked_at == report.images else f"{report.looked_at:,}"
    state = f"{report.bad:,} cannot be used" if report.bad else "each can be used"
    console.print(f"{split}: {report.images:,} images, {looked} opened{sizes}{ignored}: {state}")
    for text in (*report.problems, *report.notes):
        console.print(f"  {text}")


def _range(least: int, most: int) -> str:
    return f"{least} to {most}" if least < most else f"{least}"


def run_prepare(given: argparse.Namespace, console: Console) -> None:
    """Write the labels and print how many images each list has."""

    def progress(names: Iterable[str]) -> Iterable[str]:
        return track(
            list(names), given.dataset, console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip

    if given.dataset == "voc_aug":
        if given.sbd is None:
            raise DataError("prepare voc_aug needs --sbd, SBD's folder with cls/*.mat")
        found = prepare.prepare_voc_aug(given.data, given.sbd, progress)
    elif given.dataset == "pascal_context":
        found = prepare.prepare_pascal_context(
            given.data, mat=given.mat, detail=given.detail, progress=progress
        )
    else:
        found = {}
        for split in given.split or ("train", "val"):
            found |= prepare.prepare_coco_voc(given.data, split, progress)
    for name, count in found.items():
        console.print(f"{name}: {count:,} images")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 where a check found a problem, 2 for an error."""
    given, console = parse(arguments), options.make_console()

    def run() -> int:
        if given.command == "check":
            return 0 if run_check(given, console) else 1
        run_prepare(given, console)
        return 0

    return options.exit_status(run, less="")


if __name__ == "__main__":
    sys.exit(main())
