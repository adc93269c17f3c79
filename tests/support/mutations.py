"""What disks, networks and strangers do to bytes and to documents, from a seed."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 10**12, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-300, 1e300)
TEXTS = ("", "x", "é", "\ud800", "[b]")
ODD = (*NUMBERS, *TEXTS, None, True, False, [], [1], [[]], {}, {"": 0})

WORDS = (
    "0", "1", "2", "3", "4", "7", "32", "48", "-1", "-7", "1.5", "0.3", "1e400", "-0.0", "1e-320",
    "nan", "inf", "-inf", "1_0", "0x10", " 3 ", "", "none", "None", "true", "off", "auto", "x", "é",
    "٣", "a/b", "..", "[b]", "\udcff", "1,2", "3x4", "0x0", "48x64", "480x", "2,1", "1,2,3", ",",
    "[1]", "{}", "=", "a=b", "voc=", "long", "image", "cosine", "balanced", "paper", "released",
    "channel", "fcn", "psp", "encnet", "small", "demo", "cpu", "on", "folder", "scenes", "maybe",
    "999999999999", str(2**63), str(2**64), "9" * 400, "9" * 5000,
)  # fmt: skip
"""Values on a command line, of some option or of none."""

_EXTREMES = tuple(
    value.to_bytes(size, order)
    for value in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1)
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    if value < 256**size
)


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
