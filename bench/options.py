"""Options that several commands have, and how a wrong one is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`."""
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, which `chosen_device` reads."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def chosen_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    cuda = torch.cuda.is_available() if name == "auto" else name == "cuda"
    return torch.device("cuda" if cuda else "cpu")
