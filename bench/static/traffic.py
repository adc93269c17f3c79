"""Bytes that the Triton kernels move: ``python -m bench static traffic``.

Counted in Triton's interpreter, so no GPU is needed and nothing is timed. The caches are modelled
in the simplest way: within a program a sector of 32 bytes of a large tensor (features, gradients,
partial sums) comes from memory once; everything else (parameters, tables) is small and comes from
memory once per launch. Neighbouring programs that take the same pixels at the same time, for
different channels, count as one: what one of them reads the others find in the L2 cache. Loads and
stores count separately.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.table import Table

from bench import least, report
from bench.options import add_json
from bench.static.launches import (
    CIFAR_ENCODE_SHAPES,
    DIRECTIONS,
    VARIANTS,
    BatchNormShape,
    EncodeShape,
    UpsampleOptions,
    UpsampleShape,
    Variant,
    batch_norm_launches,
    encode_launches,
    upsample_launches,
)
from encnet_triton.files import write_json

if TYPE_CHECKING:
    from bench.static.interpreter import LaunchRecord
    from encnet_triton.kernels.runtime.launch import Launch

# Arguments that come from memory once per program.
STREAMED = {
    "encode": ("X", "dX", "P", "PW"),
    "batch_norm_act": ("X", "R", "Y", "dY", "Other", "dX", "dR", "Bits", "P", "PN"),
    # An image's logits, labels and lse are a few MB, and its programs follow one another: what one
    # of them read the others find in the L2 cache.
    "upsample": (),
}


@dataclass(frozen=True)
class Case:
    """One direction of an operator, whose launches are made later.

    ``least_bytes``: see `bench.least`.
    """

    op: str
    direction: str
    variant: str
    dtype: torch.dtype
    shape: dict[str, int]
    least_bytes: int
    launches: Callable[[], list[Launch]]


@dataclass(frozen=True)
class Row:
    """What a case moves; sums over its launches, ``programs`` too."""

    op: str
    direction: str
    variant: str
    dtype: str
    shape: dict[str, int]
    programs: int
    requested_bytes: int
    memory_bytes: int
    least_bytes: int


def encode_cases(shape: EncodeShape, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Both directions."""
    bytes_ = least.encode(B=shape.B, C=shape.C, N=shape.N, K=shape.K, size=dtype.itemsize)
    for direction, least_bytes in zip(DIRECTIONS, bytes_, strict=True):
        yield Case(
            "encode",
            direction,
            "",
            dtype,
            asdict(shape),
            least_bytes,
            partial(encode_launches, shape, dtype, direction, 90, device="cpu"),
        )


def _batch_norm_launches(
    size: BatchNormShape, variant: Variant, dtype: torch.dtype, direction: str
) -> list[Launch]:
    return batch_norm_launches(size.empty(dtype, "cpu"), variant, direction, 90)


def batch_norm_cases(
    size: BatchNormShape, variant: Variant, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Case]:
    """Both directions of one layer."""
    bytes_ = least.batch_norm(
        B=size.B, C=size.C, N=size.N, size=dtype.itemsize, channels_last=size.channels_last,
        relu=variant.relu, residual=variant.residual, frozen=variant.frozen, forked=variant.forked,
        projected=variant.projected,
    )  # fmt: skip
    for direction, least_bytes in zip(DIRECTIONS, bytes_, strict=True):
        yield Case(
            "batch_norm_act",
            direction,
            f"{variant}, {'channels last' if size.channels_last else 'contiguous'}",
            dtype,
            {"B": size.B, "C": size.C, "N": size.N},
            least_bytes,
            partial(_batch_norm_launches, size, variant, dtype, direction),
        )


def _upsample_launches(size: UpsampleShape, dtype: torch.dtype, direction: str) -> list[Launch]:
    logits = size.logits(dtype, "cpu")
    return upsample_launches(logits, (size.H, size.W), UpsampleOptions(), direction, 90)


