"""What the processes of a run agree on before it starts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from encnet_triton.train import distributed


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
