"""``python -m bench versions``: try the kernels with other versions of Triton and torch; no GPU.

Each Triton is tried with this environment's torch, or with those that --torch names, each in an
environment of its own. For each pair the kernel tests run in Triton's interpreter, and one shape of
each kernel is compiled for sm_90. Each result is written to FOLDER/results.jsonl as it comes, and
what is there is not run again. The table goes between two markers of docs/versions.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import report
from bench.apart import last_line
from bench.static import compile as compiler
from bench.static.launches import (
    BATCH_NORM_SHAPES,
    ENCODE_SHAPES,
    UPSAMPLE_SHAPES,
    Call,
    batch_norm_calls,
    encode_calls,
    upsample_calls,
)
from encnet_triton.files import make_folder, write_text
from encnet_triton.kernels.runtime.launch import MOST_LOCAL

ROOT = Path(__file__).parents[1]
MARKERS = ("<!-- made by: python -m bench versions -->\n", "<!-- end -->\n")
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
OPS = ("encode", "batch_norm_act", "upsample")
ARCH = 90
TESTS = tuple(
    f"tests/kernels/{name}.py"
    for name in (
        "test_interpreter_support",
        "encoding/test_plan",
        "batch_norm/test_plan",
        "upsampling/test_plan",
    )
)

COMPILE = tuple(f"compile {op}" for op in OPS)
STAGES = (*COMPILE, *TESTS)
# A result holds until one of these changes.
SOURCES = (
    "kernels/**/*.py",
    *(
        f"bench/static/{name}.py"
        for name in ("launches", "compile", "interpreter", "races", "resources")
    ),
    "tests/kernels/**/*.py",
    "tests/support/*.py",
    "tests/conftest.py",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Versions of torch and Triton; `python` runs this torch."""

    torch: str
    triton: str
    python: str


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def torch_of(folder: Path, version: str | None) -> tuple[str, str]:
    """(version, Python that runs it): this one, or that of an environment made for the version."""
    if version in (None, metadata.version("torch").split("+")[0]):
        return metadata.version("torch"), sys.executable
    place = folder / f"torch-{version}"
    python, done = str(place / "bin" / "python"), place / ".installed"
    if not done.exists():
        venv.create(place, with_pip=True, clear=True)
        _pip(python, f"torch=={version}", "-e", f"{ROOT}[test]")
        done.touch()
    return str(version), python


def triton_of(folder: Path, version: str, python: str) -> Path:
    """A folder that holds only this Triton, to be put before site-packages."""
    tag = Path(python).parents[1].name if python != sys.executable else platform.python_version()
    place = folder / f"triton-{version}-{tag}"
    if not (place / ".installed").exists():
        _pip(python, "--no-deps", "--upgrade", "--target", str(place), f"triton=={version}")
        (place / ".installed").touch()
    return place


