"""Derivatives that the operators do not have are refused: torch alone would take them for zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from encnet_triton.kernels import (
    batch_norm_act,
    encode,
    upsample_argmax,
    upsample_cross_entropy,
)

CODEWORDS, SCALE = torch.rand(5, 4), -torch.rand(5)
TARGET = torch.zeros(2, 8, 8, dtype=torch.uint8)


def _batch_norm(x: Tensor, training: bool = True) -> Tensor:
    running = torch.zeros(4), torch.ones(4)
    return batch_norm_act(x, None, None, *running, training=training, momentum=0.1, eps=1e-5)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "encode": lambda x: encode(x, CODEWORDS, SCALE),
    "codewords": lambda x: encode(torch.zeros(2, 4, 3, 3), x[0, 0, 0, 0] * CODEWORDS, SCALE),
    "batch norm": _batch_norm,
    "frozen batch norm": lambda x: _batch_norm(x, training=False),
    "mean loss": lambda x: upsample_cross_entropy(x, TARGET),
    "losses": lambda x: upsample_cross_entropy(x, TARGET, reduction="none"),
    "probability": lambda x: upsample_argmax(x, (8, 8), return_prob=True)[1],
}
operators = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def _jvp(operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jvp(operator, (x,), (torch.ones_like(x),))


def _dual(operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        operator(forward_ad.make_dual(x, torch.ones_like(x)))


def _jacfwd(operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.jacfwd(operator)(x)


@operators
@pytest.mark.parametrize("derive", [_jvp, _dual, _jacfwd])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(
    operator: Callable[[Tensor], Tensor],
    derive: Callable[[Callable[[Tensor], Tensor], Tensor], None],
    requires_grad: bool,
) -> None:
    x = torch.rand(2, 4, 3, 3, requires_grad=requires_grad)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        derive(operator, x)


@operators
@pytest.mark.parametrize("over_images", [False, True])
def test_differentiation_by_torch_func_is_refused(
    operator: Callable[[Tensor], Tensor], over_images: bool
) -> None:
    derive = torch.func.grad(lambda x: operator(x).sum())
    x = torch.rand(2, 4, 3, 3)
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated by torch\.func"):
        torch.func.vmap(derive)(x.expand(3, -1, -1, -1, -1)) if over_images else derive(x)


def test_vmap_of_a_training_batch_norm_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"does not work inside torch\.func\.vmap"):
        torch.func.vmap(_batch_norm)(torch.rand(3, 2, 4, 3, 3))


@pytest.mark.parametrize("name", ["encode", "frozen batch norm"])
def test_vmap_of_the_others_is_the_operator_of_each(name: str) -> None:
    x = torch.rand(3, 2, 4, 3, 3, requires_grad=True)
    together = torch.func.vmap(OPERATORS[name])(x)
    alone = torch.stack([OPERATORS[name](part) for part in x])
    assert torch.equal(together, alone)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (together, alone)]
    assert torch.equal(*gradients)
