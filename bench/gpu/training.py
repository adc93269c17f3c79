"""Training under torchrun, stopped by a signal when its time is up."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.apart import complaint
from bench.gpu.compiler import ask_for_compiler
from bench.gpu.device import place
from bench.gpu.job import Wrong
from bench.gpu.processes import LOOPBACK, ROOT, child_environment, kill_tree, torchrun
from encnet_triton.train.log import read_records

_GRACE = 60.0  # seconds to save and end after the signal


def train(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Train a recipe for some seconds; returns steps, samples per second and the last score.

    `arguments` are recipe, options of the trainer, and seconds; a rehearsal takes two steps.
    """
    if "--compile" in arguments["options"]:
        ask_for_compiler(rehearse)
    with tempfile.TemporaryDirectory() as folder:
        command = torchrun(1, ["-m", "encnet_triton.train"])
        command += ["--recipe", arguments["recipe"], "--runs", folder, "--name", "run"]
        command += ["--device", place(rehearse).kind, *arguments["options"]]
        if rehearse:
            command += ["--batch-size", "2", "--stop-at", "2"]
            if not arguments["recipe"].startswith("cifar10"):  # which does not use these
                command += ["--workers", "0", "--log-every", "1"]
        start = time.monotonic()
        printed, ended = _run_for(command, arguments["seconds"])
        found = {"seconds": round(time.monotonic() - start, 1), "to its end": ended}
        run = Path(folder, "run")
        if not (run / "last.safetensors").exists():
            raise Wrong(f"the training left no checkpoint: {complaint(printed)}")
        return found | read(read_records(run))


def _run_for(command: list[str], seconds: float) -> tuple[str, bool]:
    """Run a command for at most `seconds`; its output, and whether it ended by itself."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=child_environment(LOOPBACK)
        )
        ended = True
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            ended = False
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
        log.seek(0)
        printed = log.read()
    print(printed)
    return printed, ended


def read(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last step, the median rate and the last score of a run's records."""
    training = [r for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "val"]
    found: dict[str, Any] = {}
    if training:
        found["step"] = training[-1]["step"]
        rates = sorted(r["images_per_second"] for r in training if r.get("images_per_second"))
        if rates:
            found["images/s"] = rates[len(rates) // 2]
    for name in ("miou", "pixel_accuracy", "error"):
        if scores and name in scores[-1]:
            found[name] = scores[-1][name]
    return found
