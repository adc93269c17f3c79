"""The kernels of batch_norm_act, compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled import ARCHS, Row, compiled, faults, needs_triton, select

pytestmark = [needs_triton, pytest.mark.slow]

# Tensors of the layer's size; parameters and sums are small.
LARGE = ("X", "R", "Y", "dY", "Other", "dX", "dR")


@pytest.fixture(scope="session", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="session")
def rows(arch: int, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    which = ("--op", "batch_norm_act", "--dtype", "bfloat16", "--quick")
    return compiled(tmp_path_factory, *which, "--arch", str(arch))


each_call = pytest.mark.parametrize("direction", ["forward", "backward"])


@each_call
def test_defaults_fit_and_do_not_spill(rows: list[Row], direction: str, arch: int) -> None:
    assert not faults(select(rows, direction, "bfloat16", arch)), f"sm_{arch}"


@each_call
def test_large_tensors_are_accessed_16_bytes_wide(
    rows: list[Row], direction: str, arch: int
) -> None:
    widths = {
        (row["config"], name): set(map(int, counted))
        for row in select(rows, direction, "bfloat16", arch)
        for name, counted in row["accesses"].items()
        if name in LARGE
    }
    assert len(widths) >= 10
    assert set.union(*widths.values()) == {16}, f"sm_{arch}: {widths}"


@each_call
def test_enough_warps_are_resident_to_hide_memory(
    rows: list[Row], direction: str, arch: int
) -> None:
    """16 warps with two loads of 16 bytes in flight per thread are 16 KiB per multiprocessor."""
    few = {
        row["config"]: row["blocks_per_sm"]
        for row in select(rows, direction, "bfloat16", arch)
        if row["blocks_per_sm"] * row["num_warps"] < 16
    }
    assert not few, f"sm_{arch}"
