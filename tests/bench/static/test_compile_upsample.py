"""The kernels of the upsampling operators, compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled import ARCHS, Row, compiled, faults, needs_triton, select

pytestmark = [needs_triton, pytest.mark.slow]


@pytest.fixture(scope="session", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="session")
def rows(arch: int, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    which = ("--op", "upsample", "--dtype", "bfloat16", "--quick")
    return compiled(tmp_path_factory, *which, "--arch", str(arch))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defaults_fit_and_do_not_spill(rows: list[Row], direction: str, arch: int) -> None:
    chosen = select(rows, direction, "bfloat16", arch)
    assert len(chosen) >= 4 and not faults(chosen), f"sm_{arch}"


def test_the_gradient_uses_the_matrix_unit_and_16_warps(rows: list[Row], arch: int) -> None:
    for row in select(rows, "backward", "bfloat16", arch):
        assert row["mma"], row["config"]
    plain = select(rows, "backward", "bfloat16", arch)[0]
    assert plain["blocks_per_sm"] * plain["num_warps"] >= 16
