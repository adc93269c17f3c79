"""A training step of the whole network, phase by phase: stock code against ours.

Four variants, each in a fresh process, with the same weights, batch and optimiser:

- stock: the formula that materialises B x N x K x C in the Encoding layer, torch's batch norm, add
  and ReLU, and interpolate + cross_entropy at full resolution; the loss is compiled with the
  network. On a GPU in channels_last under bfloat16 autocast, on a CPU in contiguous float32, as
  frameworks run there.
- ours: this project's operators behind the same modules, in channels_last under bfloat16 autocast;
  compiled as ``--compile`` does. ``--precision float32`` turns autocast off.

Dropout is 0, so that all variants compute the same. The losses of the first steps are compared, and
no speed is shown if they differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from bench import apart, peers, report, timing
from bench.gpu.device import event
from bench.options import add_device, add_json
from bench.passes import is_compiled
from encnet_triton.files import write_json
from encnet_triton.models import SegmentationOutput, create_model
from encnet_triton.nn import Encoding, SegmentationLoss, presence_target, set_norm_impl
from encnet_triton.options import pick_device, whole
from encnet_triton.train.compiling import compile_obstacle
from encnet_triton.train.config import OptimConfig
from encnet_triton.train.optim import make_optimizer

VARIANTS = ("ours, eager", "ours, compiled", "stock, eager", "stock, compiled")
PHASES = ("data", "forward", "loss", "backward", "optimiser")
COMPARED, WARM_UP = 3, 3
# Steps that follow one another on a GPU without waiting, as in training.
RUN = 5
# Relative difference of the losses of the first steps; bfloat16 keeps eight bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Shape:
    """What is trained: network, images per step, edge of the crop in pixels, classes.

    precision is that of our autocast, "bfloat16", or "float32" for none.
    """

    backbone: str
    batch: int
    crop: int
    classes: int
    precision: str = "bfloat16"

    def arguments(self) -> list[str]:
        """The same as command-line options."""
        return [text for name, value in asdict(self).items() for text in (f"--{name}", str(value))]


DEFAULTS = {"cpu": Shape("resnet18", 4, 256, 150), "cuda": Shape("resnet50", 16, 480, 150)}


@dataclass(frozen=True)
class StepTimes:
    """Times and memory of one variant.

    Attributes:
        losses: of the first steps, from the same weights.
        phases: median milliseconds of each phase.
        total: median milliseconds of a step.
        first: seconds of the first step, compilation included.
        host: median milliseconds until a step returns to Python, starting from an empty queue; it
            includes the GPU's time if the step fills the queue.
        peak_mib: peak memory of the timed steps above the network and its weights: allocated on a
            GPU, resident on a CPU (where compiled variants include the compiler's own memory).
    """

    losses: list[float]
    phases: dict[str, float]
    total: float
    first: float
    peak_mib: float
    host: float


class StockEncoding(nn.Module):
    """`Encoding` with the same parameters, by the formula that materialises all residuals."""

    def __init__(self, ours: Encoding) -> None:
        super().__init__()
        self.codewords, self.scale = ours.codewords, ours.scale

    def forward(self, x: Tensor, return_stats: bool = False) -> Tensor:
        return peers.encode_materialised(x, self.codewords, self.scale)


def stock(model: nn.Module) -> None:
    """Replace our operators by the usual code, with the same parameters."""
    set_norm_impl(model, "torch")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Encoding):
                setattr(parent, name, StockEncoding(child))


def stock_loss(output: SegmentationOutput, target: Tensor) -> Tensor:
    """The total of `SegmentationLoss`, from logits at full resolution."""
    loss = peers.upsample_then_cross_entropy(output.logits, target)
    presence = presence_target(target, output.logits.shape[1], 255).float()
    for branch in output.se:
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(branch.float(), presence)
    return loss


def our_loss(criterion: SegmentationLoss, output: SegmentationOutput, target: Tensor) -> Tensor:
    total: Tensor = criterion(output, target).total
    return total


class PhaseClock:
    """Milliseconds between marks; on a GPU by its own clock, so that no mark waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        mark = event()
        mark.record()
        self._marks.append(mark)

    def read(self) -> list[float]:
        """Times between the marks since the last call; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = [_between(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        self._marks.clear()
        return found

    def read_steps(self) -> list[list[float]]:
        """The same for each step; the time between two steps is left out."""
        found, length = self.read(), len(PHASES) + 1
        return [found[i : i + len(PHASES)] for i in range(0, len(found), length)]


def _between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return 1e3 * (end - begin)
    return float(begin.elapsed_time(end))  # type: ignore[union-attr, arg-type]


class Step:
    """One variant: network, loss, optimiser and a batch in host memory.

    Calling it runs a step, marks the phases on ``clock`` and returns the loss.
    """

    def __init__(self, variant: str, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.stock = variant.startswith("stock")
        plain = self.stock and device.type == "cpu"
        self.dtype = torch.float32 if plain else getattr(torch, shape.precision)
        self.layout = torch.contiguous_format if plain else torch.channels_last
        model = create_model("encnet", shape.classes, backbone=shape.backbone, dropout=0.0)
        if self.stock:
            stock(model)
        self.model = model.to(device, memory_format=self.layout)  # type: ignore[call-overload]
        self.loss: Callable[[SegmentationOutput, Tensor], Tensor] = stock_loss
        if not self.stock:
            self.loss = partial(our_loss, SegmentationLoss(shape.classes).to(device))
        if is_compiled(variant):
            self.model.compile()
            if self.stock:
                self.loss = torch.compile(stock_loss)
        self.optimizer = make_optimizer(self.model, OptimConfig(lr=0.01))
        self.clock = PhaseClock(device)
        images = torch.randint(0, 256, (shape.batch, 3, shape.crop, shape.crop), dtype=torch.uint8)
        labels = torch.randint(0, shape.classes, (shape.batch, shape.crop, shape.crop))
        labels[:, : shape.crop // 10] = 255
        # Ours copies labels to the device as bytes, stock code as int64.
        labels = labels if self.stock else labels.to(torch.uint8)
        pin = device.type == "cuda"
        self.images = images.pin_memory() if pin else images
        self.labels = labels.pin_memory() if pin else labels

    def __call__(self) -> Tensor:
        self.clock.mark()
        x = self.images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
        x = x.contiguous(memory_format=self.layout)
        target = self.labels.to(self.device, non_blocking=True)
        self.clock.mark()
        with self._autocast():
            output = self.model(x)
        self.clock.mark()
        # Autocast lets cross_entropy convert its logits to float32; ours computes in it anyway.
        with self._autocast() if self.stock else nullcontext():
            loss = self.loss(output, target)
        self.clock.mark()
        loss.backward()  # type: ignore[no-untyped-call]
        self.clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.mark()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def measure(
    variant: str, shape: Shape, device: torch.device, seconds: float = 4.0, most: int = 50
) -> StepTimes:
    """Build a variant in this process and time at least three of its steps."""
    cuda = device.type == "cuda"
    start = time.perf_counter()
    step = Step(variant, shape, device)
    before = torch.cuda.memory_allocated(device) if cuda else timing.resident()
    losses = [float(step())]
    first = time.perf_counter() - start
    losses += [float(step()) for _ in range(COMPARED - 1)]
    for _ in range(WARM_UP):
        step()
    step.clock.read()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        timing.forget_peak()
    steps: list[list[float]] = []
    hosts: list[float] = []
    end = time.perf_counter() + seconds
    while len(steps) < 3 or (time.perf_counter() < end and len(steps) < most):
        for number in range(RUN if cuda else 1):
            begin = time.perf_counter()
            step()
            if number == 0:
                hosts.append(1e3 * (time.perf_counter() - begin))
        steps += step.clock.read_steps()
    peak = torch.cuda.max_memory_allocated(device) if cuda else timing.peak_resident()
    medians = [statistics.median(phase) for phase in zip(*steps, strict=True)]
    return StepTimes(
        losses=losses,
        phases=dict(zip(PHASES, medians, strict=True)),
        total=statistics.median(sum(phases) for phases in steps),
        first=first,
        peak_mib=max(0, peak - before) / 2**20,
        host=statistics.median(hosts),
    )


Results = dict[str, "StepTimes | str"]


def disagreement(results: Results, tolerance: float) -> str | None:
    """None, or which variant's losses differ from those of stock code in eager mode."""
    truth = results["stock, eager"]
    if isinstance(truth, str):
        return truth
    for variant, result in results.items():
        if isinstance(result, str):
            continue
        for number, (a, b) in enumerate(zip(result.losses, truth.losses, strict=True), 1):
            if not abs(a - b) <= tolerance * abs(b):
                return f"the loss of {variant} in step {number} is {a:.6f}, of stock code {b:.6f}"
    return None


def measure_apart(variant: str, shape: Shape, device: torch.device) -> StepTimes | str:
    """Measure one variant in a fresh process; returns a sentence if that fails."""
    if is_compiled(variant) and compile_obstacle(device):
        return "no compiled variants: torch.compile finds no compiler here"
    arguments = ["step", "--worker", variant, "--device", device.type, *shape.arguments()]
    try:
        return StepTimes(**apart.measured(arguments))
    except apart.Failed as error:
        return f"{variant} failed: {error}"


def table(shape: Shape, device: torch.device, results: Results) -> Table:
    """One line per variant; the last column compares images per second with stock code, eager."""
    formats = f"{shape.precision}, channels_last"
    if device.type == "cpu":
        formats = f"ours {formats}, stock float32, contiguous"
    made = Table(
        title=f"training step, EncNet {shape.backbone}, {shape.batch} x {shape.crop} x "
        f"{shape.crop}, {shape.classes} classes; {formats}",
        title_justify="left",
    )
    made.add_column("", no_wrap=True)
    columns = ("images/s", "ms", *PHASES, "host", "peak MiB", "first step s", "against stock")
    for column in columns:
        made.add_column(column, justify="right")
    base = results["stock, eager"]
    for variant, result in results.items():
        if isinstance(result, str):
            made.add_row(variant, *["-"] * len(columns))
            continue
        cells = [f"{1e3 * shape.batch / result.total:.1f}", f"{result.total:.1f}"]
        cells += [f"{result.phases[name]:.1f}" for name in PHASES] + [f"{result.host:.1f}"]
        cells += [f"{result.peak_mib:.0f}", f"{result.first:.1f}"]
        cells.append("-" if isinstance(base, str) else f"{base.total / result.total:.2f}x")
        made.add_row(variant, *cells)
    reasons = sorted({r for r in results.values() if isinstance(r, str)})
    if reasons:
        made.caption = "; ".join(reasons)
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_device(parser)
    for name, kind in (
        ("backbone", str), ("batch", whole(1)), ("crop", whole(1)), ("classes", whole(1)),
    ):  # fmt: skip
        shown = ", ".join(f"{getattr(s, name)} on {device}" for device, s in DEFAULTS.items())
        parser.add_argument(f"--{name}", type=kind, help=f"default {shown}")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), help="precision of our autocast")
    add_json(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measure every variant, compare losses, print the table; returns the exit status."""
    device = pick_device(options.device)
    default = asdict(DEFAULTS[device.type])
    given = {k: getattr(options, k) for k in default if getattr(options, k) is not None}
    shape = Shape(**{**default, **given})
    if options.worker:
        # A training process has this in memory anyway.
        importlib.import_module("torch._dynamo")
        print(json.dumps(asdict(measure(options.worker, shape, device))))
        return 0
    results: Results = {v: measure_apart(v, shape, device) for v in VARIANTS}
    wrong = disagreement(results, TOLERANCE[shape.precision])
    if wrong:
        print(f"error: the variants differ, so no speed is given: {wrong}", file=sys.stderr)
        return 1
    console = report.console(150)
    console.print(report.machine(device), highlight=False)
    console.print(table(shape, device, results))
    if options.json is not None:
        rows = {v: r if isinstance(r, str) else asdict(r) for v, r in results.items()}
        document = {"machine": report.machine(device), "shape": asdict(shape), "results": rows}
        write_json(document, options.json)
    return 0
