"""Damaged files: what disks, networks and strangers do to bytes, from a seed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

_EXTREMES = tuple(
    value.to_bytes(size, order)
    for value in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1)
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    if value < 256**size
)


def seeds(seconds: float) -> Iterator[int]:
    """0, 1, 2, ... for about so long; at least ten."""
    end = time.monotonic() + seconds
    seed = 0
    while seed < 10 or time.monotonic() < end:
        yield seed
        seed += 1


def mutated(content: bytes, rng: np.random.Generator, where: tuple[int, int] = (0, 0)) -> bytes:
    """One to four changes: bits, bytes, lengths, cuts, pieces left out, twice or swapped.

    Args:
        content: not empty.
        where: most changes begin within so many bytes of the start and of the end, where the
            structure is; anywhere if both are 0.
    """
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        place = _place(len(data), rng, where)
        length = int(rng.integers(1, 1 + min(64, len(data) - place)))
        match int(rng.integers(7)):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place] = int(rng.integers(256))
            case 2:
                extreme = _EXTREMES[int(rng.integers(len(_EXTREMES)))]
                data[place : place + len(extreme)] = extreme
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                other = _place(len(data), rng, where)
                data[place:place] = data[other : other + length]
            case 6:
                del data[max(1, place) :]
        if not data:
            return b""
    return bytes(data)


def _place(size: int, rng: np.random.Generator, where: tuple[int, int]) -> int:
    start, end = (min(edge, size) for edge in where)
    if start + end == 0 or rng.random() < 0.1:
        return int(rng.integers(size))
    place = int(rng.integers(start + end))
    return place if place < start else size - 1 - (place - start)
