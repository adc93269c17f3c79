"""Find races between the programs of a launch, from the order that their atomics establish.

A program's accesses come after another's only if it acquired, by an atomic operation, what the
other released at the same address; all others may happen at any time. It does not matter in which
order the programs really ran. Atomic operations never race with one another, but they do with loads
and stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["load", "store", "atomic"]
Integers = NDArray[np.int64]
Programs = NDArray[np.int32]

_SEVERAL = -1
_CONFLICTS: dict[Kind, tuple[Kind, ...]] = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}


class RaceDetector:
    """The program that last did something of a kind to each unit of a launch's memory.

    A unit is the smallest element size of the arguments; programs are numbered from 1. A program's
    clock counts its releases. Of several programs that loaded a unit in no defined order, only the
    fact that they were several is kept: any store there is then a race, even by a program that
    comes after all of them.

    Args:
        spans: first and last byte (exclusive) of each argument; they may overlap.
        unit: bytes.
        programs: how many there are.
    """

    def __init__(self, spans: Iterable[tuple[int, int]], unit: int, programs: int) -> None:
        self._unit = unit
        joined: list[list[int]] = []
        for start, end in sorted(spans):
            if joined and start < joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        self._starts = np.array([start for start, _ in joined], np.int64)
        lengths = [(end - start) // unit for start, end in joined]
        self._offsets = np.cumsum([0, *lengths])
        # By kind: the program, and its clock at the time.
        self._last: dict[Kind, tuple[Programs, Programs]] = {}
        self._clock = np.ones(programs + 1, np.int32)
        # By program, and by address: the clock of every program up to which its accesses are known.
        self._known: dict[int, Programs] = {}
        self._released: dict[int, Programs] = {}

    def acquire(self, address: int, program: int) -> None:
        """From here on the program comes after all that was released at the address."""
        if address in self._released:
            known = self._known.setdefault(program, np.zeros_like(self._clock))
            np.maximum(known, self._released[address], out=known)

    def release(self, address: int, program: int) -> None:
        """What the program did and knows can be acquired at the address."""
        released = self._released.setdefault(address, np.zeros_like(self._clock))
        if program in self._known:
            np.maximum(released, self._known[program], out=released)
        released[program] = self._clock[program]
        self._clock[program] += 1

    def check(
        self, kind: Kind, addresses: Integers, size: int, program: int
    ) -> tuple[int, int] | None:
        """Record an access; returns (address, the other program or -1) if it races."""
        span = np.searchsorted(self._starts, addresses, side="right") - 1
        units = (addresses - self._starts[span]) // self._unit + self._offsets[span]
        units = (units[:, None] + np.arange(size // self._unit)).ravel()
        if kind not in self._last:
            all_units = int(self._offsets[-1])
            self._last[kind] = np.zeros(all_units, np.int32), np.zeros(all_units, np.int32)
        unordered = {
            former: self._unordered(programs[units], clock[units], program)
            for former, (programs, clock) in self._last.items()
        }
        other = np.zeros(len(units), np.int32)
        for former in _CONFLICTS[kind]:
            if former in unordered:
                other = np.where(other == 0, unordered[former], other)
        programs, clock = self._last[kind]
        programs[units] = np.where(unordered[kind] == 0, program, _SEVERAL)
        clock[units] = self._clock[program]
        if not other.any():
            return None
        first = int(np.flatnonzero(other)[0])
        return int(addresses[first // (size // self._unit)]), int(other[first])

    def _unordered(self, programs: Programs, clock: Programs, program: int) -> Programs:
        """These programs, with 0 for this one and for those whose access comes before."""
        others = np.where(programs != program, programs, 0)
        if program not in self._known:
            return others
        before = (others > 0) & (self._known[program][others] >= clock)
        return np.where(before, 0, others)
