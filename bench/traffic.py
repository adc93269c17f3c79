"""Bytes that the Triton kernels move: ``python -m bench traffic [--quick] [--json FILE]``.

Counted in Triton's interpreter, so no GPU is needed and nothing is timed. The caches are modelled
in the simplest way: within a program a sector of 32 bytes of X, dX or a partial sum (an argument
whose name begins with X, dX or P) comes from memory once; everything else (parameters, G, E,
tables) is small, and comes once a launch. Loads and stores count separately.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bench.interpreter import LaunchRecord

H100 = {"arch": 90, "processors": 132}
STREAMED = ("X", "dX", "P")


@dataclass(frozen=True)
class Shape:
    """One encoding problem; x is B x C x N, channels last."""

    B: int
    N: int
    C: int
    K: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"B{self.B} N{self.N} C{self.C} K{self.K}"


SHAPES = (
    Shape(16, 3600, 512, 32),
    Shape(16, 900, 512, 64),
    Shape(16, 900, 1024, 32),
    Shape(16, 900, 1024, 64),
    Shape(16, 900, 512, 32, torch.float32),
)
QUICK = (Shape(2, 200, 64, 32), Shape(2, 200, 64, 32, torch.float32))


@dataclass(frozen=True)
class Row:
    """One direction of an operator; sums over its launches, ``programs`` too.

    ``least_bytes`` reads inputs and writes outputs once: forward x, E and the codewords; backward
    x, dx, G, the codewords and their gradient.
    """

    op: str
    direction: str
    dtype: str
    shape: dict[str, int]
    programs: int
    requested_bytes: int
    memory_bytes: int
    least_bytes: int


def _launches(shape: Shape, direction: str) -> list[Any]:
    # Not at the top: it imports triton, which not every system has.
    encode: Any = importlib.import_module("encnet_triton.kernels.encode_triton")
    x = torch.empty(shape.B, shape.N, shape.C, dtype=shape.dtype).transpose(1, 2)
    codewords, scale = torch.empty(shape.K, shape.C), torch.empty(shape.K)
    if direction == "forward":
        made, _ = encode.forward_launches(x, codewords, scale, False, **H100)
    else:
        grad = torch.empty(shape.B, shape.K, shape.C)
        made, _ = encode.backward_launches(grad, x, codewords, scale, None, True, **H100)
    return list(made)


def _memory_bytes(launch: LaunchRecord) -> int:
    return sum(
        traffic.by_program if name.startswith(STREAMED) else traffic.by_launch
        for accesses in (launch.loads, launch.stores)
        for name, traffic in accesses.items()
    )


def _least_bytes(shape: Shape, direction: str) -> int:
    x = shape.B * shape.N * shape.C * shape.dtype.itemsize
    code, codewords = 4 * shape.B * shape.K * shape.C, 4 * shape.K * shape.C
    return x + code + codewords if direction == "forward" else 2 * x + code + 2 * codewords


def count(shape: Shape, direction: str) -> Row:
    """Run the launches of one direction of encode in the interpreter, without their values."""
    from bench.interpreter import Watch

    with Watch(values=False) as watch:
        for launch in _launches(shape, direction):
            launch.run()
    accesses = [t for w in watch.launches for a in (w.loads, w.stores) for t in a.values()]
    return Row(
        op="encode",
        direction=direction,
        dtype=str(shape.dtype).removeprefix("torch."),
        shape={"B": shape.B, "N": shape.N, "C": shape.C, "K": shape.K},
        programs=sum(launch.programs for launch in watch.launches),
        requested_bytes=sum(traffic.requested for traffic in accesses),
        memory_bytes=sum(map(_memory_bytes, watch.launches)),
        least_bytes=_least_bytes(shape, direction),
    )


def table(rows: Sequence[Row]) -> Table:
    """Megabytes (10^6 bytes), and memory as a multiple of the least possible."""
    made = Table(title="Bytes moved by encode, counted in the interpreter", title_justify="left")
    for column in ("", "dtype", "shape"):
        made.add_column(column, no_wrap=True)
    for column in ("programs", "requested MB", "memory MB", "least MB", "memory / least"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = " ".join(f"{letter}{size}" for letter, size in row.shape.items())
        bytes_ = (row.requested_bytes, row.memory_bytes, row.least_bytes)
        cells = [str(row.programs), *(f"{b / 1e6:.1f}" for b in bytes_)]
        ratio = f"{row.memory_bytes / row.least_bytes:.2f}x"
        made.add_row(f"{row.op} {row.direction}", row.dtype, name, *cells, ratio)
    return made


def _run_interpreted(quick: bool, json_file: Path | None) -> int:
    """The same command in a process that imports triton in interpreter mode."""
    command = [sys.executable, "-m", "bench", "traffic", *(["--quick"] if quick else [])]
    command += ["--json", str(json_file)] if json_file else []
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


def run(quick: bool, json_file: Path | None) -> int:
    """Count, print the table, write the JSON; returns the exit status."""
    if importlib.util.find_spec("triton") is None:
        print("error: traffic is counted in Triton's interpreter: no triton here", file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET") != "1":
        return _run_interpreted(quick, json_file)
    shapes = QUICK if quick else SHAPES
    rows = [count(shape, direction) for shape in shapes for direction in ("forward", "backward")]
    console = Console() if sys.stdout.isatty() else Console(width=130)
    console.print(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0
