"""Batches reach the device whole, as bytes."""

from __future__ import annotations

import pytest
import torch

from encnet_triton.data.loader import Batch
from encnet_triton.train.transfer import Transfer


def batch(seed: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 9, (2, size, size), dtype=torch.uint8, generator=generator)
    return Batch(
        images.contiguous(memory_format=torch.channels_last), labels, ["a", "b"], torch.rand(2, 4)
    )


def test_on_a_cpu_nothing_is_copied() -> None:
    given = [batch(0), batch(1)]
    moved = Transfer(torch.device("cpu"))(given)
    for a, b in zip(moved, given, strict=True):
        assert a.images is b.images and a.labels is b.labels and a.names == b.names


@pytest.mark.gpu
def test_memory_is_not_given_away_while_it_is_read() -> None:
    device = torch.device("cuda")
    transfer = Transfer(device)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    given = [batch(seed, 512) for seed in range(8)]
    for one in given:
        pinned = [t.pin_memory() for t in (one.images, one.labels, one.draws)]
        (moved,) = transfer([Batch(*pinned[:2], one.names, pinned[2])])
        for _ in range(4):
            busy = (busy @ busy).clamp_(-1, 1)
        sums.append(moved.images.sum(dtype=torch.int64))
        assert moved.images.is_contiguous(memory_format=torch.channels_last)
        assert moved.images.dtype == torch.uint8
        del moved
    for found, one in zip(sums, given, strict=True):
        assert int(found) == int(one.images.sum(dtype=torch.int64))
