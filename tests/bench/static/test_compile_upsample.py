"""The kernels of the upsampling operators, compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled import Row, faults, needs_triton, select

pytestmark = [needs_triton, pytest.mark.slow]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defaults_fit_and_do_not_spill(rows: list[Row], direction: str) -> None:
    assert not faults(select(rows, "upsample", direction, "bfloat16"))


def test_the_gradient_uses_the_matrix_unit_or_cells(rows: list[Row]) -> None:
    """With 16 warps; with 8 where weights, smoothing and a loss per pixel come together."""
    chosen = select(rows, "upsample", "backward", "bfloat16")
    assert any(row["config"].startswith("cells_kernel") for row in chosen)
    for row in chosen:
        by_cells = row["config"].startswith("cells_kernel")
        assert row["mma"] or by_cells, row["config"]
        assert row["blocks_per_sm"] * row["num_warps"] >= (16 if by_cells else 8), row["config"]
