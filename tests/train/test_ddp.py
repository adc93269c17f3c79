"""Two processes with half the batch each give the gradients of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("ddp_gradients.py"))


def gradients(
    output: Path, processes: int, dtype: str = "float64", accumulation: int = 1, norm: str = "batch"
) -> dict[str, torch.Tensor]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    run = subprocess.run(
        [*command, SCRIPT, dtype, str(output), str(accumulation), norm],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return load_file(output)


def assert_equal(
    one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert len(one) > 30
    # A gradient that is zero by symmetry is rounding noise on both sides.
    floor = 1e-6 * max(float(g.norm()) for g in one.values())
    for name, gradient in one.items():
        difference = float((gradient - two[name]).norm())
        assert difference <= tolerance * max(float(gradient.norm()), floor), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_two_processes_equal_one(dtype: str, tolerance: float, tmp_path: Path) -> None:
    one = gradients(tmp_path / "one.safetensors", 1, dtype)
    two = gradients(tmp_path / "two.safetensors", 2, dtype)
    assert_equal(one, two, tolerance)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulation_over_two_processes_equals_one_batch(
    accumulation: int, tmp_path: Path
) -> None:
    """In the third step too: a reducer that lost count would average in the first alone."""
    one = gradients(tmp_path / "one.safetensors", 1, norm="frozen")
    two = gradients(tmp_path / "two.safetensors", 2, accumulation=accumulation, norm="frozen")
    assert_equal(one, two, 1e-9)
