"""The cost of global context: ``python -m bench static cost``.

Multiply-accumulates of a forward pass in evaluation at 480 x 480, of each form of EncNet and of the
FCN with the same trunk. torch's FLOP counter counts them on tensors without values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.options import add_json
from encnet_triton.files import write_json
from encnet_triton.kernels import encode
from encnet_triton.models import create_model

CLASSES, SIZE, STRIDE = 150, 480, 8
CHANNELS, CODEWORDS = 512, 32

NETWORKS: dict[str, dict[str, Any]] = {
    "FCN": {"name": "fcn"},
    "EncNet, paper's form": {"name": "encnet", "form": "paper"},
    "EncNet, released form": {"name": "encnet", "form": "released"},
    "EncNet, released form, lateral": {"name": "encnet", "form": "released", "lateral": True},
}


@dataclass(frozen=True)
class Cost:
    """A network and its multiply-accumulates, in 1e9, for one image."""

    network: str
    backbone: str
    gmac: float
    over_fcn: float


def gmac(forward: Callable[[], object]) -> float:
    """Multiply-accumulates of a call, in 1e9; autograd records nothing of it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops()) / 2e9


def encoding_gmac() -> float:
    """The Encoding layer alone: 512 channels, 32 codewords, 60 x 60 positions."""
    side = SIZE // STRIDE
    with FakeTensorMode():
        x = torch.empty(1, CHANNELS, side, side)
        codewords, scale = torch.empty(CODEWORDS, CHANNELS), torch.empty(CODEWORDS)
        return gmac(lambda: encode(x, codewords, scale))


def network_gmac(backbone: str, options: dict[str, Any]) -> float:
    """A whole network for one image."""
    with FakeTensorMode():
        model = create_model(num_classes=CLASSES, backbone=backbone, **options).eval()
        return gmac(lambda: model(torch.empty(1, 3, SIZE, SIZE)))


def costs(backbones: tuple[str, ...] = ("resnet50", "resnet101")) -> list[Cost]:
    """Every network on every trunk."""
    found = []
    for backbone in backbones:
        counts = {name: network_gmac(backbone, options) for name, options in NETWORKS.items()}
        for name, gmac in counts.items():
            found.append(Cost(name, backbone, gmac, gmac / counts["FCN"] - 1))
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    rows = costs()
    table = Table(title=f"forward, one image of {SIZE} x {SIZE}, {CLASSES} classes, counted")
    table.add_column("network")
    for column in ("trunk", "GMAC", "over FCN"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.network, row.backbone, f"{row.gmac:.1f}", f"{row.over_fcn:+.2%}")
    alone = encoding_gmac()
    table.caption = (
        f"the Encoding layer alone: {alone:.3f} GMAC; "
        "the paper says 3% to 5% for its context module"
    )
    Console(width=100).print(table)
    if options.json is not None:
        document = {"encoding_gmac": alone, "networks": [asdict(row) for row in rows]}
        write_json(document, options.json)
    return 0
