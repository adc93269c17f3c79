"""Compare operators with float64: every output and gradient of a pass, relative to its norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.job import Wrong
from bench.passes import Pass
from encnet_triton.kernels import reference

# Of the norm. float32 keeps 24 bits, also in 3xTF32 products; half precision rounds what it
# multiplies and what it returns: five roundings of 2^-11 and 2^-8.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
# At most this share of the values may be far off (by a twentieth of the largest): where the input
# of a ReLU is 0 up to rounding, one side passes the gradient and the other does not. A wrong tile
# would be a larger share.
_FAR, _SHARE = 0.05, 1e-5
# Entries of the B x N x K x C residuals that the formula of `encode` may hold at once.
_ENTRIES = 2**26
_LABELS = {
    "encode": ("E", "dx", "dcodewords", "dscale"),
    "batch_norm": ("y", "dx", "dweight", "dbias", "dresidual"),
    "upsample": ("loss", "dlogits"),
}


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fill new memory with NaN: it could hold an earlier call's correct result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(ours: Pass) -> list[Tensor]:
    """The output of a pass and the gradients of its inputs."""
    with unwritten_is_nan():
        out = ours.forward()
        return [out.detach(), *torch.autograd.grad(out, ours.inputs, ours.grad)]


def exact(name: str, ours: Pass) -> list[Tensor]:
    """What `results` should be: the reference in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in ours.inputs]
    grad = ours.grad.double()
    if name == "encode":
        x, codewords, scale = inputs
        return _encode(x, codewords, scale, grad)
    if name == "upsample":
        return _upsample(inputs[0], *ours.rest)
    x, weight, bias, *residual = inputs
    mean, var = (running.clone() for running in ours.rest)
    out = reference.batch_norm_act(
        x, weight, bias, mean, var, training=not ours.frozen, momentum=0.1, eps=1e-5,
        residual=residual[0] if residual else None,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _encode(x: Tensor, codewords: Tensor, scale: Tensor, grad: Tensor) -> list[Tensor]:
    """A few images at a time, because the formula holds all residuals."""
    at_once = max(1, _ENTRIES // (x[0].numel() * len(codewords)))
    codes, grads_x = [], []
    sums = [torch.zeros_like(codewords), torch.zeros_like(scale)]
    for part, share in zip(torch.split(x, at_once), torch.split(grad, at_once), strict=True):
        code = reference.encode(part, codewords, scale)
        grad_x, *rest = torch.autograd.grad(code, [part, codewords, scale], share)
        codes.append(code.detach())
        grads_x.append(grad_x)
        sums = [a + b for a, b in zip(sums, rest, strict=True)]
    return [torch.cat(codes), torch.cat(grads_x), *sums]


def _upsample(logits: Tensor, target: Tensor) -> list[Tensor]:
    """An image at a time, because the formula holds all full-resolution logits."""
    labelled = (target != 255).sum()
    loss = logits.new_zeros(())
    grads: list[Tensor] = []
    for part, labels in zip(torch.split(logits, 1), torch.split(target, 1), strict=True):
        share = reference.upsample_cross_entropy(part, labels, reduction="sum") / labelled
        grads += torch.autograd.grad(share, part)
        loss += share.detach()
    return [loss, torch.cat(grads)]


def compared(
    name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Errors of an operator's results relative to their norm, by name.

    Raises:
        Wrong: one is above what the dtype allows, or values are far off.
    """
    tolerance, errors = TOLERANCE[dtype], {}
    for label, a, b in zip(_LABELS[name], got, wanted, strict=False):
        errors[label], far = _errors(a.double(), b)
        if not errors[label] <= tolerance:
            said = f"{errors[label]:.1e} of its norm (allowed: {tolerance:.0e})"
            raise Wrong(f"{label} is off by {said}", errors)
        if far > max(_SHARE, 2 / b.numel()):
            raise Wrong(
                f"{far:.1e} of the values of {label} are far off (allowed: {_SHARE:.0e})", errors
            )
    return errors


def _errors(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """The norm of the difference over that of the exact values, and the share that is far off."""
    difference = (ours - exact).abs()
    far = (~(difference <= _FAR * exact.abs().max())).double().mean()
    return float(difference.norm() / exact.norm()), float(far)


def compared_labels(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The share of labels that equal those of float64, and how much logit the others lose.

    Raises:
        Wrong: one differs where float64 sees no tie.
    """
    size = (labels.shape[1], labels.shape[2])
    wanted, _ = reference.upsample_argmax(logits.double(), size)
    full = F.interpolate(logits.double(), size, mode="bilinear", align_corners=True)
    lost = full.max(1).values - full.gather(1, labels.long()[:, None])[:, 0]
    worst = float(lost.max())
    if not worst <= 1e-5:
        raise Wrong(f"a label's logit is {worst:.1e} below the largest one")
    return {"equal": float((labels.long() == wanted).double().mean()), "largest loss": worst}
