"""What disks, networks and strangers do to bytes and to documents, from a seed."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 10**12, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-300, 1e300)
TEXTS = ("", "x", "é", "\ud800", "[b]")
ODD = (*NUMBERS, *TEXTS, None, True, False, [], [1], [[]], {}, {"": 0})

_EXTREMES = tuple(
    value.to_bytes(size, order)
    for value in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1)
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    if value < 256**size
)


def seeds(seconds: float, least: int = 10) -> Iterator[int]:
    """Seeds for about so long, at least so many; from ENCNET_FUZZ_SEED on, that of a failure."""
    end = time.monotonic() + seconds
    first = int(os.environ.get("ENCNET_FUZZ_SEED", "0"))
    for seed in itertools.count(first):
        if seed - first >= least and time.monotonic() > end:
            return
        print(f"seed {seed}")  # pytest shows it where the case fails
        yield seed


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


def altered(document: Any, rng: random.Random) -> Any:
    """A JSON document in which one place, anywhere, was changed, left out or doubled."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here))
        for key in keys:
            places.append((here, key))
            if isinstance(here[key], dict | list):
                waiting.append(here[key])
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    here, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        del here[key]
    elif what == 1 and isinstance(here, dict):
        here[f"{key}2"] = here[key]
    elif what == 2 and isinstance(here[key], int | float) and not isinstance(here[key], bool):
        here[key] = rng.choice([-here[key], here[key] + 1, here[key] * 1000, float("nan")])
    else:
        here[key] = rng.choice(ODD)
    return document


def _place(size: int, rng: np.random.Generator, where: tuple[int, int]) -> int:
    start, end = (min(edge, size) for edge in where)
    if start + end == 0 or rng.random() < 0.1:
        return int(rng.integers(size))
    place = int(rng.integers(start + end))
    return place if place < start else size - 1 - (place - start)
