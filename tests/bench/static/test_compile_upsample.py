"""The kernels of the upsampling operators, compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled import Row, faults, needs_triton, select

pytestmark = [needs_triton, pytest.mark.slow]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defaults_fit_and_do_not_spill(rows: list[Row], direction: str) -> None:
    assert not faults(select(rows, "upsample", direction, "bfloat16"))


def test_the_gradient_uses_the_matrix_unit_and_16_warps(rows: list[Row]) -> None:
    """8 warps where weights, smoothing and a loss per pixel come together."""
    chosen = select(rows, "upsample", "backward", "bfloat16")
    for row in chosen:
        assert row["mma"], row["config"]
        assert row["blocks_per_sm"] * row["num_warps"] >= 8
    if len(chosen) > 1:  # every launch: first that without options
        assert chosen[0]["blocks_per_sm"] * chosen[0]["num_warps"] >= 16
