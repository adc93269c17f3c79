"""``python -m bench static compile``: the resources that every kernel needs; no GPU.

The launches are made on meta tensors, as the operators make them; nothing runs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.options import add_json
from bench.report import console
from bench.static.launches import (
    BATCH_NORM_SHAPES,
    ENCODE_SHAPES,
    MORE_BATCH_NORM_SHAPES,
    MORE_ENCODE_SHAPES,
    MORE_UPSAMPLE_SHAPES,
    UPSAMPLE_SHAPES,
    Call,
    EncodeShape,
    batch_norm_calls,
    encode_calls,
    upsample_calls,
)
from bench.static.resources import (
    LIMITS,
    Report,
    compiler_versions,
    identity,
    report,
    require_compiler,
)
from encnet_triton.cores import usable_cores
from encnet_triton.files import write_json

if TYPE_CHECKING:
    from encnet_triton.kernels.runtime.launch import Launch

ARCHS = tuple(LIMITS)
DTYPES = ("bfloat16", "float16", "float32")
OPS = ("encode", "batch_norm_act", "upsample")
_MOST_WORKERS = 16  # each holds torch and Triton in memory


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call, by its place in the list of launches."""

    call: Call
    place: int
    label: str
    default: bool


Row = dict[str, Any]


def kernels(calls: Iterable[Call], fullest: bool = False) -> dict[Kernel, str]:
    """Every kernel of these calls with what identifies its program.

    A program that several configurations of a call share is listed once, as a default if the
    default configuration uses it. A program that two shapes share is listed for both. `fullest`
    leaves the launch with the most options on, one per kernel function.
    """
    found: dict[Kernel, str] = {}
    seen: set[tuple[object, ...]] = set()
    for call in sorted(calls, key=lambda call: call.config):
        names: Counter[str] = Counter()
        launches = call.launches()
        chosen = _fullest(launches) if fullest else range(len(launches))
        for place in chosen:
            launch = launches[place]
            program = identity(launch, call.arch)
            key = (call.direction, call.dtype, call.arch, call.shape, program)
            if key in seen:
                continue
            seen.add(key)
            name = launch.kernel.__name__
            names[name] += 1
            variant = f" #{names[name]}" if names[name] > 1 else ""
            label = f"{name}{variant} {call.shape} {call.configs()[call.config]}"
            found[Kernel(call, place, label, default=call.config == 0)] = program
    return found


def _fullest(launches: Sequence[Launch]) -> list[int]:
    """Places of the launches with the most options on, one a kernel function."""
    most: dict[str, tuple[int, int]] = {}
    for place, launch in enumerate(launches):
        options = sum(value is True for value in launch.constants.values())
        name = launch.kernel.__name__
        most[name] = max(most.get(name, (-1, 0)), (options, -place))
    return sorted(-place for _, place in most.values())


def parse_shape(text: str) -> EncodeShape:
    """The shape of "512x32", channels and codewords, or "16x16x1024", with pixels."""
    numbers = text.split("x")
    if len(numbers) not in (2, 3) or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not channels x codewords, such as 512x32, or with pixels 16x16x1024"
        )
    return EncodeShape(*map(int, numbers))


@cache
def _launches_once(call: Call) -> list[Launch]:
    return call.launches()


def _compile(kernel: Kernel) -> Report:
    """Runs in a worker process."""
    return report(_launches_once(kernel.call)[kernel.place], kernel.call.arch)


def _start_worker() -> None:
    torch.set_num_threads(1)


def reports(found: dict[Kernel, str]) -> list[Row]:
    """Compile every program once, on all processors; returns a row for each kernel."""
    first = {program: kernel for kernel, program in reversed(found.items())}
    with _pool(min(usable_cores(), len(first), _MOST_WORKERS)) as pool:
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
    """The worker's result; if a worker died from any kernel, this one is compiled again, alone."""
    with contextlib.suppress(BrokenProcessPool):
        return future.result()
    try:
        with _pool(1) as pool:
            return pool.submit(_compile, kernel).result()
    except BrokenProcessPool:
        launch = _launches_once(kernel.call)[kernel.place]
        name, arch = launch.kernel.__name__, kernel.call.arch
        return Report(name, arch, launch.num_warps, note="does not compile: the compiler crashed")


