"""Host time of each call in microseconds, forward and backward: ours over torch's layers.

All inputs are small, so that Python and dispatch are measured, not the work on the device. On a GPU
whole calls are timed. Without one the kernels are compiled for sm_90 and only the driver call that
would launch them is left out; everything else counts: checks, plan, choice of configuration,
buffers, packing of arguments. Torch's layers run on the same device. Each line is the least of
several rounds in which ours and the peer take turns. Without a GPU the results hold no meaning.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench import peers, report
from bench.options import add_device, add_json
from bench.static.driver import no_gpu
from encnet_triton.files import write_json
from encnet_triton.kernels import encode, upsample_cross_entropy
from encnet_triton.kernels.batch_norm import plan as batch_norm_plan
from encnet_triton.kernels.runtime import launch
from encnet_triton.kernels.runtime.replay import Repeated
from encnet_triton.models import create_model
from encnet_triton.nn import BatchNormAct2d
from encnet_triton.nn.norm import _BatchNormAct
from encnet_triton.options import pick_device, whole
from encnet_triton.train.compiling import compile_obstacle

Call = Callable[[], object]
# A round makes as many calls as fit into ROUND seconds.
ROUND, WARM_UP = 2e-3, 5
IMAGES, CHANNELS, EDGE, CODEWORDS, CLASSES = 2, 16, 2, 8, 8
# Blocks of the compiled step, each of a layer without and a layer with a residual.
BLOCKS = 4


@dataclass(frozen=True)
class Row:
    """A line: what is called, microseconds of ours and of the peer, and which peer."""

    name: str
    ours: float
    peer: float
    against: str


def best(ours: Call, peer: Call, rounds: int, device: torch.device) -> tuple[float, float]:
    """Microseconds until a call of each returns: the least over rounds in which they take turns."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # Processor time, since others may use the machine. On a GPU autograd runs in a second thread,
    # so there it is wall-clock time.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    least = [float("inf"), float("inf")]
    for call in (ours, peer):
        for _ in range(WARM_UP):
            call()
    for _ in range(rounds):
        for place, call in enumerate((ours, peer)):
            wait()
            calls = max(1, int(ROUND / least[place]))
            start = clock()
            for _ in range(calls):
                call()
            least[place] = min(least[place], (clock() - start) / calls)
    wait()
    return 1e6 * least[0], 1e6 * least[1]


def _map(device: torch.device, channels: int = CHANNELS) -> Tensor:
    x = torch.randn(IMAGES, channels, EDGE, EDGE, device=device)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


class NormStep:
    """Forward and backward of one layer of batch normalisation, fused or torch's.

    `projected`: another layer normalises the residual.
    """

    def __init__(
        self,
        impl: Any,
        residual: bool,
        device: torch.device,
        relu: bool = True,
        projected: bool = False,
    ) -> None:
        activation: Any = "relu" if relu else None
        self.layer = BatchNormAct2d(CHANNELS, activation=activation, impl=impl).to(device).train()
        self.first = BatchNormAct2d(CHANNELS, None, impl=impl).to(device) if projected else None
        self.x = _map(device)
        self.residual = _map(device) if residual else None
        self.grad = torch.randn_like(self.x)

    def __call__(self) -> None:
        self.layer(self.x, self.residual, residual_norm=self.first).backward(self.grad)


