"""``python -m bench compile``: what every kernel takes of a GPU, on machines without one.

The launches are made on meta tensors as the operators make them, at 16 images of 60 x 60 pixels,
channels last; nothing runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.resources import LIMITS, Report, compiler_versions, identity, report, require_compiler

if TYPE_CHECKING:
    from encnet_triton.kernels.launch import Config, Launch

IMAGES, PIXELS = 16, 3600
ARCHS = tuple(LIMITS)
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ((512, 32), (1024, 32), (512, 64), (1024, 64))  # channels, codewords
MORE_SHAPES = ((2048, 256), (16, 32), (64, 16), (100, 7))  # large, small and awkward ones
_DIRECTIONS = ("forward", "backward")
_MOST_WORKERS = 16  # each holds torch and Triton in memory


@dataclass(frozen=True)
class Spec:
    """One call of an operator; `config` counts in what the launcher may choose, 0 its default."""

    direction: str
    dtype: str
    arch: int
    channels: int
    codewords: int
    config: int = 0

    op = "encode"

    @property
    def shape(self) -> str:
        return f"C{self.channels} K{self.codewords}"


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call, by its place in the list of launches."""

    spec: Spec
    place: int
    label: str
    default: bool


Row = dict[str, Any]


def _operator(spec: Spec) -> Any:
    """The module that launches it; imported here, for it imports Triton."""
    return importlib.import_module(f"encnet_triton.kernels.{spec.op}_triton")


def configs(spec: Spec) -> list[Config]:
    """What the launcher of this call may choose from, the default first."""
    choose = getattr(_operator(spec), f"{spec.direction}_configs")
    dtype = getattr(torch, spec.dtype)
    return list(choose(spec.arch, dtype, spec.channels, spec.codewords))


def launches(spec: Spec) -> list[Launch]:
    """The launches of one call; forward, those with statistics come after those without."""
    operator = _operator(spec)
    empty = partial(torch.empty, device="meta")
    x = empty(IMAGES, PIXELS, spec.channels, dtype=getattr(torch, spec.dtype)).transpose(1, 2)
    codewords, scale = empty(spec.codewords, spec.channels), empty(spec.codewords)
    machine = {"arch": spec.arch, "processors": LIMITS[spec.arch].processors}
    config = configs(spec)[spec.config]
    made: list[Launch] = []
    if spec.direction == "forward":
        for return_stats in (False, True):
            made += operator.forward_launches(
                x, codewords, scale, return_stats, **machine, config=config
            )[0]
        return made
    grad = empty(IMAGES, spec.codewords, spec.channels)
    made += operator.backward_launches(
        grad, x, codewords, scale, None, True, **machine, config=config
    )[0]
    return made


def kernels(specs: Iterable[Spec]) -> dict[Kernel, str]:
    """Every kernel of these calls with what identifies its program.

    A program that several configurations of a call share is listed once, as a default if it is one
    of the default's; the same program in calls of two shapes is listed for both.
    """
    found: dict[Kernel, str] = {}
    seen: set[tuple[object, ...]] = set()
    for spec in sorted(specs, key=lambda spec: spec.config):
        names: Counter[str] = Counter()
        for place, launch in enumerate(launches(spec)):
            program = identity(launch, spec.arch)
            key = (spec.direction, spec.dtype, spec.arch, spec.shape, program)
            if key in seen:
                continue
            seen.add(key)
            name = launch.kernel.__name__
            names[name] += 1
            variant = f" #{names[name]}" if names[name] > 1 else ""
            label = f"{name}{variant} {spec.shape} {configs(spec)[spec.config]}"
            found[Kernel(spec, place, label, default=spec.config == 0)] = program
    return found


def parse_shape(text: str) -> tuple[int, int]:
    """(channels, codewords) of "512x32"."""
    channels, _, codewords = text.partition("x")
    if not channels.isdecimal() or not codewords.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not channels x codewords, such as 512x32")
    return int(channels), int(codewords)


def _supported(dtype: str, channels: int, codewords: int) -> bool:
    operator = importlib.import_module("encnet_triton.kernels.encode_triton")
    return bool(operator.supports(getattr(torch, dtype), channels, codewords))


