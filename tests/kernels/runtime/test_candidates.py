"""Every configuration that may be measured computes what the plan's own one does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench import passes
from bench.static.interpreter import Watch
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.launch import Config

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")


def layer(**sizes: Any) -> Callable[[], object]:
    return passes.batch_norm_pass("ours", DEVICE, torch.float32, **sizes)


def encoding(dtype: torch.dtype = torch.float32, **sizes: Any) -> Callable[[], object]:
    return passes.encode_pass("ours", DEVICE, dtype, **sizes)


def cross_entropy(**sizes: Any) -> Callable[[], object]:
    return passes.upsample_pass("ours", DEVICE, torch.float32, **sizes)


SUBJECTS: dict[str, Callable[[], Callable[[], object]]] = {
    "encode, whole images": partial(encoding, B=1, C=9, size=4, K=5),
    "encode, fused": partial(encoding, torch.bfloat16, B=1, C=136, size=5, K=3),
    "encode, split": partial(encoding, B=1, C=40, size=4, K=17),
    "batch_norm": partial(layer, B=2, C=70, size=3, residual=True),
    "batch_norm, frozen": partial(layer, B=2, C=70, size=3, residual=True, frozen=True),
    "upsample": partial(cross_entropy, B=1, C=9, low=2, high=4),
}


def computed(call: launch.Pass[Any], config: Config) -> list[Tensor]:
    here = launch.machine(call.device)
    launches, outputs = call.launches(here, config)
    with Watch(races=True) if launch.interpreting() else contextlib.nullcontext():
        launch.run_all(launches)
    made = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [tensor for tensor in made if tensor.numel()]


def distinct(configs: Sequence[Config]) -> list[Config]:
    """Without those whose warps or registers alone differ: the interpreter has none."""
    if not launch.interpreting():
        return list(dict.fromkeys(configs))
    plain = [replace(config, num_warps=0, max_registers=None) for config in configs]
    return [config for i, config in enumerate(configs) if plain[i] not in plain[:i]]


@pytest.mark.parametrize("name", SUBJECTS)
def test_candidates_compute_the_same(name: str) -> None:
    subject = SUBJECTS[name]()
    with launch.trial() as ran:
        subject()
    assert ran
    for call, default in ran:
        here = launch.machine(call.device)
        candidates = call.candidates(here)
        assert list(candidates[: len(call.configs(here))]) == list(call.configs(here))
        assert len(candidates) > 3 and len({str(c) for c in candidates}) == len(candidates)
        wanted = computed(call, default)
        for config in distinct([default, *candidates])[1:]:
            for ours, theirs in zip(computed(call, config), wanted, strict=True):
                # Sums in another order, of what is rounded to x's dtype.
                error = (ours.double() - theirs).norm() / theirs.double().norm().clamp(min=1e-9)
                assert error <= (2e-2 if call.problem().dtype == "bfloat16" else 1e-4), config
