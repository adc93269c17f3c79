"""Fixtures for operator tests: memory that shows what nobody wrote, and the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from encnet_triton.kernels.runtime import launch, tuned


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element an operator forgot to write is seen."""
    # Some of PyTorch's own operators, to compare with, have no deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """The error against float64 is at most twice that of PyTorch's own formula in that dtype.

    PyTorch's own error may be next to nothing by luck, another on every processor. So some units
    in the last place are allowed besides: of the largest value, and where ``terms`` is given (the
    sum of the absolute values of the terms, which may cancel) float32's of that.
    """

    def check(
        name: str, ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor | None = None
    ) -> None:
        error = (ours.double() - exact).abs().max().item()
        own = (plain.to(ours.dtype).double() - exact).abs().max().item()
        floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
        if terms is not None:
            floor += 4 * torch.finfo(torch.float32).eps * terms.max().item()
        assert error <= 2 * own + floor, (
            f"{name}: error {error:.3g}, PyTorch's own {own:.3g}, floor {floor:.3g}"
        )

    return check


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests give plans other lists of configurations, which neither launches of others nor what was
    measured on this device must decide.
    """
    launch.forget()
    monkeypatch.setattr(tuned, "tried", ())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched since."""
    names: list[str] = []
    original = launch.run_all

    def run_all(launches: Any) -> None:
        names.extend(one.name for one in launches)
        original(launches)

    monkeypatch.setattr(launch, "run_all", run_all)
    return names
