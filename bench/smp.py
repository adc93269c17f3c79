"""A training step on one light trunk: our EncNet and FCN, and the decoders of
segmentation_models.pytorch, trained as in its CamVid example.

Each network is trained for a few steps on random images in a fresh process, with EfficientNet-Lite0
as the trunk of all: ours as in `folder_encnet_lite0` (cross-entropy, SE loss, AdamW), theirs with
Dice loss and Adam. Seconds are processor time, which other work on the machine changes less than
wall-clock time. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import apart, report, timing
from bench.options import add_json
from bench.smp_train import RATE, THEIRS, TRUNK, create, import_smp
from bench.static.cost import gmac
from encnet_triton.files import write_json
from encnet_triton.models import create_model
from encnet_triton.nn import SegmentationLoss
from encnet_triton.options import size, whole
from encnet_triton.train.optim import make_optimizer
from encnet_triton.train.recipe import build

OURS = {"encnet_se": "EncNet + SE", "fcn": "FCN"}
CLASSES, STEPS, WARM_UP = 11, 5, 2

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """A network's cost: processor seconds of a step, and peak memory above that in use before."""

    parameters: int
    gmac: float
    seconds: float
    extra_mib: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--crop", type=size, default=(288, 384), help="pixels (default 288x384)")
    parser.add_argument("--batch", type=whole(1), default=8, help="images per step (default 8)")
    parser.add_argument("--network", choices=(*OURS, *THEIRS), help=argparse.SUPPRESS)
    add_json(parser)


def ours(name: str) -> tuple[nn.Module, Step]:
    """One of our networks and a training step of it."""
    overrides = {} if name == "encnet_se" else {"model": "fcn"}
    recipe = "folder_encnet_lite0" if name == "encnet_se" else "_folder_lite0"
    config = build(recipe, {"data": ".", **overrides})
    model = create_model(num_classes=CLASSES, **config.model.options())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = SegmentationLoss(CLASSES, **config.optim.loss_options())
    optimizer = make_optimizer(model, config.optim)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = criterion(model(images), labels).total
        return _stepped(loss, optimizer)

    return model, step


def theirs(name: str) -> tuple[nn.Module, Step]:
    """A network of segmentation_models.pytorch and a training step of it.

    Raises:
        ValueError: it is not installed.
    """
    criterion = import_smp().losses.DiceLoss("multiclass")
    model = create(name, CLASSES)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return _stepped(criterion(model(images), labels.long()), optimizer)

    return model, step


def _stepped(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def measure(name: str, crop: tuple[int, int], batch: int) -> Found:
    """Train a network for a few steps in this process."""
    torch.manual_seed(0)
    model, step = (ours if name in OURS else theirs)(name)
    images = torch.randn(batch, 3, *crop).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch, *crop), dtype=torch.uint8)
    model.eval()
    counted = gmac(lambda: model(images[:1]))
    model.train()
    timing.forget_peak()
    before, times = timing.resident(), []
    for _ in range(WARM_UP + STEPS):
        start = time.process_time()
        step(images, labels)
        times.append(time.process_time() - start)
    return Found(
        parameters=sum(p.numel() for p in model.parameters()),
        gmac=counted,
        seconds=statistics.median(times[WARM_UP:]),
        extra_mib=(timing.peak_resident() - before) / 2**20,
    )


def _table(found: dict[str, Found], options: argparse.Namespace) -> Table:
    crop = f"{options.crop[0]} x {options.crop[1]}"
    table = Table(title=f"training step, {options.batch} images of {crop}, {TRUNK}")
    table.add_column("network")
    for column in ("parameters", "GMAC", "CPU seconds", "images per CPU second", "extra MiB"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        label = OURS.get(name, f"smp {name}")
        speed = options.batch / one.seconds
        row = (f"{one.parameters:,}", f"{one.gmac:.2f}", f"{one.seconds:.2f}", f"{speed:.2f}")
        table.add_row(label, *row, f"{one.extra_mib:.0f}")
    table.caption = report.machine(torch.device("cpu"))
    return table


def run(options: argparse.Namespace) -> int:
    """Measure all networks and print the table, or with --network one, in this process."""
    if options.network:
        print(json.dumps(asdict(measure(options.network, options.crop, options.batch))))
        return 0
    shape = ["--crop", "{}x{}".format(*options.crop), "--batch", str(options.batch)]
    found: dict[str, Any] = {}
    for name in (*OURS, *THEIRS):
        found[name] = Found(**apart.measured(["smp", "--network", name, *shape]))
    Console(width=110).print(_table(found, options))
    if options.json is not None:
        write_json({name: asdict(one) for name, one in found.items()}, options.json)
    return 0