class EncodeStep:
    """`encode` with statistics, or a peer with the same arguments."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function = function
        self.x = _map(device)
        self.codewords = torch.randn(CODEWORDS, CHANNELS, device=device, requires_grad=True)
        self.scale = torch.randn(CODEWORDS, device=device, requires_grad=True)
        self.grad = torch.randn(IMAGES, CODEWORDS, CHANNELS, device=device)

    def __call__(self) -> None:
        self.function(self.x, self.codewords, self.scale).backward(self.grad)


class LossStep:
    """`upsample_cross_entropy`, or a peer with the same arguments."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function = function
        self.logits = _map(device, CLASSES)
        shape = (IMAGES, 2 * EDGE, 2 * EDGE)
        self.target = torch.randint(0, CLASSES, shape, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        self.function(self.logits, self.target).backward()


def _encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    return encode(x, codewords, scale, return_stats=True)[0]


class BareEncode(torch.autograd.Function):
    """Allocates what `encode` returns and keeps, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        code = x.new_empty((len(x), *codewords.shape))
        sums, m2 = (x.new_empty(code.shape[:2]) for _ in range(2))
        counters = torch.empty(len(x) + 1, dtype=torch.int32, device=x.device)
        ctx.save_for_backward(x, codewords, scale, counters)
        ctx.mark_non_differentiable(sums, m2)
        return code, sums, m2

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, codewords, scale, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(codewords), torch.empty_like(scale)


class BareLoss(torch.autograd.Function):
    """Allocates the loss, what is kept for backward, and the gradient of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        lse = logits.new_empty(target.shape)
        ctx.save_for_backward(logits, target, lse)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, _, _ = ctx.saved_tensors
        return torch.empty_like(logits), None


def _bare_encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    return BareEncode.apply(x, codewords, scale)[0]  # type: ignore[no-any-return, no-untyped-call]


def one_launch(device: torch.device) -> tuple[Call, Call]:
    """The normalising pass with its output, and the launch in it made by Triton's own launcher."""
    x = torch.zeros(IMAGES, EDGE * EDGE, CHANNELS, device=device).transpose(1, 2)
    of_channels = [torch.zeros(CHANNELS, device=device) for _ in range(4)]

    def plan(x: Tensor, *of_channels: Tensor) -> Any:
        mean, var, weight, bias = of_channels
        affine = batch_norm_plan.Affine(mean, var, weight, bias, 1e-5)
        return batch_norm_plan.Normalise(x, affine, None, True, False, False)

    body = Repeated(lambda *tensors: launch.run(plan(*tensors))[0])
    call, here = plan(x, *of_channels), launch.machine(device)
    one = call.launches(here, call.configs(here)[0])[0][0]
    given = {**one.arguments, **one.constants, **one.options()}
    return lambda: body(x, *of_channels), lambda: one.kernel[one.grid](**given)


def layers_of_step(backbone: str) -> Counter[tuple[bool, bool, bool]]:
    """Count the batch norms in a training step of EncNet, by kind.

    A kind says whether there is a residual, a ReLU, and another layer that normalises the residual;
    that layer is not counted separately.
    """
    with torch.device("meta"):
        model = create_model("encnet", 150, backbone=backbone, dropout=0.0).train()
    found: Counter[tuple[bool, bool, bool]] = Counter()

    def count(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        residual = given[1] if len(given) > 1 else named.get("residual")
        projected = named.get("residual_norm") is not None
        found[residual is not None, layer.activation is not None, projected] += 1
        if projected:  # on the meta device that layer is called too
            found[False, False, False] -= 1

    for layer in model.modules():
        if isinstance(layer, _BatchNormAct):
            layer.register_forward_pre_hook(count, with_kwargs=True)
    model(torch.zeros(2, 3, 64, 64, device="meta"))
    return found


class OperatorsOfStep:
    """All operators of a training step, once each, ours or torch's counterparts."""

    def __init__(self, ours: bool, layers: Counter[tuple[bool, bool, bool]], device: torch.device):
        impl = "fused" if ours else "torch"
        self.calls: list[Call] = [
            NormStep(impl, residual, device, relu, projected)
            for (residual, relu, projected), many in layers.items()
            for _ in range(many)
        ]
        self.calls.append(EncodeStep(_encode if ours else peers.encode_matmul, device))
        loss = upsample_cross_entropy if ours else peers.upsample_then_cross_entropy
        self.calls.append(LossStep(loss, device))

    def __call__(self) -> None:
        for call in self.calls:
            call()


class Blocks(nn.Module):
    """Residual blocks with a scaling in place of each convolution."""

    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BatchNormAct2d(CHANNELS, impl=impl) for _ in range(2 * BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = second(2 * first(x), x)
        return x


class CompiledStep:
    """Forward and backward of `Blocks`, compiled as one graph."""

    def __init__(self, impl: Any, device: torch.device) -> None:
        self.model = torch.compile(Blocks(impl).to(device).train(), fullgraph=True)
        self.x = _map(device)
        self.grad = torch.randn_like(self.x)

    def __call__(self) -> None:
        self.model(self.x).backward(self.grad)


def _pairs(device: torch.device, backbone: str) -> Iterator[tuple[str, Call, Call, str]]:
    """Name, ours, peer, what the peer is."""

    def norms(residual: bool) -> tuple[Call, Call]:
        return NormStep("fused", residual, device), NormStep("torch", residual, device)

    norm, bare = "batch norm layer, fused", "bare autograd.Function, same outputs"
    yield norm, *norms(False), "torch's BN + ReLU"
    yield f"{norm}, residual", *norms(True), "torch's BN + add + ReLU"
    yield "encode, statistics", EncodeStep(_encode, device), EncodeStep(_bare_encode, device), bare
    ours, peer = (LossStep(f, device) for f in (upsample_cross_entropy, BareLoss.apply))
    yield "upsample_cross_entropy", ours, peer, bare
    yield "one launch", *one_launch(device), "Triton's own launcher"
    layers = layers_of_step(backbone)
    step, of_torch = (OperatorsOfStep(ours, layers, device) for ours in (True, False))
    yield f"operators of a step, {backbone}", step, of_torch, "torch's layers"


def _compiled(device: torch.device) -> Iterator[tuple[str, Call, Call, str]]:
    ours, peer = (CompiledStep(impl, device) for impl in ("fused", "torch"))
    yield f"compiled, {2 * BLOCKS} batch norms", ours, peer, "torch's layers, compiled"


def rows(device: torch.device, rounds: int, backbone: str, compiled: bool) -> list[Row]:
    """All lines, with the compiled ones if asked for."""
    pairs = chain(_pairs(device, backbone), _compiled(device) if compiled else ())
    return [
        Row(name, *best(ours, peer, rounds, device), against) for name, ours, peer, against in pairs
    ]


def table(found: list[Row], title: str) -> Table:
    """One line per row."""
    made = Table(title=title, title_justify="left")
    made.add_column("forward + backward", no_wrap=True)
    for column in ("ours us", "peer us", "ours / peer"):
        made.add_column(column, justify="right")
    made.add_column("peer")
    for row in found:
        ratio = f"{row.ours / row.peer:.2f}x"
        made.add_row(row.name, f"{row.ours:.1f}", f"{row.peer:.1f}", ratio, row.against)
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_device(parser)
    parser.add_argument("--rounds", type=whole(1), default=60, help="rounds (default 60)")
    parser.add_argument("--backbone", default="resnet50", help="of the step (default resnet50)")
    parser.add_argument("--eager", action="store_true", help="leave the compiled step out")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print the table; returns the exit status."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    obstacle = None if options.eager else compile_obstacle(device)
    on_gpu = device.type == "cuda"
    driver: AbstractContextManager[None] = nullcontext() if on_gpu else no_gpu()
    with driver:
        found = rows(device, options.rounds, options.backbone, not (options.eager or obstacle))
    console = report.console(150)
    console.print(report.machine(device), highlight=False)
    how = "whole calls" if on_gpu else "without the driver's launch call"
    console.print(table(found, f"host time of a call, {how}"))
    if obstacle:
        console.print(f"no compiled step: {obstacle}")
    if options.json is not None:
        document = {"machine": report.machine(device), "rows": [asdict(row) for row in found]}
        write_json(document, options.json)
    return 0
