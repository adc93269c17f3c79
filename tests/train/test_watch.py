"""A process whose run cannot go on ends, with a sentence that names who is missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from encnet_triton.train import distributed, watch
from encnet_triton.train.__main__ import main
from encnet_triton.train.watch import FAILED, FIRST, Watch

NOW = 1e6


def watching(*peers: dict[str, object], rank: int = 0) -> Watch:
    """As a rank that has heard so of all, itself included, a moment ago."""
    made = Watch(rank, len(peers), dist.HashStore(), None)
    made._heard = NOW
    for number, (known, changes) in enumerate(zip(made._peers, peers, strict=True)):
        known.heard, known.moved, known.limit = NOW, NOW - 200, 180.0
        known.host, known.doing = f"host{number}", "step 8"
        for name, value in changes.items():
            setattr(known, name, value)
    made._limit, made._own_moved = 180.0, NOW - 200
    return made


def test_as_long_as_any_rank_comes_further_none_ends() -> None:
    """One predicts the last images of a validation; the others wait for it."""
    assert watching({}, {"moved": NOW - 1})._verdict(NOW) is None


def test_each_image_of_an_evaluation_is_progress() -> None:
    made = watching({})
    before = made._marks
    assert list(made.each("abc", 3)) == ["a", "b", "c"] and made._marks == before + 3


def test_a_rank_that_saves_is_waited_for_as_long_as_for_the_first_step() -> None:
    made = watching({"limit": FIRST, "doing": "saving step 8"}, {})
    assert made._verdict(NOW) is None
    assert "for 1800 s" in str(made._verdict(NOW + FIRST))


def test_a_rank_that_comes_further_ends_for_no_store() -> None:
    """Collectives may work where the connection to the store does not."""
    made = watching({}, {})
    made._refused = NOW - 100
    made.mark("step 9")
    assert made._verdict(NOW) is None and made._verdict(NOW + 5) is None
    assert "is gone" in str(made._verdict(NOW + 9))


def test_a_job_that_was_suspended_goes_on() -> None:
    made = watching({"moved": NOW - 1}, {"moved": NOW - 1})
    made._forget(3600.0)
    assert made._verdict(NOW + 3600.0) is None
    assert made._verdict(NOW + 3600.0 + 180.0) is not None


@pytest.mark.parametrize(
    ("peers", "heard", "words"),
    [
        (({}, {"heard": NOW - 190, "limit": FIRST}, {}), NOW,
         "rank 1 on host host1 has said nothing"),
        (({}, {}, {"doing": "waiting for the data of step 8"}), NOW,
         "rank 2 on host host2 is at: waiting for the data of step 8"),
        (({}, {}), NOW, "all ranks are at: step 8"),
        (({}, {}), NOW - 185, "has not reached rank 0's host host0 for 185 s"),
    ],
)  # fmt: skip
def test_who_is_missing_is_named(peers: tuple, heard: float, words: str) -> None:
    made = watching(*peers, rank=0 if len(peers) > 2 else 1)
    made._heard = heard
    said = made._verdict(NOW)
    assert said is not None and words in said and "for 180 s (--timeout)" in said


def test_a_look_asks_a_store_for_all_ranks_at_once() -> None:
    """The store of hundreds of ranks would else have tens of thousands of requests a second."""

    class Counting:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.store = dist.HashStore()

        def __getattr__(self, name: str) -> object:
            self.asked.append(name)
            return getattr(self.store, name)

    store: Any = Counting()
    watches = [Watch(rank, 40, store, None) for rank in range(40)]
    for one in watches:
        one.mark("step 3")
        one._look(store)
    watches[0]._look(store)
    assert [peer.doing for peer in watches[0]._peers] == ["step 3"] * 40
    store.asked.clear()
    watches[0]._look(store)
    assert store.asked == ["set", "check", "multi_get"]


def test_a_store_that_refuses_is_gone() -> None:
    made = watching({}, {"moved": NOW})
    made._refused = NOW - 1
    assert made._verdict(NOW) is None
    assert "is gone" in str(made._verdict(NOW + 8))


def test_without_its_torchrun_a_process_saves_and_then_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    made = Watch(0, 1, None, agent=os.getppid())
    assert made._verdict(NOW) is None and not sent
    made._agent = 2**22 + 1
    assert made._verdict(NOW) is None and made._verdict(NOW + 1) is None
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert "its torchrun (process 4194305) is gone" in str(made._verdict(NOW + 9))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_hear_of_each_other_and_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_EVERY", 0.01)
    store = dist.HashStore()
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(Watch, "end", lambda self, *said: (ended.append(said), self._over.set()))
    zero, one = (Watch(rank, 2, store, None).start() for rank in range(2))
    zero.mark("step 7", 180.0)
    wait_for(lambda: one._peers[0].doing == "step 7" and one._peers[0].limit == 180.0)
    assert one.cause("the disk is full", lost=False) == "the disk is full"
    wait_for(lambda: ended)
    assert ended[0][0] == "ended because rank 1 failed: the disk is full"
    assert store.get(FAILED) == b"rank 1 failed: the disk is full"
    # Whose connection breaks afterwards says what broke it.
    assert "rank 1 failed: the disk is full" in zero.cause("Connection closed", lost=True)
    zero.stop()
    one.stop()


def test_a_failing_rank_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """NCCL's `destroy_process_group` does, and they for it."""

    def forbidden() -> None:
        raise AssertionError("waits")

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    made, cleaned = Watch(1, 2, dist.HashStore(), None), []
    made.before_end(lambda: cleaned.append(True))
    monkeypatch.setattr(distributed, "_watch", made)
    monkeypatch.setattr(distributed, "stop", forbidden)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="2"):
        main(["--recipe", "nothing"])
    said = capfd.readouterr().err
    assert said.startswith("[rank 1] error: unknown recipe 'nothing'")
    assert len(said.splitlines()) == 1 and cleaned
    assert made._store.get(FAILED).startswith(b"rank 1 failed: unknown recipe")
