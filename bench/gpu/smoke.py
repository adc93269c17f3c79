"""Does anything work at all: the device, each operator against float64, collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import passes
from bench.gpu.device import place
from bench.gpu.job import Wrong
from bench.gpu.processes import LOOPBACK, streamed, torchrun
from bench.report import machine
from encnet_triton.kernels import reference, upsample_argmax
from encnet_triton.report import report

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# Of the norm. float32 keeps 24 bits, in 3xTF32 products too; half precision rounds what it
# multiplies and what it returns: five roundings of 2^-11 and 2^-8.
TOLERANCE = {"float32": 2e-5, "float16": 2.5e-3, "bfloat16": 2e-2}
# Values that are far off (a twentieth of the largest) may be this share: a ReLU whose input is 0
# but for rounding passes a gradient here and stops it there. A tile gone wrong is more.
_FAR, _SHARE = 0.05, 1e-5


def environment(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """What a bug report needs, and what the device is."""
    device = place(rehearse)
    found: dict[str, Any] = dict(report())
    return {"machine": machine(torch.device(device.kind)), "device": device.facts(), **found}


def limits(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """What the device can do at most: bytes copied, bfloat16 products, the shortest replay."""
    device = place(rehearse)
    kind, size = device.kind, arguments["bytes"]
    source = torch.empty(size, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    n = arguments["matrix"]
    a, b = (torch.randn(n, n, device=kind, dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros(1, device=kind)
    copy = device.times(lambda: target.copy_(source), 1.0)
    product = device.times(lambda: a @ b, 1.0)
    shortest = device.times(lambda: one.fill_(1.0), 0.2)
    return {
        "copy GB/s": 2 * size / copy.median / 1e6,
        "bfloat16 TFLOP/s": 2 * n**3 / product.median / 1e9,
        "replay of one fill, us": 1e3 * shortest.median,
        "launch from Python, us": 1e3 * shortest.host,
        "clocks after": device.clocks(),
    }


def operator(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Forward and backward of one operator against float64; errors over the norm."""
    name, dtype = arguments["operator"], DTYPES[arguments["dtype"]]
    device = torch.device(place(rehearse).kind)
    ours = passes.PASSES[name]("ours", device, dtype, **arguments["shape"])
    got = [ours.forward(), *ours()]
    exact = [tensor.detach().double().requires_grad_() for tensor in ours.inputs]
    out = _formula(name, exact, ours.rest)
    wanted = [out, *torch.autograd.grad(out, exact, ours.grad.double())]
    tolerance = TOLERANCE[arguments["dtype"]]
    errors = {}
    for label, a, b in zip(_LABELS[name], got, wanted, strict=False):
        errors[label], far = _errors(a.detach().double(), b.detach())
        if not errors[label] <= tolerance:
            raise Wrong(
                f"{label} is off by {errors[label]:.1e} of its norm ({tolerance:.0e})", errors
            )
        if far > max(_SHARE, 2 / b.numel()):
            raise Wrong(f"{far:.1e} of the values of {label} are far off ({_SHARE:.0e})", errors)
    return {"errors": errors}


_LABELS = {
    "encode": ("E", "dx", "dcodewords", "dscale"),
    "batch_norm": ("y", "dx", "dweight", "dbias", "dresidual"),
    "upsample": ("loss", "dlogits"),
}


def _formula(name: str, inputs: list[Tensor], rest: list[Tensor]) -> Tensor:
    if name == "encode":
        return reference.encode(*inputs)
    if name == "upsample":
        return reference.upsample_cross_entropy(inputs[0], rest[0])
    x, weight, bias = inputs[:3]
    residual = inputs[3] if len(inputs) > 3 else None
    return reference.batch_norm_act(
        x, weight, bias, None, None, training=True, momentum=0.1, eps=1e-5, residual=residual
    )


def _errors(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """The norm of the difference over that of the exact values, and the share that is far off."""
    difference = (ours - exact).abs()
    far = (~(difference <= _FAR * exact.abs().max())).double().mean()
    return float(difference.norm() / exact.norm()), float(far)


def argmax(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """The label map of `upsample_argmax`: where it differs, float64 sees almost a tie."""
    device, low, high = place(rehearse).kind, arguments["low"], arguments["high"]
    torch.manual_seed(0)
    logits = torch.randn(2, arguments["classes"], low, low, device=device)
    labels = upsample_argmax(logits, (high, high))
    assert isinstance(labels, Tensor)
    wanted, _ = reference.upsample_argmax(logits.double(), (high, high))
    full = torch.nn.functional.interpolate(
        logits.double(), (high, high), mode="bilinear", align_corners=True
    )
    lost = full.max(1).values - full.gather(1, labels.long()[:, None])[:, 0]
    worst = float(lost.max())
    if not worst <= 1e-5:
        raise Wrong(f"a label's logit is {worst:.1e} below the largest one")
    return {"equal": float((labels.long() == wanted).double().mean()), "largest loss": worst}


def ranks(arguments: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Synchronised batch norm and DDP in a group of processes that share the device."""
    device = place(rehearse)
    backend = "gloo" if rehearse else arguments["backend"]
    command = ["-m", "bench.gpu.ranks", "--device", device.kind, "--backend", backend]
    status, printed = streamed(torchrun(arguments["processes"], command), **LOOPBACK)
    if status:
        errors = [line for line in printed.splitlines() if "rror" in line]
        raise Wrong((errors or ["torchrun failed"])[0][:300])
    return {"ranks": next(line for line in printed.splitlines() if "right on" in line)}
