"""Run Nsight Compute on the kernels of each operator, compute-sanitizer on awkward shapes."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from typing import Any

import torch

from bench.apart import complaint
from bench.gpu.device import place
from bench.gpu.job import LeftOut, Wrong
from bench.gpu.processes import streamed
from bench.passes import PASSES

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
# What is kept for each kernel: our name and a pattern of the name that ncu uses.
METRICS = {
    "us": r"gpu__time_duration\.sum",
    "memory %": r"gpu__dram_throughput\.avg\.pct_of_peak_sustained_elapsed",
    "multiprocessor %": r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "tensor %": r"sm__(inst_executed_)?pipe_tensor.*\.pct_of_peak_sustained_active",
    "occupancy %": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
}
# "selected" is the state of a warp that issues an instruction: no stall.
_STALL = re.compile(
    r"smsp__average_warps?_issue_stalled_((?!selected)\w+?)_per_(issue|warp)\w*\.ratio"
)
_SUMMARY = re.compile(
    r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?"
)

_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}

# Output in the form of the tools, for a machine without them.
SAMPLE_NCU = (
    "==PROF== Connected to process 1\n"
    '"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum",'
    '"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread",'
    '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"\n'
    '"","","","","us","%","register/thread","inst","inst"\n'
    '"0","a_kernel","(256, 1, 1)","(132, 1, 1)","1,012.5","61.2","244","7.5","1.25"\n'
)
SAMPLE_SANITIZER = "========= ERROR SUMMARY: 0 errors\n"


def _command(arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.profiling", json.dumps(arguments)]


def ncu(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Throughput, occupancy and the largest stall reasons of each kernel of one pass."""
    if rehearse:
        run_once(arguments["small"], rehearse)
        return {"kernels": read_ncu(SAMPLE_NCU)}
    program = place(rehearse).tool("ncu")
    if program is None:
        raise LeftOut("ncu was not found")
    command = [program, "--csv", "--page", "raw", "--target-processes", "all"]
    command += ["--profile-from-start", "off", "--clock-control", "none", "--print-units", "base"]
    for section in SECTIONS:
        command += ["--section", section]
    _, printed = streamed([*command, *_command(arguments)])
    kernels = read_ncu(printed)
    if not kernels:
        raise LeftOut(f"ncu profiled nothing: {complaint(printed)}")
    return {"kernels": kernels}


def sanitize(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Errors that a tool of compute-sanitizer finds in one pass."""
    if rehearse:
        run_once(arguments["small"], rehearse)
        return {"errors": read_sanitizer(SAMPLE_SANITIZER)}
    program = place(rehearse).tool("compute-sanitizer")
    if program is None:
        raise LeftOut("compute-sanitizer was not found")
    # Torch and Triton ask the driver for functions that it may lack; these are not our errors.
    command = [program, "--tool", arguments["tool"], "--report-api-errors", "no"]
    # One allocation per tensor, so that memory beyond a tensor is not part of another one.
    status, printed = streamed([*command, *_command(arguments)], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    errors = read_sanitizer(printed)
    if errors is None or (status and not errors):
        raise LeftOut(f"compute-sanitizer did not run: {complaint(printed)}")
    if errors:
        # The first line is the name of the tool.
        _, *found = [x for x in printed.splitlines() if x.startswith("========= ")]
        raise Wrong(f"{arguments['tool']}: {errors} errors; first: {found[0][10:200]}")
    return {"errors": 0}


def read_ncu(printed: str) -> list[dict[str, Any]]:
    """One row per kernel, from ncu's page of raw values as CSV."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(x for x in lines[start:] if x[:1] == '"'))))
    return [_kernel(row, units=rows[0]) for row in rows[1:]]


def _kernel(row: dict[str, str], units: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": row["Kernel Name"], "grid": row.get("Grid Size", "")}
    for name, pattern in METRICS.items():
        # The matrix unit has one column per kind of product; the one in use is the largest.
        columns = [column for column in row if re.fullmatch(pattern, column)]
        values = [(v, units[c]) for c in columns if (v := _number(row[c])) is not None]
        if values:
            most, unit = max(values)
            found[name] = most * _MICROSECONDS.get(unit, 1.0) if name == "us" else most
    stalls = {}
    for column, text in row.items():
        if (match := _STALL.fullmatch(column)) and (value := _number(text)) is not None:
            stalls[match[1]] = value
    found["stalls"] = dict(sorted(stalls.items(), key=lambda one: -one[1])[:3])
    return found


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def read_sanitizer(printed: str) -> int | None:
    """The number in the last line of a tool of compute-sanitizer; None if there is none."""
    found = _SUMMARY.findall(printed)
    return int("".join(found[-1])) if found else None


def run_once(arguments: dict[str, Any], rehearse: bool) -> None:
    """Forward and backward of one operator, between the marks that ncu waits for."""
    device = place(rehearse)
    make, dtype = PASSES[arguments["operator"]], getattr(torch, arguments["dtype"])
    step = make("ours", torch.device(device.kind), dtype, **arguments["shape"])
    step()
    device.profile(step)


if __name__ == "__main__":
    run_once(json.loads(sys.argv[1]), rehearse=False)
