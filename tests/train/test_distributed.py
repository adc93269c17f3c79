"""What the processes of a run agree on before it starts."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from encnet_triton.train import distributed, segmentation
from encnet_triton.train.recipe import build


def as_rank(rank: int, store: dist.Store, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, rank, 2)]))


def test_a_restarted_group_does_not_see_what_the_dead_one_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 of the dead group asked for a name and was killed before it took it."""
    shared = dist.HashStore()
    shared.set("asks/1", "dead")
    shared.set("address", "of a dead process")
    found: list[dist.Store] = []
    as_rank(0, shared, monkeypatch)
    thread = threading.Thread(target=lambda: found.append(distributed.fresh_store()))
    thread.start()
    assert shared.get("answer/dead")  # rank 0 is there, and waits for a rank 1 that lives
    as_rank(1, shared, monkeypatch)
    one = distributed.fresh_store()
    thread.join(60)
    (zero,) = found
    assert not one.check(["address"])
    zero.set("address", "of rank 0")
    assert one.get("address") == b"of rank 0"


def test_a_rank_that_never_appears_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(0, dist.HashStore(), monkeypatch)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(distributed.WorldError, match=r"ranks \[1\] did not appear within 0:00:00"):
        distributed.fresh_store()


def start_with(other: nn.Module, patch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose check sees ``other`` on rank 1."""
    theirs = distributed.digests(other)
    patch.setattr(distributed, "gather", lambda own: [own, theirs])
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_same_weights_in_another_layout_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = start_with(nn.Linear(1, 1), monkeypatch)
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    start_with(other, monkeypatch)
    distributed.check_same_weights(model)


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_weights_that_differ_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two elements exchanged: no sum over the tensor would tell."""
    model = start_with(nn.Linear(1, 1), monkeypatch)
    model[1].running_mean.copy_(torch.arange(4))
    other = copy.deepcopy(model)
    tensor = other.state_dict()[name]
    tensor[[0, 1]] = tensor[[1, 0]]
    start_with(other, monkeypatch)
    with pytest.raises(distributed.WorldError, match=rf"ranks \[1\] .* differs is {name}$"):
        distributed.check_same_weights(model)


def test_threads_and_workers_are_a_share_of_the_usable_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 12)
    monkeypatch.setattr(segmentation, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = build("folder_small", {})
    for ranks, threads, workers in ((1, 8, 11), (2, 6, 5), (64, 1, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        world = distributed.start("cpu")
        assert asked.pop() == threads
        on_gpus = replace(world, device=torch.device("cuda"))
        assert segmentation.worker_count(config, on_gpus) == workers
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed.start("cpu")
    assert not asked
