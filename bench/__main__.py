"""``python -m bench encode|upsample|crop|step|context|...``; without a name, the list."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import context, gate, loader, report, step, versions
from bench.cases import CASES, Case
from bench.gpu import command as gpu
from bench.passes import is_compiled
from bench.static import compile as compile_report
from bench.static import cost, memory, traffic
from bench.timing import Measurement, copy_bandwidth, measure
from encnet_triton.train.setup import compile_obstacle


def worker(case: Case, variant: str, device: torch.device, data: str | None) -> None:
    """Measure one variant in this process and print it as JSON."""
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    # Making an optimiser imports this, 80 MiB, in every training process; it is no step's memory.
    importlib.import_module("torch._dynamo")
    call = case.build(variant, device, data)
    print(json.dumps(measure(call, device).as_dict()))


def measure_apart(name: str, variant: str, device: str, data: str | None) -> Measurement | str:
    """Measure one variant in a fresh process; a sentence where it could not be."""
    if is_compiled(variant) and compile_obstacle(torch.device(device)):
        return "no compiled peer: there is no compiler for torch.compile here"
    command = [sys.executable, "-m", "bench", name, "--worker", variant, "--device", device]
    command += ["--data", data] if data else []
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{variant} failed: {last[:200]}"
    return Measurement(**json.loads(run.stdout.strip().splitlines()[-1]))


def compare(name: str, device: torch.device, data: str | None, json_file: Path | None) -> int:
    """Check, measure every variant, print the table; returns the exit status."""
    case = CASES[name]
    console = Console() if sys.stdout.isatty() else Console(width=130)
    wrong = gate.check(name, device)
    if wrong:
        print(f"error: {name} is not correct, so no speed is given: {wrong}", file=sys.stderr)
        return 1
    console.print(report.machine(device), highlight=False)
    results = {v: measure_apart(name, v, device.type, data) for v in case.variants}
    if isinstance(results["ours"], str):
        print(f"error: {results['ours']}", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth(device) if device.type == "cuda" else 0.0
    console.print(report.table(case, results, bandwidth))
    if json_file is not None:
        rows = {v: r if isinstance(r, str) else r.as_dict() for v, r in results.items()}
        document = {"machine": report.machine(device), "case": name, "results": rows}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, what ``context`` passes on to the trainer, and ``versions`` reads itself)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "case",
        nargs="?",
        choices=[
            *CASES,
            "step",
            "memory",
            "loader",
            "context",
            "compile",
            "traffic",
            "cost",
            "versions",
        ],
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data", help="crop, loader: a folder data set to take the images from")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seeds", type=int, default=3, help="context: runs of each network")
    parser.add_argument("--runs", type=Path, default=Path("runs/context"), help="context: folder")
    parser.add_argument("--quick", action="store_true", help="traffic: small shapes only")
    parser.add_argument("--all", action="store_true", help="compile: all shapes and configurations")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=compile_report.ARCHS, default=compile_report.ARCHS,
        help="compile: compute capabilities",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=compile_report.DTYPES, default=compile_report.DTYPES,
        help="compile: element types of x",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=compile_report.parse_shape, nargs="+",
        metavar="CxK[xN]",
        help="compile: channels x codewords (x pixels) of encode, for example 512x32",
    )  # fmt: skip
    parser.add_argument(
        "--op", nargs="+", choices=compile_report.OPS, default=compile_report.OPS,
        help="compile: operators",
    )  # fmt: skip
    step.add_options(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["gpu"]:
        return gpu.main(given[1:])
    options, extra = parse(given)
    if extra and options.case not in ("context", "versions"):
        print(f"error: unknown argument {extra[0]}", file=sys.stderr)
        return 2
    if options.case is None:
        for name, case in CASES.items():
            print(f"{name:<10}{case.title}")
        print(f"{'gpu':<10}all that is worth measuring on a GPU, in the time there is; see --help")
        print(f"{'step':<10}a training step of the network, phase by phase, against stock code")
        print(f"{'memory':<10}peak memory of a training step on a GPU, predicted without one")
        print(f"{'loader':<10}training batches a second from JPEGs, two workers")
        print(f"{'context':<10}FCN, EncNet, EncNet+SE on the embedded data set, several seeds each")
        print(f"{'compile':<10}registers, spills, memory and instructions of every kernel; no GPU")
        print(f"{'traffic':<10}bytes the Triton kernels move, counted without a GPU")
        print(f"{'cost':<10}multiply-accumulates of each form of EncNet over those of FCN; no GPU")
        print(f"{'versions':<10}the kernels with other versions of Triton and torch; no GPU")
        return 0
    if options.case == "versions":
        return versions.main(extra)
    if options.case == "cost":
        return cost.run(options.json)
    if options.case == "compile":
        return compile_report.run(
            list(options.arch),
            list(options.dtype),
            list(options.op),
            options.shape,
            options.all,
            options.json,
        )
    if options.case == "memory":
        return memory.run(options)
    if options.case == "loader":
        return loader.run(options.data)
    if options.case == "traffic":
        return traffic.run(options.quick, options.json)
    if options.case == "context":
        context.run(options.seeds, options.runs, options.json, extra)
        return 0
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    device = torch.device("cuda" if cuda and options.case != "crop" else "cpu")
    if options.case == "step":
        return step.run(options, device)
    if options.worker:
        worker(CASES[options.case], options.worker, device, options.data)
        return 0
    return compare(options.case, device, options.data, options.json)


if __name__ == "__main__":
    sys.exit(main())
