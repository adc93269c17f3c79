"""The kernels of batch_norm_act, compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled import Row, faults, needs_triton, select

pytestmark = [needs_triton, pytest.mark.slow]

# Tensors of the layer's size; parameters and sums are small.
LARGE = ("X", "R", "Y", "dY", "Other", "dX", "dR")

each_call = pytest.mark.parametrize("direction", ["forward", "backward"])


def of_calls(rows: list[Row], direction: str) -> list[Row]:
    return select(rows, "batch_norm_act", direction, "bfloat16")


@each_call
def test_defaults_fit_and_do_not_spill(rows: list[Row], direction: str) -> None:
    assert not faults(of_calls(rows, direction))


@each_call
def test_large_tensors_are_accessed_16_bytes_wide(rows: list[Row], direction: str) -> None:
    widths = {
        (row["config"], name): set(map(int, counted))
        for row in of_calls(rows, direction)
        for name, counted in row["accesses"].items()
        if name in LARGE
    }
    assert len(widths) >= 8
    assert set.union(*widths.values()) == {16}, widths


@each_call
def test_enough_warps_are_resident_to_hide_memory(rows: list[Row], direction: str) -> None:
    """16 warps with two loads of 16 bytes in flight per thread are 16 KiB per multiprocessor."""
    few = {
        row["config"]: row["blocks_per_sm"]
        for row in of_calls(rows, direction)
        if row["blocks_per_sm"] * row["num_warps"] < 16
    }
    assert not few
