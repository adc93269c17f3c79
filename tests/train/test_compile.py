"""--compile trains as eager code does, in two processes, and says where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from encnet_triton.train.__main__ import main
from encnet_triton.train.compiling import compile_obstacle
from tests.support.tolerance import assert_equal_in_float64
from tests.train.launch import IN_FLOAT64, floating, run, torchrun

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(compile_obstacle(CPU) is not None, reason="no C++ compiler for torch.compile")
def test_compiled_in_two_processes_equals_eager(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With synchronised batch normalisation, whose collectives are then in the compiled graph."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--recipe", str(recipe), "--stop-at", "3", "--epochs", "3", "--val-every", "0",
                 "--dropout", "0", "--name"]  # fmt: skip
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        log = Path(f"{name}.log")
        run([*torchrun(module=IN_FLOAT64), *arguments, name, *more], log)
        assert "left out" not in log.read_text()
    for kind in ("model.", "momentum."):
        assert_equal_in_float64(floating("compiled", kind), floating("eager", kind))


def test_without_a_compiler_it_says_so_and_trains(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["--recipe", str(recipe), "--compile", "--stop-at", "1"]) == 0
    said = capsys.readouterr().out
    assert "--compile is left out: there is no C++ compiler" in said
    assert "stopped at step 1 of 4" in said


def test_the_compiler_is_the_one_that_would_be_called(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("gcc", "g++", "clang++", "cl", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    assert compile_obstacle(CPU) is None
    monkeypatch.setenv("CXX", "mine")
    assert compile_obstacle(CPU) is None
    monkeypatch.setenv("CXX", "gone")
    assert "no C++ compiler" in str(compile_obstacle(CPU))


def test_on_a_gpu_triton_and_a_c_compiler_are_needed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    gpu = torch.device("cuda")
    assert "Triton finds no C compiler" in str(compile_obstacle(gpu))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compile_obstacle(gpu) == (
        "--compile is left out: Triton is not installed; the network runs eagerly"
    )
