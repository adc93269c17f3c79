"""Damaged checkpoints and states of runs: the right values, or one sentence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encnet_triton.models import create_model
from encnet_triton.train import run_state
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.distributed import World
from encnet_triton.train.recipe import build
from encnet_triton.train.run_state import Progress
from encnet_triton.weights.checkpoint import CheckpointError, load_model, read
from tests.support.checkpoints import INFO, OPTIONS, write_unchecked
from tests.support.mutations import altered, mutated

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
TRAINING_SET = {"images": 8, "names": "abc"}


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def config() -> Config:
    return build("scenes", {})


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """The state of a run after one step."""
    folder = tmp_path_factory.mktemp("run")
    model = create_model(**OPTIONS)
    optimizer = optimizer_of(model)
    model(torch.zeros(2, 3, 32, 32)).logits.sum().backward()
    optimizer.step()
    progress = Progress(step=1)
    state = run_state.copy_state(WORLD, model, optimizer, INFO, progress, config, TRAINING_SET)
    assert state is not None
    state.write(folder)
    return folder / run_state.LAST


def open_all(path: Path, config: Config) -> bool:
    """Open a file as a model and as the state of a run; whether both were taken."""
    taken = True
    try:
        model, _ = load_model(path)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        taken = False
    model = create_model(**OPTIONS)
    try:
        run_state.load(path, WORLD, model, optimizer_of(model), config, INFO, TRAINING_SET)
    except (CheckpointError, ConfigError) as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        taken = False
    return taken


def test_damaged_bytes(seeds: Iterator[int], state: Path, tmp_path: Path, config: Config) -> None:
    """Checksums find what the format does not."""
    content, (right, metadata) = state.read_bytes(), read(state)
    path = tmp_path / "x.safetensors"
    for seed in seeds:
        path.write_bytes(mutated(content, np.random.default_rng(seed)))
        if open_all(path, config):
            found, text = read(path)
            assert text == metadata and found.keys() == right.keys(), seed
            assert all(torch.equal(found[name], right[name]) for name in right), seed


def test_changed_metadata(
    seeds: Iterator[int], state: Path, tmp_path: Path, config: Config
) -> None:
    """In a file without checksums, as old files are."""
    tensors, metadata = read(state)
    path = tmp_path / "x.safetensors"
    for seed in seeds:
        changed = altered(metadata, random.Random(seed))
        write_unchecked(path, tensors, changed)
        open_all(path, config)


def test_changed_tensors(seeds: Iterator[int], state: Path, tmp_path: Path, config: Config) -> None:
    tensors, metadata = read(state)
    path = tmp_path / "x.safetensors"
    for seed in seeds:
        rng = random.Random(seed)
        changed = dict(tensors)
        name = rng.choice([n for n in tensors if not n.startswith("random.")] + ["random.0.cpu"])
        tensor = changed.pop(name)
        for new in other(name, tensor, rng):
            changed |= new
        write_unchecked(path, changed, metadata)
        open_all(path, config)


def other(name: str, tensor: Tensor, rng: random.Random) -> Iterator[dict[str, Tensor]]:
    """Something in a tensor's place: nothing, another name, kind, shape or value."""
    what = rng.randrange(7)
    if what == 1:
        yield {f"{name}x": tensor}
    elif what == 2:
        kinds = (torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
        yield {name: tensor.to(rng.choice((*kinds, torch.bool, torch.uint8)))}
    elif what == 3:
        yield {name: tensor.flatten()[: rng.randrange(3)].clone()}
    elif what == 4:
        yield {name: tensor[None].clone()}
    elif what == 5 and tensor.is_floating_point() and tensor.numel():
        changed = tensor.clone()
        changed.view(-1)[-1] = rng.choice((float("nan"), float("inf"), -1e38))
        yield {name: changed}
    elif what == 6:
        yield {name: torch.zeros_like(tensor)}