def calls(
    archs: list[int], dtypes: list[str], shapes: list[tuple[int, int]], every_config: bool
) -> Iterator[Spec]:
    """The calls to report, with the default configuration alone or with every one."""
    for direction in _DIRECTIONS:
        for channels, codewords in shapes:
            for dtype in dtypes:
                for arch in archs if _supported(dtype, channels, codewords) else ():
                    spec = Spec(direction, dtype, arch, channels, codewords)
                    for config in range(len(configs(spec)) if every_config else 1):
                        yield Spec(direction, dtype, arch, channels, codewords, config)


@cache
def _launches_once(spec: Spec) -> list[Launch]:
    return launches(spec)


def _compile(kernel: Kernel) -> Report:
    """What a worker process does."""
    return report(_launches_once(kernel.spec)[kernel.place], kernel.spec.arch)


def _start_worker() -> None:
    torch.set_num_threads(1)


def reports(found: dict[Kernel, str]) -> list[Row]:
    """Compile every program once, on all processors, and give a row for each kernel."""
    first = {program: kernel for kernel, program in reversed(found.items())}
    with _pool(min(len(os.sched_getaffinity(0)), len(first), _MOST_WORKERS)) as pool:
        pending = {program: pool.submit(_compile, kernel) for program, kernel in first.items()}
        waited = track(
            pending.items(),
            "compiling",
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        made = {program: _result(future, first[program]) for program, future in waited}
    return [_row(kernel, made[program]) for kernel, program in found.items()]


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: a fork of a process with threads, which torch has, may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(workers, 1), context, _start_worker)


def _result(future: Future[Report], kernel: Kernel) -> Report:
    """What the worker found; where a worker died of any kernel, this one again, alone."""
    with contextlib.suppress(BrokenProcessPool):
        return future.result()
    try:
        with _pool(1) as pool:
            return pool.submit(_compile, kernel).result()
    except BrokenProcessPool:
        launch = _launches_once(kernel.spec)[kernel.place]
        name, arch = launch.kernel.__name__, kernel.spec.arch
        return Report(name, arch, launch.num_warps, note="does not compile: the compiler crashed")


def _row(kernel: Kernel, made: Report) -> Row:
    spec = kernel.spec
    return {
        "op": spec.op,
        "direction": spec.direction,
        "dtype": spec.dtype,
        "shape": spec.shape,
        "config": kernel.label,
        "default": kernel.default,
        **asdict(made),
    }


def bad(row: Row) -> bool:
    """Whether this kernel spills or cannot be launched."""
    return bool(row["spill_bytes"]) or not row["fits"]


def table(rows: list[Row], archs: list[int]) -> Table:
    """A line for each kernel, shape, dtype and configuration, a column for each architecture."""
    made = Table(
        title="registers / spilled bytes / shared KiB / blocks per SM", title_justify="left"
    )
    made.add_column("kernel, shape, configuration", no_wrap=True)
    made.add_column("dtype", no_wrap=True)
    for arch in archs:
        made.add_column(f"sm_{arch}", justify="right", no_wrap=True)
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["config"], row["dtype"]), {})[row["arch"]] = _cell(row)
    for (label, dtype), cells in lines.items():
        made.add_row(label, dtype, *(cells.get(arch, "") for arch in archs))
    return made


def _cell(row: Row) -> str:
    figures = (
        f"{row['registers']} / {row['spill_bytes']} / {row['shared_bytes'] / 1024:.0f}"
        f" / {row['blocks_per_sm']}"
    )
    if not bad(row):
        return figures
    return f"[red]{figures if row['registers'] else 'fails'}{'' if row['fits'] else ' !'}[/red]"


def run(
    archs: list[int],
    dtypes: list[str],
    shapes: list[tuple[int, int]] | None,
    everything: bool,
    json_file: Path | None,
) -> int:
    """Compile, print the table and what is wrong; 1 if a default configuration is bad."""
    try:
        require_compiler()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=180)
    shapes = shapes or [*SHAPES, *(MORE_SHAPES if everything else ())]
    console.print(
        f"{compiler_versions(archs)}; compiled for {', '.join(f'sm_{a}' for a in archs)}, not run",
        highlight=False,
    )
    rows = reports(kernels(calls(archs, dtypes, shapes, everything)))
    console.print(table(rows, archs), highlight=False)
    for row in rows:
        if row["note"]:
            print(f"sm_{row['arch']} {row['dtype']} {row['config']}: {row['note']}")
    wrong = [row for row in rows if row["default"] and bad(row)]
    print(f"{len(rows)} kernels; {len(wrong)} of a default configuration spill or do not fit")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if wrong else 0
