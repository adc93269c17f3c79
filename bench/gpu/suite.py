"""Run the tests that need a GPU, a share in each process; this is also a plugin of pytest."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench.apart import first_line, last_line
from bench.gpu.job import Wrong
from bench.gpu.processes import streamed

_PART = "ENCNET_TEST_PART"
_TO_END = 15.0  # the last seconds of a job, in which pytest writes its results


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every n-th test, beginning with the i-th."""
    part, parts = map(int, os.environ[_PART].split("/"))
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % parts != part])
    items[:] = items[part::parts]


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop in time, so that results are written."""
    if time.time() > float(os.environ.get("ENCNET_JOB_UNTIL", "inf")) - _TO_END:
        item.session.shouldstop = "the time of the job is over"


def run(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Run a part of the tests; counts, failures, and the reasons of what was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        options = ["-q", "--tb=short", "-p", "bench.gpu.suite", "-p", "no:cacheprovider"]
        options += ["--continue-on-collection-errors", f"--junitxml={file}"]
        command = [sys.executable, "-m", "pytest", *options, *arguments["select"]]
        # The float64 references run on the CPU, several parts at once.
        variables = {_PART: arguments["part"], "OMP_NUM_THREADS": "1"}
        status, printed = streamed(command, **variables)
        if status == 5:  # pytest: nothing was selected
            return {"passed": 0, "skipped": {}}
        if status in (3, 4) or not file.exists():  # an error of pytest, or no such test
            raise Wrong(f"pytest ended with exit status {status}: {last_line(printed)}")
        found = read(file)
    if found["failed"]:
        first, message = next(iter(found["failed"].items()))
        said = f"{len(found['failed'])} of {found['tests']} failed; {first}: {message}"
        raise Wrong(said, found)
    return found | {"stopped": "the time of the job is over" in printed}


def read(file: Path) -> dict[str, Any]:
    """Read a JUnit file: names and first lines of failures, reasons for skipped tests."""
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failed[name] = first_line(found.get("message") or "")[:200]
        if (found := case.find("skipped")) is not None:
            reason = found.get("message") or "no reason"
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = len(cases) - len(failed) - sum(skipped.values())
    return {"tests": len(cases), "passed": passed, "failed": failed, "skipped": skipped}