def upsample_cases(size: UpsampleShape, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Both directions: logits, labels of a byte and lse once, and backward the gradient."""
    low, high = size.h * size.w, size.H * size.W
    bytes_ = least.upsample(B=size.B, C=size.C, low=low, high=high, size=dtype.itemsize)
    for direction, least_bytes in zip(DIRECTIONS, bytes_, strict=True):
        yield Case(
            "upsample",
            direction,
            "",
            dtype,
            asdict(size),
            least_bytes,
            partial(_upsample_launches, size, dtype, direction),
        )


def cases(quick: bool) -> Iterator[Case]:
    """What the table lists."""
    if quick:
        yield from upsample_cases(UpsampleShape(1, 20, 2, 6, 8, 48))
        yield from encode_cases(EncodeShape(128, 32, 300, 2))
        yield from encode_cases(EncodeShape(128, 32, 100, 2), torch.float32)
        yield from encode_cases(EncodeShape(16, 16, 1024, 2))
        for variant in (VARIANTS[1], VARIANTS[-1]):
            yield from batch_norm_cases(BatchNormShape(2, 64, 300), variant)
        yield from batch_norm_cases(BatchNormShape(2, 16, 900, channels_last=False), Variant())
        return
    for shape in (
        EncodeShape(512, 32),
        EncodeShape(512, 64, 900),
        EncodeShape(1024, 32, 900),
        EncodeShape(1024, 64, 900),
        *CIFAR_ENCODE_SHAPES,
    ):
        yield from encode_cases(shape)
    yield from encode_cases(EncodeShape(512, 32, 900), torch.float32)
    yield from upsample_cases(UpsampleShape(1, 150, 15, 60, 120, 480))
    for channels_last in (True, False):
        for variant in VARIANTS[:2]:
            yield from batch_norm_cases(BatchNormShape(4, 256, 14400, channels_last), variant)


def together(launch: Launch) -> int:
    """How many neighbouring programs take the same pixels at the same time."""
    sizes = launch.constants
    if launch.name == "forward_kernel" and "OWN" in sizes:
        return int(sizes["CHUNKS"] // sizes["OWN"])
    return -(-sizes["C"] // sizes["BC"]) if launch.name == "aggregate_kernel" else 1


def _memory_bytes(launch: LaunchRecord, streamed: tuple[str, ...]) -> int:
    return sum(
        traffic.by_program if name in streamed else traffic.by_launch
        for accesses in (launch.loads, launch.stores)
        for name, traffic in accesses.items()
    )


def count(case: Case) -> Row:
    """Run the launches of one case in the interpreter, without their values."""
    from bench.static.interpreter import Watch

    # Loads return zeros, so kernels divide by counts of zero.
    with np.errstate(invalid="ignore", divide="ignore"), Watch(values=False) as watch:
        for launch in case.launches():
            watch.together = together(launch)
            launch.run()
    accesses = [t for w in watch.launches for a in (w.loads, w.stores) for t in a.values()]
    return Row(
        op=case.op,
        direction=case.direction,
        variant=case.variant,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=case.shape,
        programs=sum(launch.programs for launch in watch.launches),
        requested_bytes=sum(traffic.requested for traffic in accesses),
        memory_bytes=sum(_memory_bytes(w, STREAMED[case.op]) for w in watch.launches),
        least_bytes=case.least_bytes,
    )


def table(rows: Sequence[Row]) -> Table:
    """Megabytes (10^6 bytes), and memory as a multiple of the least possible."""
    made = Table(title="Bytes moved, counted in the interpreter", title_justify="left")
    for column in ("", "variant", "dtype", "shape"):
        made.add_column(column, no_wrap=True)
    for column in ("programs", "requested MB", "memory MB", "least MB", "memory / least"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = " ".join(f"{letter}{size}" for letter, size in row.shape.items())
        bytes_ = (row.requested_bytes, row.memory_bytes, row.least_bytes)
        cells = [str(row.programs), *(f"{b / 1e6:.1f}" for b in bytes_)]
        ratio = f"{row.memory_bytes / row.least_bytes:.2f}x"
        made.add_row(f"{row.op} {row.direction}", row.variant, row.dtype, name, *cells, ratio)
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Count, print the table, write the JSON; returns the exit status."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("traffic is counted in Triton's interpreter, and triton is not installed")
    rows = [count(case) for case in cases(options.quick)]
    console = report.console(260)
    console.print(table(rows))
    if options.json is not None:
        write_json([asdict(row) for row in rows], options.json)
    return 0
