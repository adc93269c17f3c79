"""The choice between configurations: what spills or does not fit is not used."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from encnet_triton.kernels import launch
from encnet_triton.kernels.launch import Config, Launch

BEST, SECOND, LAST = Config(64, 64, 8), Config(32, 64, 8), Config(32, 64, 4, fused=False)


class Kernel:
    """Stands for a kernel whose compiled form is known."""

    fn = SimpleNamespace(__name__="stand_in")

    def __init__(self, spills: int = 0, fits: bool = True) -> None:
        self.spills, self.fits, self.compiled = spills, fits, 0

    def warmup(self, **_: object) -> SimpleNamespace:
        self.compiled += 1
        if not self.fits:
            raise triton.runtime.OutOfResources(200_000, 101_376, "shared memory")
        return SimpleNamespace(run=None, n_spills=self.spills)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_chosen", {})


def choose(kernels: dict[Config, Kernel]) -> Config:
    def launches(config: Config) -> list[Launch]:
        return [Launch(kernels[config], (1,), {}, {}, config.num_warps)]

    return launch.choose("operator", list(kernels), launches)


def test_the_first_configuration_is_taken_if_it_compiles_well() -> None:
    kernels = {BEST: Kernel(), SECOND: Kernel(), LAST: Kernel()}
    assert choose(kernels) == BEST
    assert kernels[SECOND].compiled == 0


def test_spills_and_too_much_memory_lead_to_the_next_one_and_one_line_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels = {BEST: Kernel(fits=False), SECOND: Kernel(spills=3), LAST: Kernel(spills=9)}
    with caplog.at_level(logging.WARNING):
        assert choose(kernels) == LAST
        assert choose(kernels) == LAST
    assert [k.compiled for k in kernels.values()] == [1, 1, 0]
    first, second = (record.getMessage() for record in caplog.records)
    assert "does not fit" in first and "'fused n32 c64 w8' in place of 'fused n64 c64 w8'" in first
    assert "spills 12 bytes" in second and triton.__version__ in second


def test_float64_and_cpu_tensors_take_the_pytorch_code() -> None:
    assert not launch.takes_triton(torch.zeros(1, dtype=torch.float64))
    assert not launch.takes_triton(torch.zeros(1))


def test_nothing_is_launched_for_an_empty_grid() -> None:
    launched: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **_: launched.append(grid)

    launches = [Launch(Recorded(), grid, {}, {}, 4) for grid in ((3,), (0,), (2, 0), (2, 2))]
    launch.run_all(launches, torch.device("cpu"))
    assert launched == [(3,), (2, 2)]


def test_outputs_are_those_of_the_configuration_that_ran() -> None:
    kernels = {BEST: Kernel(spills=1), LAST: Kernel()}
    outputs = launch.run_chosen(
        "operator",
        list(kernels),
        lambda config: ([Launch(kernels[config], (0,), {}, {}, 4)], str(config)),
        torch.device("cpu"),
    )
    assert outputs == str(LAST)
