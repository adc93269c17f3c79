"""Ours against the usual code: results are compared first, then each variant is timed in a process
of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from bench import apart, gate, report
from bench.cases import CASES, Case
from bench.options import add_device, add_json
from bench.passes import is_compiled, needs_gpu
from bench.timing import Measurement, copy_bandwidth, measure
from encnet_triton.files import write_json
from encnet_triton.options import pick_device
from encnet_triton.train.compiling import compile_obstacle


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of one comparison."""
    case = CASES[parser.get_default("command")]
    parser.description = f"{case.title}.\n\n{__doc__}"
    if case.reads_files:
        parser.add_argument("--data", help="a folder data set to take the images from")
    else:
        add_device(parser)
    add_json(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Compare all variants, or measure one for `measure_apart`; returns the exit status."""
    name = options.command
    device, data = torch.device("cpu"), None
    if CASES[name].reads_files:
        data = options.data
    else:
        device = pick_device(options.device)
    if options.worker:
        worker(CASES[name], options.worker, device, data)
        return 0
    return compare(name, device, data, options.json)


def worker(case: Case, variant: str, device: torch.device, data: str | None) -> None:
    """Measure one variant in this process and print it as JSON."""
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    # Every training process imports this (80 MiB) when it makes an optimiser: not to be counted.
    importlib.import_module("torch._dynamo")
    call = case.build(variant, device, data)
    print(json.dumps(measure(call, device).as_dict()))


def measure_apart(
    name: str, variant: str, device: torch.device, data: str | None
) -> Measurement | str:
    """Measure one variant in a fresh process; returns a sentence if that fails."""
    if is_compiled(variant) and compile_obstacle(device):
        return "no compiled peer: torch.compile finds no compiler here"
    if needs_gpu(variant) and device.type == "cpu":
        return f"{variant}: a Triton kernel, which needs a GPU"
    arguments = [name, "--worker", variant]
    if not CASES[name].reads_files:
        arguments += ["--device", device.type]
    arguments += ["--data", data] if data else []
    try:
        return Measurement(**apart.measured(arguments))
    except apart.Failed as error:
        return f"{variant} failed: {error}"


def compare(name: str, device: torch.device, data: str | None, json_file: Path | None) -> int:
    """Check, measure every variant, print the table; returns the exit status."""
    case = CASES[name]
    console = report.console(130)
    wrong = gate.check(name, device)
    if wrong:
        print(f"error: {name} is not correct, so no speed is given: {wrong}", file=sys.stderr)
        return 1
    console.print(report.machine(device), highlight=False)
    results = {v: measure_apart(name, v, device, data) for v in case.variants}
    if isinstance(results["ours"], str):
        print(f"error: {results['ours']}", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else 0.0
    console.print(report.table(case, results, bandwidth))
    if json_file is not None:
        rows = {v: r if isinstance(r, str) else r.as_dict() for v, r in results.items()}
        document = {"machine": report.machine(device), "case": name, "results": rows}
        write_json(document, json_file)
    return 0
