"""--compile trains as eager code does, in two processes, and says where it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from encnet_triton.train import trainer
from encnet_triton.train.__main__ import main
from encnet_triton.train.compiling import compile_obstacle, records_graphs
from encnet_triton.train.segmentation import Segmentation
from tests.support.tolerance import assert_equal_in_float64
from tests.train.launch import IN_FLOAT64, assert_same_state, floating, run, torchrun

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(compile_obstacle(CPU) is not None, reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("", marks=pytest.mark.verify)])
def test_compiled_in_two_processes_equals_eager_in_one(
    backend: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """With synchronised batch normalisation, whose collectives are then in the compiled graph."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPILED_BY", backend)
    arguments = ["--recipe", str(recipe), "--stop-at", "3", "--epochs", "3", "--val-every", "0",
                 "--dropout", "0", "--name"]  # fmt: skip
    assert main([*arguments, "eager"]) == 0
    log = Path("log")
    run([*torchrun(module=IN_FLOAT64), *arguments, "compiled", "--compile"], log)
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
    assert "--compile is ignored: there is no C++ compiler" in said
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
        "--compile is ignored: Triton is not installed; the network runs eagerly"
    )


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the network would have been compiled with; it runs eagerly."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    monkeypatch.setattr(trainer, "compile_obstacle", lambda _: None)
    return asked


def test_the_mode_reaches_the_compiler(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: list[dict[str, Any]]
) -> None:
    """And a CPU has no CUDA graphs, whatever is asked for."""
    monkeypatch.chdir(tmp_path)
    for name, given in (("default", []), ("graphs", ["reduce-overhead"])):
        options = ["--recipe", str(recipe), "--stop-at", "1", "--name", name, "--compile", *given]
        assert main(options) == 0
    assert modes == [{}, {"mode": "reduce-overhead"}]
    gpu = torch.device("cuda")
    assert records_graphs("reduce-overhead", gpu) and not records_graphs("reduce-overhead", CPU)
    assert not records_graphs(True, gpu) and not records_graphs(False, gpu)


def test_gradients_of_micro_batches_stay_out_of_the_memory_of_graphs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: list[dict[str, Any]]
) -> None:
    """They are added to tensors that are there before the first step, to the same bits."""
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", str(recipe), "--accumulation", "2", "--stop-at", "3", "--val-every", "0",
               "--name"]  # fmt: skip
    assert main([*options, "eager"]) == 0
    places: list[list[int]] = []
    compute = Segmentation.compute

    def step(self: Segmentation, *given: Any) -> object:
        places.append([p.grad.data_ptr() for p in self.model.parameters() if p.grad is not None])
        return compute(self, *given)

    monkeypatch.setattr(Segmentation, "compute", step)
    monkeypatch.setattr(trainer, "records_graphs", lambda *_: True)
    assert main([*options, "graphs", "--compile", "reduce-overhead"]) == 0
    assert len(places) == 6 and len(places[0]) > 40 and all(p == places[0] for p in places)
    assert_same_state("graphs", "eager")


@pytest.mark.gpu
def test_cuda_graphs_train_and_validate_as_eager_code_does(
    recipe: Path, folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With micro-batches, and windows in batches of 2, 4 and 8, the last of which is smaller."""
    from torch._dynamo.utils import counters

    monkeypatch.chdir(tmp_path)
    for index, size in enumerate([(48, 80), (64, 64), (112, 112)]):
        for end in ("jpg", "png"):
            path = folder_data / "val" / f"{index}.{end}"
            with Image.open(path) as picture:
                picture.resize(size[::-1], Image.Resampling.NEAREST).save(path)
    counters.clear()
    options = ["--recipe", str(recipe), "--device", "cuda", "--accumulation", "2", "--dropout", "0",
               "--epochs", "3", "--pictures", "0", "--name"]  # fmt: skip
    assert main([*options, "eager"]) == 0
    assert main([*options, "graphs", "--compile", "reduce-overhead"]) == 0
    assert counters["inductor"]["cudagraph_skips"] == 0
    eager, graphs = (
        [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        for name in ("eager", "graphs")
    )
    for ours, theirs in zip(graphs, eager, strict=True):
        assert ours["kind"] == theirs["kind"]
        # TF32 keeps 11 bits, and six steps carry a difference on.
        for name in ("loss", "miou"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=0.02, abs=0.02)
