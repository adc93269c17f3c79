"""Two processes with half the batch each give the gradients of one process with all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.support.tolerance import assert_alike_in_float32, assert_equal_in_float64
from tests.train import launch

SCRIPT = "tests.train.ddp_gradients"


def gradients(
    folder: Path, processes: int, dtype: str = "float64", accumulation: int = 1, norm: str = "batch"
) -> dict[str, Tensor]:
    """More than 30 tensors."""
    output = folder / f"{processes}.safetensors"
    one = [sys.executable, "-m", SCRIPT]
    command = one if processes == 1 else launch.torchrun(processes=processes, module=SCRIPT)
    launch.run([*command, dtype, str(output), str(accumulation), norm], folder / "log")
    found = load_file(output)
    assert len(found) > 30
    return found


@pytest.mark.float32
def test_two_processes_equal_one(tmp_path: Path) -> None:
    exact = gradients(tmp_path, 1)
    assert_equal_in_float64(gradients(tmp_path, 2), exact)
    assert_alike_in_float32(gradients(tmp_path, 2, "float32"), exact)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulation_over_two_processes_equals_one_batch(
    accumulation: int, tmp_path: Path
) -> None:
    """In the third step too: a reducer that lost count would average in the first alone."""
    one = gradients(tmp_path, 1, norm="frozen")
    two = gradients(tmp_path, 2, accumulation=accumulation, norm="frozen")
    assert_equal_in_float64(two, one)
