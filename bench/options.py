"""Options that several commands have, and how a wrong one is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from encnet_triton.options import refuse_place


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`."""
    parser.add_argument("--json", type=_place, help="also write the figures to this file")


def _place(text: str) -> Path:
    try:
        refuse_place(Path(text), "file")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, which `encnet_triton.options.pick_device` reads."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
