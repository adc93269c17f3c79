"""How many bytes a program has requested from global memory and not used yet, from machine code.

A load is in flight from its instruction to the first one that names a register it writes, an
asynchronous copy until the program waits for its group. Both figures are for the largest loop, in
steady state: the maximum, which is what one wait for memory brings, and the mean over the
instructions, which is close to it where waits are hidden. Loads by tensor descriptor do not show
their size in the code and are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINE = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)\s*(?P<rest>.*?);",
    re.M,
)
_WIDTHS = {"8": 1, "16": 2, "64": 8, "128": 16, "256": 32}
_FEWEST = 4  # bytes; narrower loads are masks and sizes


@dataclass
class _Load:
    """Bytes per thread, and what ends it: one of these registers, or the wait for its group."""

    bytes: int
    registers: frozenset[str] = frozenset()
    group: int | None = None


@dataclass
class _State:
    """What is in flight at an instruction."""

    loads: list[_Load] = field(default_factory=list)
    groups: int = 0


def program(disassembly: str) -> list[tuple[int, str, str]]:
    """Address, name with modifiers, and operands of each instruction."""
    return [(int(m["at"], 16), m["op"], m["rest"]) for m in _LINE.finditer(disassembly)]


def width(modifiers: list[str]) -> int:
    """Bytes per thread of an access with these modifiers, such as 2 for U16."""
    return next((_WIDTHS[m.lstrip("US")] for m in modifiers if m.lstrip("US") in _WIDTHS), 4)


def in_flight(disassembly: str) -> tuple[int, float]:
    """Bytes per thread in the largest loop, maximum and mean; zeros without a loop."""
    body = _largest_loop(program(disassembly))
    state = _State()
    counted: list[int] = []
    for _ in range(2):
        counted.clear()
        for _, op, rest in body:
            _step(state, op, rest)
            counted.append(sum(load.bytes for load in state.loads))
    return (max(counted), sum(counted) / len(counted)) if body else (0, 0.0)


def _largest_loop(whole: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    loops = [(0, 0)]
    for at, op, rest in whole:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [one for one in whole if first <= one[0] <= last] if last else []


def _step(state: _State, op: str, rest: str) -> None:
    """Update the state by one instruction: loads that it ends, and the one that it starts."""
    name, *modifiers = op.split(".")
    named = set(re.findall(r"\bR\d+\b", rest))
    if name == "DEPBAR" and (left := re.search(r"0x([0-9a-f]+)", rest)):
        done = state.groups - int(left[1], 16)
        state.loads = [one for one in state.loads if one.group is None or one.group >= done]
    state.loads = [one for one in state.loads if not one.registers & named]
    bytes_ = width(modifiers)
    if name == "LDG" and bytes_ >= _FEWEST and (to := re.match(r"(?:\w+, )?R(\d+)\b", rest)):
        first = int(to[1])
        written = frozenset(f"R{first + i}" for i in range(bytes_ // 4))
        state.loads.append(_Load(bytes_, written))
    elif name == "LDGSTS":
        state.loads.append(_Load(bytes_, group=state.groups))
    elif name == "LDGDEPBAR":
        state.groups += 1
