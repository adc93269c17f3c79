"""The state of a run on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from encnet_triton.train import run_state
from encnet_triton.train.distributed import World
from encnet_triton.train.recipe import build
from encnet_triton.train.run_state import Progress, State
from encnet_triton.weights.checkpoint import CheckpointError, ModelInfo

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def state_of(model: nn.Module, progress: Progress) -> State:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    info = ModelInfo({}, [], [], [], [], [])
    state = run_state.copy_state(WORLD, model, optimizer, info, progress, build("scenes", {}))
    assert state is not None
    return state


def save(folder: Path, model: nn.Module, progress: Progress) -> None:
    state_of(model, progress).write(folder)


def load(folder: Path, model: nn.Module) -> Progress:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path = folder / run_state.LAST
    return run_state.load(path, WORLD, model, optimizer, build("scenes", {}))


def test_weights_that_are_not_finite_do_not_replace_the_last_good_state(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    good = model.weight.detach().clone()
    save(tmp_path, model, Progress(step=3))
    with torch.no_grad():
        model.weight[0, 1] = float("inf")
    with pytest.raises(
        CheckpointError,
        match="not finite at step 4 .model.weight for one.; .* stays the last good state",
    ):
        save(tmp_path, model, Progress(step=4))
    assert load(tmp_path, model).step == 3
    assert torch.equal(model.weight, good)


def test_weights_that_are_not_finite_are_no_best_ones(tmp_path: Path) -> None:
    """They predict some class, which may be the best score so far."""
    model = nn.Linear(2, 2)
    state = state_of(model, Progress(step=4))
    state.write_best(tmp_path, {"miou": 0.1})
    before = (tmp_path / run_state.BEST).read_bytes()
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    with pytest.raises(CheckpointError, match="not finite at step 5 .* nothing was saved yet"):
        state_of(model, Progress(step=5)).write_best(tmp_path, {"miou": 0.2})
    assert (tmp_path / run_state.BEST).read_bytes() == before


def test_a_classifier_of_before_was_tested_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    """It did not write down when, and would be tested and recorded once more."""
    model = nn.Linear(2, 2)
    save(tmp_path, model, Progress(step=6, best_step=6, best_error=0.5))
    assert load(tmp_path, model).validated == 6
    save(tmp_path, model, Progress(step=6))
    assert load(tmp_path, model).validated == -1
