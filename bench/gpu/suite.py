"""The tests that need a GPU, a share of them in each process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.job import Wrong
from bench.gpu.processes import ROOT, child_environment

_PART = "ENCNET_TEST_PART"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin of pytest: keep every n-th test, beginning with the i-th."""
    part, parts = map(int, os.environ[_PART].split("/"))
    chosen = items[part::parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def run(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Run a part of the tests; counts, and the reasons of what was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            *arguments["select"],
            "-q",
            "-p",
            "bench.gpu.suite",
        ]
        command += ["-p", "no:cacheprovider", f"--junitxml={file}"]
        variables = child_environment({_PART: arguments["part"]})
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
        print(done.stdout[-3000:], done.stderr[-1000:])
        if done.returncode == 5:  # pytest: nothing was selected
            return {"passed": 0, "skipped": {}}
        if not file.exists():
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise Wrong(f"pytest ended with exit status {done.returncode}: {lines[-1]}")
        found = read(file)
    if found["failed"]:
        first, message = next(iter(found["failed"].items()))
        raise Wrong(f"{len(found['failed'])} of {found['tests']} failed; {first}: {message}")
    return found


def read(file: Path) -> dict[str, Any]:
    """What a JUnit file says: names and first lines of failures, reasons of what was skipped."""
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    for case in cases:
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failed[name] = (found.get("message") or "no message").splitlines()[0][:200]
        if (found := case.find("skipped")) is not None:
            reason = found.get("message") or "no reason"
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = len(cases) - len(failed) - sum(skipped.values())
    return {"tests": len(cases), "passed": passed, "failed": failed, "skipped": skipped}
