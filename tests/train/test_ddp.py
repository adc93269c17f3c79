"""Two processes with half the batch each give the gradients of one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).with_name("ddp_gradients.py"))


def gradients(dtype: str, output: Path, processes: int) -> dict[str, torch.Tensor]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    run = subprocess.run([*command, SCRIPT, dtype, str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(output)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_two_processes_equal_one(dtype: str, tolerance: float, tmp_path: Path) -> None:
    one = gradients(dtype, tmp_path / "one.safetensors", 1)
    two = gradients(dtype, tmp_path / "two.safetensors", 2)
    assert len(one) > 30
    # A gradient that is zero by symmetry is rounding noise on both sides.
    floor = 1e-6 * max(float(g.norm()) for g in one.values())
    for name, gradient in one.items():
        difference = float((gradient - two[name]).norm())
        assert difference <= tolerance * max(float(gradient.norm()), floor), name
