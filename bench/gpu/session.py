"""`python -m bench gpu`: measure everything worth measuring on this GPU, the most useful first.

`python -m bench tune` runs only the stage `tune`, which finds each kernel's fastest configuration.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.gpu import publish, ranking, report
from bench.gpu.device import place
from bench.gpu.job import Job, Outcome
from bench.gpu.processes import together
from bench.gpu.runner import Results, Runner
from bench.gpu.stages import STAGES, jobs_of
from bench.report import machine
from encnet_triton.files import make_folder, write_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, report.md, log.txt")
    parser.add_argument("--minutes", type=float, default=25.0, help="time limit (%(default)s)")
    if parser.get_default("command") == "tune":
        parser.set_defaults(stage=["tune"], cifar=None)
    else:
        parser.add_argument(
            "--stage", nargs="+", choices=STAGES, default=list(STAGES), help="default: all"
        )
        parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10, to train on it too")
    parser.add_argument("--resume", action="store_true", help="continue what --out holds")
    parser.add_argument(
        "--rehearse", action="store_true", help="try everything on a CPU, with small shapes"
    )
    parser.add_argument(
        "--publish", type=Path, nargs="+", metavar="DIR",
        help="copy the results in these folders, all of one machine, into the project",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measure or publish; returns the exit status: 1 where a result was wrong or a job failed."""
    if options.publish is not None:
        print(f"published in {publish.publish(options.publish)}")
        publish.write_documents()
        return 0
    _check(options)
    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} finds no CUDA device; --rehearse tries all stages on a CPU"
        )
    return measure(options)


def _check(options: argparse.Namespace) -> None:
    if options.out is None:
        raise ValueError("--out must name a folder for the results, for example gpu-results")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must name a folder; {options.out} is a file")
    if not 0 < options.minutes < float("inf"):
        raise ValueError(f"--minutes must be above 0, got {options.minutes:g}")
    if options.cifar is not None and not options.cifar.is_dir():
        raise ValueError(f"--cifar must name a folder; {options.cifar} is not one")


def measure(options: argparse.Namespace) -> int:
    """Run the jobs, write the report after each; returns the exit status."""
    deadline = time.monotonic() + 60 * options.minutes
    jobs = jobs_of(options.stage, options.rehearse, options.cifar)
    results = _results(options)
    at_once = together(options.rehearse)
    for line in plan(jobs, 60 * options.minutes, at_once):
        print(line, flush=True)

    def after(outcome: Outcome) -> None:
        said = f"{outcome.stage}: {outcome.name}: {outcome.status}"
        said += f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.seconds:6.1f} s  {said}", flush=True)
        _write(options.out, results)

    # The signal that `timeout` or a batch system sends must end the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Runner(results, deadline, options.rehearse, at_once, after).run(jobs)
    _write(options.out, results)
    print(f"report: {options.out / 'report.md'}")
    bad = {o.status for o in results.outcomes.values()} & {"wrong", "failed", "timed out"}
    return 1 if bad else 0


def _results(options: argparse.Namespace) -> Results:
    make_folder(options.out, "--out")
    results = Results(options.out)
    if results.header and not options.resume:
        raise ValueError(f"{results.file} exists: add --resume, or choose another --out")
    now = _header(options.rehearse)
    same = ("device", "machine", "rehearsal")
    if results.header and any(results.header.get(key) != now[key] for key in same):
        raise ValueError(
            f"{results.file} was made by {results.header.get('device')}, "
            f"{results.header.get('machine')}; this is {now['device']}, {now['machine']}"
        )
    results.begin(now)
    return results


def _header(rehearse: bool) -> dict[str, Any]:
    device = place(rehearse)
    return {
        "device": device.facts()["name"],
        "machine": machine(torch.device(device.kind)),
        "rehearsal": rehearse,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def plan(jobs: list[Job], seconds: float, at_once: int) -> list[str]:
    """One line per stage: how long it takes, and whether the time is enough."""
    lines, used = [], 0.0
    for stage in dict.fromkeys(job.stage for job in jobs):
        of_stage = [job for job in jobs if job.stage == stage]
        need = sum(job.seconds if job.alone else job.seconds / at_once for job in of_stage)
        fits = "fits" if used + need <= seconds else f"only {max(0.0, seconds - used):.0f} s left"
        lines.append(f"{stage:<10}{len(of_stage):>4} jobs, about {need:4.0f} s: {fits}")
        used += need
    return lines


def _write(folder: Path, results: Results) -> None:
    write_text(report.whole(results.header, results.outcomes), folder / "report.md")
    ranking.write(folder / "tuned", results.header, results.outcomes)