def _row(kernel: Kernel, made: Report) -> Row:
    call = kernel.call
    return {
        "op": call.op,
        "direction": call.direction,
        "dtype": call.dtype,
        "shape": call.shape,
        "config": kernel.label,
        "default": kernel.default,
        **asdict(made),
    }


def bad(row: Row) -> bool:
    """Whether this kernel needs local memory or cannot be launched."""
    return bool(row["spill_bytes"] or row["stack_bytes"]) or not row["fits"]


def table(rows: list[Row], archs: list[int]) -> Table:
    """A line for each kernel, shape, dtype and configuration, a column for each architecture."""
    made = Table(
        title="registers / stack + spilled bytes / shared KiB / blocks / KiB in flight, mean-most",
        title_justify="left",
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
        f"{row['registers']} / {row['stack_bytes']} + {row['spill_bytes']}"
        f" / {row['shared_bytes'] / 1024:.0f} / {row['blocks_per_sm']}"
        f" / {row['mean_in_flight'] / 1024:.0f}-{row['bytes_in_flight'] / 1024:.0f}"
    )
    if not bad(row):
        return figures
    return f"[red]{figures if row['registers'] else 'fails'}{'' if row['fits'] else ' !'}[/red]"


def _calls(options: argparse.Namespace) -> Iterator[Call]:
    which = list(options.arch), list(options.dtype)
    configs = options.all or options.candidates, options.candidates

    def sizes(some: Sequence[Any], more: Sequence[Any], few: int = 1) -> list[Any]:
        return list(some[:few]) if options.quick else [*some, *(more if options.all else ())]

    if "encode" in options.op:
        of_encode = options.shape or sizes(ENCODE_SHAPES, MORE_ENCODE_SHAPES)
        yield from encode_calls(*which, of_encode, *configs)
    if "batch_norm_act" in options.op:
        layers = sizes(BATCH_NORM_SHAPES, MORE_BATCH_NORM_SHAPES, few=2)
        yield from batch_norm_calls(*which, layers, *configs)
    if "upsample" in options.op:
        maps = sizes(UPSAMPLE_SHAPES, MORE_UPSAMPLE_SHAPES)
        yield from upsample_calls(*which, maps, *configs)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--all", action="store_true", help="all shapes and configurations")
    amount.add_argument(
        "--quick",
        action="store_true",
        help="one shape per operator and layout, one launch per kernel: that with the most options",
    )
    amount.add_argument(
        "--candidates", action="store_true", help="all configurations that `bench tune` measures"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="compute capabilities"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="element types of x"
    )
    parser.add_argument(
        "--shape", type=parse_shape, nargs="+", metavar="CxK[xN]",
        help="channels x codewords (x pixels) of encode, for example 512x32",
    )  # fmt: skip
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="operators")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compile, print the table and what is wrong; returns 1 if a default configuration is bad."""
    require_compiler()
    archs = list(options.arch)
    terminal = console(260)
    terminal.print(
        f"{compiler_versions(archs)}; compiled for {', '.join(f'sm_{a}' for a in archs)}, not run",
        highlight=False,
    )
    rows = reports(kernels(_calls(options), fullest=options.quick))
    terminal.print(table(rows, archs), highlight=False)
    for row in rows:
        if row["note"]:
            print(f"sm_{row['arch']} {row['dtype']} {row['config']}: {row['note']}")
    wrong = [row for row in rows if row["default"] and bad(row)]
    print(f"{len(rows)} kernels; {len(wrong)} of the defaults need local memory or do not fit")
    if options.json is not None:
        write_json(rows, options.json)
    return 1 if wrong else 0
