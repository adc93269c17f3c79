"""Forward and backward passes of the operators and of their peers, on tensors made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench import least, peers
from encnet_triton.kernels import batch_norm_act, encode, upsample_cross_entropy

Function = Callable[..., Tensor]


@dataclass
class Pass:
    """A function on fixed tensors: `forward()` runs it, calling the pass runs backward as well.

    Gradients are returned and not accumulated, so that all calls do the same and can be captured in
    a CUDA graph.

    Attributes:
        inputs: arguments that get gradients.
        rest: further arguments.
        frozen: a batch norm that uses the running statistics.
    """

    function: Function
    inputs: list[Tensor]
    rest: list[Tensor] = field(default_factory=list)
    frozen: bool = False

    def __post_init__(self) -> None:
        self.inputs = [tensor.requires_grad_() for tensor in self.inputs]

    @cached_property
    def grad(self) -> Tensor:
        """The gradient of the output, from which the backward pass starts."""
        out = self.forward().detach()
        return torch.randn_like(out) if out.dim() else torch.ones_like(out)

    def forward(self) -> Tensor:
        return self.function(*self.inputs, *self.rest)

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.grad)


def is_compiled(variant: str) -> bool:
    """Whether a variant needs torch.compile, hence a compiler."""
    return variant.endswith("compiled")


def needs_gpu(variant: str) -> bool:
    """Whether a peer exists only as a Triton kernel."""
    return variant == "one program per channel"


def _made(variant: str, function: Function) -> Function:
    return torch.compile(function, fullgraph=True) if is_compiled(variant) else function


ENCODE = ("ours", "materialising, eager", "materialising, compiled", "matrix products, compiled")
BATCH_NORM = (
    "ours",
    "batch_norm + add + relu, eager",
    "batch_norm + add + relu, compiled",
    "one program per channel",
)
UPSAMPLE = ("ours", "interpolate + cross_entropy, eager", "interpolate + cross_entropy, compiled")


def encode_pass(
    variant: str, device: torch.device, dtype: torch.dtype, *, B: int, C: int, size: int, K: int
) -> Pass:
    """`encode` of B x C x size x size, channels last on a GPU, against K codewords."""
    torch.manual_seed(0)
    x = torch.randn(B, C, size, size, device=device).relu().to(dtype)
    if device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    codewords = (torch.rand(K, C, device=device) - 0.5) * 2 / (K * C) ** 0.5
    scale = -torch.rand(K, device=device)
    functions: dict[str, Function] = {
        "ours": encode,
        "materialising": peers.encode_materialised,
        "matrix products": peers.encode_matmul,
    }
    function = functions[variant.partition(",")[0]]
    return Pass(_made(variant, function), [x, codewords, scale])


def _one_program_a_channel(*given: Tensor | None) -> Tensor:
    from bench import channel_programs  # imports triton, which not every platform has

    return channel_programs.batch_norm_add_relu(*given)  # type: ignore[arg-type]


def _our_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    frozen: bool = False,
) -> Tensor:
    return batch_norm_act(
        x, weight, bias, mean, var, training=not frozen, momentum=0.1, eps=1e-5, residual=residual
    )


def batch_norm_pass(
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    size: int,
    residual: bool,
    frozen: bool = False,
) -> Pass:
    """Batch norm, the addition of a residual if asked for, and ReLU on B x C x size x size.

    Only ours can be `frozen`, with the running statistics. Channels last, except for the peer with
    one program per channel, which is fastest on contiguous tensors.
    """
    torch.manual_seed(0)
    last = torch.contiguous_format if needs_gpu(variant) else torch.channels_last
    x, other = (
        torch.randn(B, C, size, size, device=device, dtype=dtype).contiguous(memory_format=last)
        for _ in range(2)
    )
    weight, bias = torch.rand(C, device=device) + 0.5, torch.rand(C, device=device)
    running = [torch.zeros(C, device=device), torch.ones(C, device=device)]
    peer = peers.batch_norm_add_relu
    ours = partial(_our_batch_norm, frozen=frozen)
    one_of: dict[str, Function] = {
        "ours": ours,
        "batch_norm + add + relu": peer,
        "one program per channel": _one_program_a_channel,
    }
    layer = one_of[variant.partition(",")[0]]

    def call(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        return layer(x, weight, bias, *rest[-2:], rest[0] if residual else None)

    inputs = [x, weight, bias, *([other] if residual else [])]
    return Pass(_made(variant, call), inputs, running, frozen)


def upsample_pass(
    variant: str, device: torch.device, dtype: torch.dtype, *, B: int, C: int, low: int, high: int
) -> Pass:
    """`upsample_cross_entropy` of C classes from low x low to high x high, a tenth unlabelled."""
    torch.manual_seed(0)
    logits = torch.randn(B, C, low, low, device=device, dtype=dtype) * 3
    logits = logits.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, C, (B, high, high), device=device)
    target[:, : high // 10] = 255
    if variant == "ours":
        return Pass(upsample_cross_entropy, [logits], [target.to(torch.uint8)])
    return Pass(_made(variant, peers.upsample_then_cross_entropy), [logits], [target])


PASSES: dict[str, Callable[..., Pass]] = {
    "encode": encode_pass,
    "batch_norm": batch_norm_pass,
    "upsample": upsample_pass,
}
VARIANTS = {"encode": ENCODE, "batch_norm": BATCH_NORM, "upsample": UPSAMPLE}


def least_bytes(operator: str, itemsize: int, shape: dict[str, Any]) -> tuple[int, int]:
    """See `bench.least`; `shape` holds the arguments of the operator's pass."""
    common = {"B": shape["B"], "C": shape["C"], "size": itemsize}
    if operator == "encode":
        return least.encode(**common, N=shape["size"] ** 2, K=shape["K"])
    if operator == "batch_norm":
        return least.batch_norm(**common, N=shape["size"] ** 2, residual=shape["residual"])
    return least.upsample(**common, low=shape["low"] ** 2, high=shape["high"] ** 2)
