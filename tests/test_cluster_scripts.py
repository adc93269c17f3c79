"""The scripts in docs/ call the trainer as it is, and the Slurm script ends as it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from encnet_triton.train import cli

DOCS = Path(__file__).parents[1] / "docs"
MARK = "-m encnet_triton.train"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="scripts for bash")


def slurm_commands() -> list[str]:
    text = (DOCS / "slurm.sbatch").read_text().replace("\\\n", " ")
    return [line.removesuffix(' "$@" &') for line in text.splitlines() if MARK in line]


def kubernetes_commands() -> list[str]:
    """The items of the YAML list ``args``."""
    text = (DOCS / "kubernetes.yaml").read_text()
    block = re.search(r"^( +)args:\n((?:\1  - .*\n)+)", text, flags=re.MULTILINE)
    assert block is not None
    return [" ".join(line.strip().removeprefix("- ") for line in block[2].splitlines())]


def markdown_commands() -> list[str]:
    text = (DOCS / "multi_node.md").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if MARK in line]


@pytest.mark.parametrize(
    ("commands", "count"),
    [(slurm_commands, 1), (kubernetes_commands, 1), (markdown_commands, 2)],
    ids=["slurm", "kubernetes", "markdown"],
)
def test_the_trainer_takes_the_options_shown(commands, count: int) -> None:
    found = commands()
    assert len(found) == count
    for line in found:
        launcher, _, rest = line.partition(MARK)
        options = cli.parse(shlex.split(rest))
        config = cli.configuration(options)
        assert "--rdzv-backend" in launcher and "--nnodes" in launcher
        if "--max-restarts" in launcher:
            assert config.run.resume, "a restarted group goes on only with --resume"


def test_the_manifest_names_one_service_and_one_number_of_nodes() -> None:
    text = (DOCS / "kubernetes.yaml").read_text()
    assert "\t" not in text
    (service,) = re.findall(r"^ +subdomain: (\S+)", text, flags=re.MULTILINE)
    assert f"kind: Service\nmetadata:\n  name: {service}\n" in text
    assert f"--rdzv-endpoint={service}-0.{service}:" in text
    assert f"job-name: {service}\n" in text and f"kind: Job\nmetadata:\n  name: {service}\n" in text
    numbers = re.findall(r'(?:completions|parallelism|value): "?(\d+)"? # nodes', text)
    assert len(numbers) == 3 and len(set(numbers)) == 1


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def slurm(folder: Path, srun: str) -> subprocess.Popen[str]:
    """Start the script with a given srun and a scontrol that writes down what it is asked."""
    stand_in(folder, "srun", srun)
    stand_in(folder, "scontrol", 'echo "$@" >> asked; [ "$1" = requeue ] || echo node-1')
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NAME": "encnet",
        "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    script = ["bash", str(DOCS / "slurm.sbatch"), "--classes-file", "two words.txt"]
    return subprocess.Popen(script, cwd=folder, env=environment, text=True)


def test_before_the_time_limit_the_step_is_ended_and_the_job_put_back(tmp_path: Path) -> None:
    process = slurm(
        tmp_path,
        'trap "touch saved; exit 143" TERM; printf "%s|" "$@" > started; '
        "while :; do sleep 0.1; done",
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text().splitlines() == [
        "show hostnames node-[1-2]", "requeue 42",
    ]  # fmt: skip
    started = (tmp_path / "started").read_text()
    assert "|--rdzv-endpoint|node-1:29500|-m|encnet_triton.train|" in started
    assert started.endswith("|--classes-file|two words.txt|")


def test_an_error_of_the_trainer_ends_the_job(tmp_path: Path) -> None:
    assert slurm(tmp_path, "exit 2").wait(60) == 2
    assert "requeue" not in (tmp_path / "asked").read_text()