def _process(command: list[str], place: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a process that imports this checkout and the Triton in ``place``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | extra
    environment["PYTHONPATH"] = os.pathsep.join((str(place), str(ROOT)))
    # A cache of its own for each Triton.
    environment["TRITON_CACHE_DIR"] = str(place / ".cache")
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def tests(pair: Pair, place: Path, file: str) -> Row:
    """Run one file of tests in the interpreter."""
    report = place / "junit.xml"
    report.unlink(missing_ok=True)
    command = [pair.python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    command += ["-m", "interpreter or triton"]
    done = _process([*command, f"--junitxml={report}", file], place, TRITON_INTERPRET="1")
    if not report.exists():
        return {
            "failed": [last_line(done.stderr.strip() or done.stdout)],
            "passed": 0,
            "skipped": 0,
        }
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c.get("name") for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    return {"failed": failed, "passed": passed, "skipped": len(skipped)}


def compile_apart(pair: Pair, place: Path, op: str) -> Row:
    """What `compiled_calls` finds with these versions."""
    file = place / "compiled.json"
    file.unlink(missing_ok=True)
    command = [pair.python, "-m", "bench", "versions", "--compile", op, "--to", str(file)]
    done = _process(command, place)
    if not file.exists():
        return {"error": last_line(done.stderr.strip() or done.stdout)}
    found: Row = json.loads(file.read_text())
    return found


def compiled_calls(op: str) -> Row:
    """How many kernels one shape needs, and what replaces a bad configuration.

    Bad is what the launcher does not take.
    """
    dtypes, calls = list(compiler.DTYPES), list[Call]()
    if op == "encode":
        calls += encode_calls([ARCH], dtypes, [ENCODE_SHAPES[0]], False)
    elif op == "batch_norm_act":
        calls += batch_norm_calls([ARCH], dtypes, [BATCH_NORM_SHAPES[0]], False)
    else:
        calls += upsample_calls([ARCH], dtypes, [UPSAMPLE_SHAPES[0]], False)
    kernels, instead = 0, []
    while calls:
        found = compiler.kernels(calls)
        rows = compiler.reports(found)
        kernels += len(rows)
        bad: dict[Call, list[Row]] = {}
        for kernel, row in zip(found, rows, strict=True):
            if row["stack_bytes"] > MOST_LOCAL or not row["fits"]:
                bad.setdefault(kernel.call, []).append(row)
        instead += [_instead(call, wrong) for call, wrong in bad.items()]
        calls = [replace(c, config=c.config + 1) for c in bad if c.config + 1 < len(c.configs())]
    return {"kernels": kernels, "instead": instead}


def _instead(call: Call, bad: list[Row]) -> Row:
    configs = [*map(str, call.configs()), None]
    local = max(row["stack_bytes"] for row in bad)
    return {
        "call": f"{call.direction} {call.dtype} {call.shape}",
        "config": configs[call.config],
        "why": bad[0]["note"] or f"needs {local} bytes of local memory",
        "next": configs[call.config + 1],
    }


def sources() -> str:
    """A hash of the files that are tried and of those that try them."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def make(pair: Pair, place: Path, stage: str) -> Row:
    """The result of one stage."""
    if stage in TESTS:
        return tests(pair, place, stage)
    return compile_apart(pair, place, stage.removeprefix("compile "))


def read(file: Path) -> dict[tuple[str, str, str], Row]:
    """The last result of each pair and stage."""
    rows = (json.loads(line) for line in file.read_text().splitlines()) if file.exists() else ()
    return {(row["torch"], row["triton"], row["stage"]): row for row in rows}


def run_pair(pair: Pair, folder: Path, stages: Sequence[str], redo: bool) -> None:
    """Run the stages that have no result for these sources yet."""
    results = folder / "results.jsonl"
    place = triton_of(folder, pair.triton, pair.python)
    ask = "import platform, numpy; print(platform.python_version(), numpy.__version__)"
    python, numpy = _process([pair.python, "-c", ask], place).stdout.split()
    for stage in stages:
        now, start = sources(), time.perf_counter()
        before = read(results).get((pair.torch, pair.triton, stage))
        if before and before["sources"] == now and not redo:
            continue
        print(f"torch {pair.torch}, Triton {pair.triton}: {stage}", flush=True)
        row: Row = {"torch": pair.torch, "triton": pair.triton, "python": python, "numpy": numpy}
        row |= {"sources": now, "stage": stage, **make(pair, place, stage)}
        row["seconds"] = round(time.perf_counter() - start)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {_cell(row)}, {row['seconds']} s", flush=True)


def _cell(row: Row | None) -> str:
    if row is None:
        return "not run"
    if "error" in row:
        return f"fails: {row['error']}"
    if "kernels" in row:
        bad = len(row["instead"])
        return f"{row['kernels']}, " + (f"{bad} bad" if bad else "none bad")
    text = f"{row['passed']} passed"
    return text + (f", {len(row['failed'])} failed" if row["failed"] else "")


def table(file: Path) -> str:
    """Markdown: a line for each pair, then what failed and what replaces a bad default."""
    found = read(file)
    heads = [
        s.removeprefix("tests/kernels/").removesuffix(".py").replace("test_", "") for s in STAGES
    ]
    heads = ["torch", "Triton", "Python", "numpy", *heads, "sources"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    notes: list[str] = []
    for pair in sorted({(torch, triton) for torch, triton, _ in found}):
        rows = [found.get((*pair, stage)) for stage in STAGES]
        made = [row for row in rows if row]
        same = (", ".join(sorted({r[n] for r in made})) for n in ("python", "numpy", "sources"))
        python, numpy, states = same
        lines.append("| " + " | ".join([*pair, python, numpy, *map(_cell, rows), states]) + " |")
        notes += [f"- torch {pair[0]}, Triton {pair[1]}: {n}" for row in made for n in _notes(row)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _notes(row: Row) -> Iterator[str]:
    for one in row.get("instead", ()):
        after = f"then comes '{one['next']}'" if one["next"] else "and none is left"
        yield f"{row['stage']}, {one['call']}: '{one['config']}' {one['why']}; {after}."
    for name in row.get("failed", ()):
        yield f"{row['stage']}: {name} failed."


def publish(file: Path, document: Path) -> None:
    """Put the table between the markers of the document."""
    write_text(report.filled(document, MARKERS, table(file)), document)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".venv-versions", help="environments and results"
    )
    parser.add_argument("--triton", nargs="+", default=TRITONS, help="versions of Triton")
    parser.add_argument(
        "--torch", nargs="+", default=[None],
        help="versions of torch, each in an environment of its own; default: the installed one",
    )  # fmt: skip
    parser.add_argument("--redo", action="store_true", help="also run what has a result")
    parser.add_argument("--table", action="store_true", help="only write the table of results")
    parser.add_argument(
        "--document", type=Path, default=ROOT / "docs" / "versions.md", help="where the table goes"
    )
    parser.add_argument("--compile", choices=OPS, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Returns 1 if a test failed, a kernel did not compile or no configuration is good."""
    if options.compile:
        options.to.write_text(json.dumps(compiled_calls(options.compile)))
        return 0
    file = options.folder / "results.jsonl"
    if options.table and not file.exists():
        raise ValueError(f"there is no {file}, so there are no results for a table")
    make_folder(options.folder, "--folder")
    for version in options.torch if not options.table else ():
        torch, python = torch_of(options.folder, version)
        pairs = [Pair(torch, triton, python) for triton in options.triton]
        for stages in (COMPILE, TESTS):  # the quick answer of every pair first
            for pair in pairs:
                run_pair(pair, options.folder, stages, options.redo)
                publish(file, options.document)
    publish(file, options.document)
    print(table(file))
    return int(any(map(_wrong, read(file).values())))


def _wrong(row: Row) -> bool:
    left = any(one["next"] is None for one in row.get("instead", ()))
    return "error" in row or bool(row.get("failed")) or left
