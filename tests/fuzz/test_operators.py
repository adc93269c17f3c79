"""Operators with one argument of another type, shape or value: a result, or one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from encnet_triton.kernels import (
    batch_norm_act,
    encode,
    upsample_argmax,
    upsample_cross_entropy,
)


def _encode() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, 3, 3), "codewords": torch.randn(5, 4), "scale": -torch.rand(5),
        "backward_scale": None, "return_stats": False,
    }  # fmt: skip


def _batch_norm() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.zeros(4),
        "running_mean": torch.zeros(4), "running_var": torch.ones(4), "training": True,
        "momentum": 0.1, "eps": 1e-5, "residual": None, "activation": "relu", "group": None,
        "statistics": None,
    }  # fmt: skip


def _cross_entropy() -> dict[str, Any]:
    return {
        "logits": torch.randn(2, 3, 4, 4), "target": torch.zeros(2, 8, 8, dtype=torch.uint8),
        "ignore_index": 255, "align_corners": True, "weight": None, "label_smoothing": 0.0,
        "reduction": "mean",
    }  # fmt: skip


def _argmax() -> dict[str, Any]:
    return {
        "logits": torch.randn(2, 3, 4, 4), "size": (8, 8), "align_corners": True,
        "return_prob": False,
    }  # fmt: skip


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "encode": (encode, _encode),
    "batch_norm_act": (batch_norm_act, _batch_norm),
    "upsample_cross_entropy": (upsample_cross_entropy, _cross_entropy),
    "upsample_argmax": (upsample_argmax, _argmax),
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**40, 2**70, 0.0, -0.5, 1.5, float("nan"), float("inf"), "text",
    b"bytes", [], (), [1.0], (8, 8), (0, 8), {"a": 1}, object(), torch.float32, np.float32(0.5),
    np.int64(3), np.ones(4), 1j, Tensor, print,
)  # fmt: skip


def _other_tensor(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    match int(rng.integers(7)):
        case 0:
            kinds = (
                torch.float16,
                torch.float64,
                torch.int64,
                torch.int8,
                torch.bool,
                torch.cfloat,
            )
            return tensor.to(kinds[int(rng.integers(len(kinds)))])
        case 1:
            return tensor[..., None]
        case 2:
            return tensor[0]
        case 3:
            return tensor[:0]
        case 4:
            return tensor.to("meta")
        case 5:
            return torch.cat([tensor, tensor])
        case _:
            return tensor.to_sparse() if tensor.is_floating_point() else -tensor


@pytest.mark.filterwarnings("ignore")
def test_one_argument_is_another(seeds: Iterator[int]) -> None:
    names = list(OPERATORS)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        name = names[seed % len(names)]
        operator, make = OPERATORS[name]
        arguments = make()
        which = list(arguments)[int(rng.integers(len(arguments)))]
        if isinstance(arguments[which], Tensor) and rng.random() < 0.6:
            arguments[which] = _other_tensor(arguments[which], rng)
        else:
            arguments[which] = VALUES[int(rng.integers(len(VALUES)))]
        try:
            operator(**arguments)
        except (TypeError, ValueError) as error:
            text = str(error)
            assert text.startswith(f"{name}: ") and "\n" not in text, (which, text)
