"""Calls of `batch_norm_act` and what they give, for its tests on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.kernels import ResidualNorm

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((3, 6, 5, 7), lambda x: x),
    "channels_last": ((3, 6, 5, 7), lambda x: x.to(memory_format=torch.channels_last)),
    "BxC": ((9, 6), lambda x: x),
    "BxKxC": ((4, 6, 11), lambda x: x),
    "five dimensions": ((2, 6, 3, 4, 2), lambda x: x),
    "one channel": ((2, 1, 4, 4), lambda x: x),
    "one image": ((1, 6, 4, 5), lambda x: x),
    "two values": ((2, 3, 1, 1), lambda x: x),
    "strided pixels": ((3, 6, 8, 9), lambda x: x[:, :, ::2, ::3]),
    "strided channels": ((3, 12, 4, 5), lambda x: x[:, ::2]),
    "spatial transpose": ((3, 6, 4, 5), lambda x: x.transpose(2, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu, residual": {"residual": True},
    "linear": {"activation": None},
    "linear, residual": {"activation": None, "residual": True},
    "no weight": {"weight": False},
    "no bias": {"bias": False},
    "relu, normalised residual": {"residual": True, "normalised": True},
    "linear, normalised residual": {"activation": None, "residual": True, "normalised": True},
    "normalised residual, no weight": {"residual": True, "normalised": True, "weight": False},
    "normalised residual, no bias": {"residual": True, "normalised": True, "bias": False},
}
# Arguments that make a `ResidualNorm`.
OF_RESIDUAL = ("res_weight", "res_bias", "res_running_mean", "res_running_var")
DIFFERENTIABLE = ("x", "weight", "bias", "residual", *OF_RESIDUAL[:2])


def example(
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    *,
    residual: bool = False,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
    normalised: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Tensors of a call; parameters are float32 unless x is float64.

    With those of `OF_RESIDUAL` where the residual is to be normalised.
    """
    shape, view = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(len(layout))

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        return values.double() if dtype == torch.float64 else values

    x = view((draw(*shape) * 2 + 1).to(dtype))
    channels = x.shape[1]
    tensors = {
        "x": x,
        "weight": draw(channels) + 0.5 if weight else None,
        "bias": draw(channels) if bias else None,
        "running_mean": draw(channels) if running else None,
        "running_var": draw(channels).square() + 0.5 if running else None,
        "residual": view(draw(*shape).to(dtype)) if residual else None,
    }
    if normalised:
        tensors |= {
            "res_weight": draw(channels) - 0.5 if weight else None,
            "res_bias": draw(channels) if bias else None,
            "res_running_mean": draw(channels) if running else None,
            "res_running_var": draw(channels).square() + 0.5 if running else None,
        }
        tensors["residual"] = tensors["residual"] * 3 - 2
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def call(function: Callable[..., Any], tensors: dict[str, Tensor | None], **options: Any) -> Any:
    """The function of these tensors."""
    given = {name: tensor for name, tensor in tensors.items() if name not in OF_RESIDUAL}
    if OF_RESIDUAL[0] in tensors:
        given["residual_norm"] = ResidualNorm(*(tensors[name] for name in OF_RESIDUAL), 0.3)
    return function(**given, **options)


def torch_formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    residual_norm: ResidualNorm | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """What frameworks write today."""
    if residual_norm is not None:
        scale, shift, mean, var, of_residual = residual_norm
        residual = F.batch_norm(residual, mean, var, scale, shift, training, of_residual, eps)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y if activation is None else y.relu()


def gradient_of(y: Tensor) -> Tensor:
    """dL/dy, the same for every dtype: it has three bits after the leading one."""
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return values.to(torch.float8_e4m3fn).to(y)


def run(
    function: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options: Any
) -> dict[str, Tensor]:
    """y, gradients and running statistics afterwards; arguments stay as they were."""
    leaves = {n: None if t is None else t.detach() for n, t in tensors.items()}
    for name in leaves:
        if "running" in name and leaves[name] is not None:
            leaves[name] = leaves[name].clone()
    differentiable = [n for n in DIFFERENTIABLE if leaves.get(n) is not None]
    for name in differentiable:
        leaves[name].requires_grad_()
    y = call(function, leaves, **({"momentum": 0.2, "eps": 1e-3} | options))
    y.backward(gradient_of(y))
    result = {"y": y.detach()} | {f"d{n}": leaves[n].grad for n in differentiable}
    return result | {n: t for n, t in leaves.items() if "running" in n and t is not None}


def terms(tensors: dict[str, Tensor | None], *, training: bool, eps: float = 1e-3) -> dict:
    """What the gradients of the parameters are summed from, in absolute values: they cancel."""
    x = tensors["x"].double()
    over = [d for d in range(x.dim()) if d != 1]
    mean, var = x.mean(over), x.var(over, correction=0)
    if not training:
        mean, var = tensors["running_mean"].double(), tensors["running_var"].double()
    column = (-1,) + (1,) * (x.dim() - 2)
    normalised = (x - mean.view(column)) / (var + eps).sqrt().view(column)
    dy = gradient_of(x).abs()
    return {"dweight": (dy * normalised.abs()).sum(over), "dbias": dy.sum(over)}


def as_dtype(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {n: None if t is None else t.to(dtype) for n, t in tensors.items()}


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(
            ours[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
