"""Correctness first: each operator is compared with float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.cases import cifar_network
from encnet_triton import kernels
from encnet_triton.kernels import reference

# Relative to the largest value, float32 against float64: 800 units in the last place. That is 100
# times the rounding of such short sums on any processor, and far below the error of a wrong term.
TOLERANCE = 1e-4


def _compare(
    ours: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: list[Tensor],
    rest: list[Tensor],
    tolerance: float = TOLERANCE,
) -> str | None:
    """None, or which result is wrong and by how much."""
    narrow = [t.clone().requires_grad_() for t in inputs]
    wide = [t.cpu().double().requires_grad_() for t in inputs]
    got = ours(*narrow, *rest)
    expected = truth(*wide, *(t.cpu() for t in rest))
    got.sum().backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()  # type: ignore[no-untyped-call]
    results: list[tuple[str, Tensor | None, Tensor | None]] = [("output", got, expected)]
    for index, (tensor, wanted) in enumerate(zip(narrow, wide, strict=True)):
        results.append((f"gradient {index}", tensor.grad, wanted.grad))
    for name, a, b in results:
        assert a is not None and b is not None
        error = float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
        if not error <= tolerance:
            return f"{name} is off by {error:.1e} of its largest value (allowed: {tolerance:.0e})"
    return None


def check_encode(device: torch.device) -> str | None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 9, 7, device=device)
    codewords = torch.randn(5, 40, device=device) / 4
    scale = -torch.rand(5, device=device) / 8
    wrong = _compare(kernels.encode, reference.encode, [x, codewords, scale], [])
    if wrong or device.type == "cpu":
        return wrong
    # On a GPU bfloat16 is timed, which has kernels of its own; rounding dx alone costs 0.4 %.
    x = torch.randn(2, 512, 9, 7, device=device).bfloat16()
    codewords = torch.randn(32, 512, device=device)
    scale = -torch.rand(32, device=device) / 256
    return _compare(kernels.encode, reference.encode, [x, codewords, scale], [], tolerance=0.02)


def check_upsample(device: torch.device) -> str | None:
    torch.manual_seed(0)
    logits = torch.randn(2, 21, 7, 9, device=device)
    target = torch.randint(0, 21, (2, 53, 61), device=device)
    target[:, :5] = 255
    return _compare(
        kernels.upsample_cross_entropy, reference.upsample_cross_entropy, [logits], [target]
    )


def _batch_norm(operator: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """With the batch's statistics, a residual and ReLU."""
    x, weight, bias, residual = tensors
    return operator(
        x, weight, bias, None, None, training=True, momentum=0.1, eps=1e-5, residual=residual
    )


def check_batch_norm(device: torch.device) -> str | None:
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 40, 9, 7, device=device) for _ in range(2))
    weight, bias = torch.rand(40, device=device) + 0.5, torch.randn(40, device=device)
    ours = partial(_batch_norm, kernels.batch_norm_act)
    truth = partial(_batch_norm, reference.batch_norm_act)
    # The sum of y hardly depends on x, so its gradient is nearly 0; a weighted sum has one.
    factor = torch.randn(3, 40, 9, 7, device=device)
    return _compare(
        lambda *tensors: ours(*tensors[:4]) * tensors[4],
        lambda *tensors: truth(*tensors[:4]) * tensors[4],
        [x, weight, bias, residual],
        [factor],
    )


def check_cifar(device: torch.device) -> str | None:
    """Compare the logits of both networks, with equal weights and images, in float32 on the CPU."""
    images = torch.randn(4, 3, 32, 32)
    cpu = torch.device("cpu")
    with torch.no_grad():
        ours, peer = (cifar_network(cpu, other).eval()(images) for other in (False, True))
    error = float((ours - peer).abs().max() / peer.abs().max())
    return None if error <= TOLERANCE else f"logits differ by {error:.1e} of the largest"


CHECKS = {
    "encode": check_encode,
    "batch_norm": check_batch_norm,
    "upsample": check_upsample,
    "cifar": check_cifar,
}


def check(case: str, device: torch.device) -> str | None:
    """None if the operator of a case is right (or the case has none), else what is wrong."""
    return CHECKS[case](device) if case in CHECKS else None
