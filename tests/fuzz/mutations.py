"""Values and damage that no one asked for."""

from __future__ import annotations

import copy
import random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 10**12, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-300, 1e300)
TEXTS = ("", "x", "é", "\ud800", "[b]")
ODD = (*NUMBERS, *TEXTS, None, True, False, [], [1], [[]], {}, {"": 0})


def mutated(document: Any, rng: random.Random) -> Any:
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


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes that were cut short, flipped, overwritten, lost or added."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 5))):
        place = rng.randrange(len(changed)) if changed else 0
        size = rng.choice((1, 2, 8, 100))
        what = rng.randrange(5)
        if what == 0:
            del changed[place:]
        elif what == 1 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif what == 2:
            changed[place : place + size] = rng.randbytes(size)
        elif what == 3:
            del changed[place : place + size]
        else:
            changed[place:place] = rng.randbytes(size)
    return bytes(changed)
