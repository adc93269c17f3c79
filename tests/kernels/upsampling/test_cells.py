"""The backward pass by cells, interpreted or on a GPU, against float64, and where it is chosen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.static.interpreter import Watch
from encnet_triton.kernels import upsample_cross_entropy
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.launch import Machine
from encnet_triton.kernels.upsampling import plan
from encnet_triton.kernels.upsampling.axis import Axis, places_of_cell
from tests.support import upsampling

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def launched(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """With cells for any number of classes."""
    # Fewer cells, so that small maps have several strips; a program's classes are two parts.
    for name, value in {"_OF_CLASS": math.inf, "_CELLS": 4, "_PARTS": (2,)}.items():
        monkeypatch.setattr(plan, name, value)
    return launched


def example(
    shape: tuple[int, ...], dtype: torch.dtype, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """A fifth of the labels ignored."""
    return upsampling.example(shape, dtype, spread, ignored=0.2)


def gradient(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, **options: Any
) -> Tensor:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    return torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.37))[0]


def check(
    logits: Tensor, target: Tensor, assert_accurate: Callable[..., None], **options: Any
) -> None:
    with Watch(order="reverse") if launch.interpreting() else contextlib.nullcontext():
        ours = gradient(upsample_cross_entropy, logits, target, **options)
    assert ours.dtype == logits.dtype and ours.stride() == logits.stride()
    plain = gradient(upsampling.formula, logits, target, **options)
    exact = gradient(upsampling.formula, logits.double(), target, **options)
    assert_accurate("gradient", ours, plain, exact)


@pytest.mark.parametrize(
    ("shape", "dtype", "align_corners"),
    [
        pytest.param((1, 5, 2, 5, 4, 11), BF16, False, id="two strips"),
        pytest.param((2, 40, 3, 2, 6, 4), FP16, True, id="two parts, few rows of three"),
        pytest.param((1, 70, 2, 2, 3, 3), BF16, True, id="two programs of classes"),
        pytest.param((1, 3, 1, 1, 2, 10), FP16, False, id="one low pixel"),
        pytest.param((1, 4, 2, 3, 2, 3), BF16, True, id="equal size"),
    ],
)
def test_error_is_at_most_twice_that_of_torch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    align_corners: bool,
    assert_accurate: Callable[..., None],
    launched: list[str],
) -> None:
    logits, target = example(shape, dtype)
    check(logits, target, assert_accurate, align_corners=align_corners, reduction="sum")
    assert launched[-1] == "cells_kernel"


def test_neighbours_far_apart(assert_accurate: Callable[..., None], launched: list[str]) -> None:
    """Factors from pixel to pixel leave the range of float32."""
    logits, target = example((1, 5, 2, 2, 3, 5), FP16, 300.0)
    check(logits, target, assert_accurate, reduction="mean")
    assert launched[-1] == "cells_kernel"


def test_labels_of_eight_bytes(assert_accurate: Callable[..., None], launched: list[str]) -> None:
    """The ignored label is a class; all of an image are."""
    logits, target = example((2, 35, 2, 2, 3, 4), FP16)
    target = target.long()
    target[target == 255] = 33
    target[1] = 33
    check(logits, target, assert_accurate, reduction="mean", ignore_index=33)
    assert launched[-1] == "cells_kernel"


def _asked(
    classes: int = 150,
    size: int = 480,
    dtype: torch.dtype = BF16,
    grad: tuple[int, ...] = (),
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> plan.Backward:
    """A backward pass for a map of 60 x 60."""
    logits = torch.empty(2, classes, 60, 60, dtype=dtype, device="meta")
    target = torch.empty(2, size, size, dtype=torch.uint8, device="meta")
    lse, upstream = (torch.empty(shape, device="meta") for shape in (target.shape, grad))
    prepared = plan.options(weight, 255, True, smoothing)
    return plan.Backward(upstream, plan.channels_last(logits), target, lse, prepared)


def _kernel(**options: Any) -> str:
    """The kernel that is tried first."""
    asked, machine = _asked(**options), Machine(90, 132)
    launches, _ = asked.launches(machine, asked.configs(machine)[0])
    return launches[0].name


def test_where_it_is_chosen() -> None:
    """Half precision, many classes, not too large a ratio, and nothing but labels in the loss."""
    assert _kernel() == _kernel(dtype=FP16) == _kernel(classes=171) == "cells_kernel"
    others = [
        _kernel(dtype=FP32),
        _kernel(classes=64),
        _kernel(size=720),
        _kernel(size=50),
        _kernel(smoothing=0.1),
        _kernel(weight=torch.empty(150, device="meta")),
        _kernel(grad=(2, 480, 480)),
    ]
    assert set(others) == {"backward_kernel"}


@pytest.mark.parametrize(
    ("classes", "arch", "align_corners", "blocks"),
    [
        (150, 90, True, [160, 96]),
        (150, 90, False, [96]),  # with five parts it keeps values in local memory
        (150, 80, True, [96]),
        (171, 90, True, [96, 128]),
        (128, 100, True, [128, 160]),
        (90, 89, True, [96, 128, 160]),
        (64, 90, True, []),
    ],
)
def test_the_cheapest_division_of_the_classes_comes_first(
    classes: int, arch: int, align_corners: bool, blocks: list[int]
) -> None:
    logits = torch.empty(1, classes, 60, 60, dtype=BF16, device="meta")
    found = plan.cells_configs(logits, 480, 480, align_corners, arch)
    assert [config.block_c for config in found] == blocks


def test_a_measurement_with_weights_is_none_without() -> None:
    """Cells are for a loss without weights."""
    plain, weighted = _asked(), _asked(weight=torch.empty(150, device="meta"))
    assert plain.problem().distance(_asked().problem()) == 0
    assert plain.problem().distance(weighted.problem()) == math.inf


@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize(("low", "high"), [(60, 480), (9, 66), (5, 5), (1, 4), (7, 3)])
def test_outputs_of_a_cell(low: int, high: int, align_corners: bool) -> None:
    axis = Axis(low, high, align_corners)
    counts = [sum(axis.before(place) == i for place in range(high)) for i in range(-1, low)]
    most, mostly = places_of_cell(axis)
    assert most == max(counts) and mostly in (most, most - 1)
