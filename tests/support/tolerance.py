"""What two computations of the gradients of one network may differ by, on any processor.

In float32 no small bound holds for each tensor. A ReLU whose input is zero but for rounding lets a
gradient through or not: of 100 small networks (EncNet with the backbones `demo` and `small`) one in
ten had a tensor more than 3e-3 of its norm from float64, the worst 0.12, by the order of summation
alone; it is a processor's luck which. In float64 such an input is 1e9 times as rare.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


def assert_equal_in_float64(ours: Tensors, theirs: Tensors) -> None:
    """Each of the weights, gradients or momenta of a network agrees to 1e-9 of its norm.

    Rounding moves them by some 1e-14. What cancels to nothing is compared on the scale of what it
    was summed from: the noise left may be 1e-12 of the largest tensor's norm.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-12 * largest(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float64, name
        error = norm(tensor - theirs[name])
        assert error <= 1e-9 * norm(tensor) + floor, f"{name}: {error:.2g}"


def assert_alike_in_float32(ours: Tensors, exact: Tensors) -> None:
    """Gradients differ by a few ReLUs from those in float64: what this finds are gross errors.

    A gradient that is missing, doubled, or of statistics that are not synchronised is off by half
    or more. Of the 100 networks above the worst was 5e-3 off as a whole, 0.12 in one tensor.
    """
    assert ours.keys() == exact.keys()
    errors = {name: norm(ours[name].double() - tensor) for name, tensor in exact.items()}
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    whole = norm(torch.tensor([norm(tensor) for tensor in exact.values()]))
    assert norm(torch.tensor(list(errors.values()))) <= 0.05 * whole
    for name, tensor in exact.items():
        assert errors[name] <= 0.5 * norm(tensor) + 5e-3 * largest(exact), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, as they are now."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def largest(tensors: Tensors) -> float:
    return max(norm(tensor) for tensor in tensors.values())
