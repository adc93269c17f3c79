"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from encnet_triton.options import refuse_place


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`."""
    parser.add_argument("--json", type=place, help="also write the figures to this file")


def place(text: str) -> Path:
    """The type of an option for a file that is written last: refuses a bad place at once."""
    try:
        refuse_place(Path(text), "file")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, which `encnet_triton.options.pick_device` reads."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
