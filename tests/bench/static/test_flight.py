"""Bytes in flight, of listings as cuobjdump writes them."""

from __future__ import annotations

import pytest

from bench.static.flight import in_flight


def listing(*body: str) -> str:
    """A loop over these instructions, with one before and one behind it."""
    lines = ["LDG.E.128 R40, desc[UR4][R2.64]", *body, "BRA 0x10", "EXIT"]
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {one} ;" for i, one in enumerate(lines)
    )


USED_AT_ONCE = ("LDG.E.128 R4, desc[UR4][R2.64]", "STS.128 [R1], R4", "FADD R8, R8, R9")
USED_LATE = ("LDG.E.128 R4, desc[UR4][R2.64]", "FADD R8, R8, R9", "STS.128 [R1], R4")
AROUND = ("FFMA R10, R6, R9, R10", "@P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "BAR.SYNC 0x0")
COPY = ("DEPBAR.LE SB0, 0x0", "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR")
TWO_COPIES = ("DEPBAR.LE SB0, 0x1", *COPY[1:])


@pytest.mark.parametrize(
    ("body", "most", "mean"),
    [
        (USED_AT_ONCE, 16, 16 * 1 / 4),
        (USED_LATE, 16, 16 * 2 / 4),
        (AROUND, 16, 16 * 3 / 4),  # the branch, then up to the use in the next iteration
        (COPY, 16, 16 * 3 / 4),
        (TWO_COPIES, 32, 16 * 3 / 4 + 16),
        (("LDG.E.U16 R4, desc[UR4][R2.64]",), 0, 0.0),
    ],
)
def test_a_load_is_under_way_until_it_is_used(
    body: tuple[str, ...], most: int, mean: float
) -> None:
    assert in_flight(listing(*body)) == (most, mean)


def test_a_program_without_a_loop_has_nothing_in_flight() -> None:
    assert in_flight("        /*0000*/   LDG.E R4, desc[UR4][R2.64] ;") == (0, 0)
