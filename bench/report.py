"""The table of a comparison, with the machine it was made on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import Case
from bench.timing import Measurement
from encnet_triton.machine import cpu_name, versions

Results = dict[str, "Measurement | str"]


def console(width: int) -> Console:
    """As wide as the terminal; `width` in a file or a pipe, where rich would fold at 80."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def machine(device: torch.device) -> str:
    """Processor or GPU, versions and the revision that was measured, in one line."""
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    found = versions()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return (
        f"{name}{threads}; torch {found['torch']}, triton {found['triton']}; revision {revision()}"
    )


def revision() -> str:
    """The commit that is checked out, "unknown" without git or a repository.

    ENCNET_REVISION can name it where the checkout was copied without its history.
    """
    if given := os.environ.get("ENCNET_REVISION"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def filled(document: Path, markers: tuple[str, str], made: str) -> str:
    """The text of a document with the part between its markers replaced.

    Raises:
        ValueError: it has no such part.
    """
    begin, end = markers
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} has no part between {begin.strip()!r} and {end.strip()!r}")
    return f"{before}{begin}{made}{end}{after}"


def table(case: Case, results: Results, bandwidth: float = 0.0) -> Table:
    """Times, extra memory, and both as multiples of ours.

    Given `bandwidth`, the bytes per second of the device's memory, also the rate at which the least
    possible bytes were moved, and that rate as a share of the bandwidth.
    """
    made = Table(title=case.title, title_justify="left")
    made.add_column("", no_wrap=True)
    for column in ("median ms", "p20", "p80", "extra MiB", "time / ours", "memory / ours"):
        made.add_column(column, justify="right", no_wrap=True)
    if case.per_call:
        made.add_column("images/s", justify="right", no_wrap=True)
    rates = bool(bandwidth and case.gpu_bytes)
    for column in ("GB/s", "of the limit", "host ms") if rates else ():
        made.add_column(column, justify="right", no_wrap=True)
    ours = results["ours"]
    assert isinstance(ours, Measurement)
    for variant, result in results.items():
        if isinstance(result, str):
            made.add_row(variant, *["-"] * (len(made.columns) - 1))
            continue
        cells = [f"{v:.1f}" for v in (result.median, result.p20, result.p80, result.extra_mib)]
        cells.append(f"{result.median / ours.median:.1f}x")
        cells.append(f"{result.extra_mib / max(ours.extra_mib, 1.0):.1f}x")
        if case.per_call:
            cells.append(f"{1e3 * case.per_call / result.median:.1f}")
        if rates:
            rate = 1e3 * case.gpu_bytes / result.median
            cells += [f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}", f"{result.host:.2f}"]
        made.add_row(variant, *cells)
    reasons = sorted({r for r in results.values() if isinstance(r, str)})
    if reasons:
        made.caption = "; ".join(reasons)
    return made
