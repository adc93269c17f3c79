"""Configurations that were the fastest when measured: one file per device, tuned/<device>.json.

`python -m bench tune` makes it. The file of a device is read when a pass first runs there. It only
names configurations: a plan says which of them exist, and the launcher checks their programs as it
checks those of its own list. If anything is wrong with a file, plans choose as they do without one.
With ENCNET_TUNED=0 in the environment no file is read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

import torch

logger = logging.getLogger(__name__)

SCHEMA = 1
FOLDER = Path(__file__).parent / "tuned"
# How far away a measured shape may be: the ratios of all sizes together, in powers of two.
_FAR = 3.0

Config = TypeVar("Config")


@dataclass(frozen=True)
class Problem:
    """A pass of an operator on tensors of some sizes.

    Attributes:
        name: operator and pass, such as "encode forward".
        dtype: of x, such as "bfloat16".
        options: what its programs are compiled for; a measurement for others does not apply.
        sizes: numbers that its programs are given; a measurement for near ones applies.
    """

    name: str
    dtype: str
    options: Mapping[str, Any]
    sizes: Mapping[str, int]

    def distance(self, other: Problem) -> float:
        """0 between equal ones, infinite if a measurement of one does not apply to the other."""
        if (self.name, self.dtype) != (other.name, other.dtype):
            return math.inf
        if self.options != other.options or self.sizes.keys() != other.sizes.keys():
            return math.inf
        pairs = ((max(1, n), max(1, other.sizes[key])) for key, n in self.sizes.items())
        return sum(abs(math.log2(a) - math.log2(b)) for a, b in pairs)


def problem_of(name: str, dtype: torch.dtype, options: dict[str, Any], **sizes: int) -> Problem:
    """A problem of a dtype of torch."""
    return Problem(name, str(dtype).replace("torch.", ""), options, sizes)


@dataclass(frozen=True)
class Entry:
    """A problem and the name of the configuration that was the fastest."""

    problem: Problem
    config: str


@dataclass(frozen=True)
class Tuned:
    """What a file says: for which device, made with which Triton."""

    device: str
    triton: str
    entries: Sequence[Entry]


def file_name(device: str) -> str:
    """Of the file of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(file: Path) -> Tuned:
    """A file as `bench tune` makes it.

    Raises:
        ValueError: it cannot be read or has other contents; the message is a sentence.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{file} is not of schema {SCHEMA}")
    entries = found.get("entries")
    named = all(isinstance(found.get(key), str) for key in ("device", "triton"))
    if not named or not isinstance(entries, list):
        raise ValueError(f"{file} must name device, triton and entries")
    made = [_entry(one) for one in entries]
    if None in made:
        raise ValueError(f"{file}: entry {made.index(None) + 1} is none of a measured problem")
    return Tuned(found["device"], found["triton"], [one for one in made if one is not None])


def _entry(found: Any) -> Optional[Entry]:
    if not isinstance(found, dict):
        return None
    texts = [found.get(key) for key in ("name", "dtype", "config")]
    options, sizes = found.get("options"), found.get("sizes")
    if not all(isinstance(text, str) for text in texts):
        return None
    if not isinstance(options, dict) or not isinstance(sizes, dict):
        return None
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        return None
    return Entry(Problem(found["name"], found["dtype"], options, sizes), found["config"])


# By device name; and what `launch.trial` uses on every device instead, or None.
_tables: dict[str, Sequence[Entry]] = {}
tried: Optional[Sequence[Entry]] = None


def preferred(
    asked: Problem, candidates: Callable[[], Iterable[Config]], device: torch.device
) -> Optional[Config]:
    """The candidate that was the fastest in the nearest problem measured, or None."""
    entries = _entries(device) if tried is None else tried
    measured = [(asked.distance(entry.problem), entry.config) for entry in entries]
    near = sorted((pair for pair in measured if pair[0] <= _FAR), key=lambda pair: pair[0])
    names = {str(config): config for config in candidates()} if near else {}
    for distance, name in near:
        if name in names:
            return names[name]
        if distance == 0:
            logger.warning(
                "'%s', measured for %s on %s, is no configuration of it and is not used",
                name,
                asked.name,
                device,
            )
    return None


def _entries(device: torch.device) -> Sequence[Entry]:
    """The entries of this device's file; read once, and an error is logged once."""
    if device.type != "cuda" or os.environ.get("ENCNET_TUNED") == "0":
        return ()
    name = torch.cuda.get_device_name(device)
    if name not in _tables:
        _tables[name] = _of_device(name)
    return _tables[name]


def _of_device(name: str) -> Sequence[Entry]:
    file = FOLDER / file_name(name)
    if not os.path.exists(file):
        return ()
    import triton  # not at the top: not every platform has it

    try:
        found = read(file)
    except ValueError as error:
        logger.warning("%s; configurations are chosen without it", error)
        return ()
    if (found.device, found.triton) != (name, triton.__version__):
        logger.warning(
            "%s was measured on %s with Triton %s, and this is %s with Triton %s; it is not used",
            file,
            found.device,
            found.triton,
            name,
            triton.__version__,
        )
        return ()
    logger.info("%s: %d measured configurations are preferred", file, len(found.entries))
    return found.entries
