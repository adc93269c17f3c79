"""Networks of segmentation_models.pytorch trained by our trainer, beside ours.

    python -m bench smp_train --data DIR --pretrained efficientnet-lite0-57934424.pth --epochs 10

All have EfficientNet-Lite0 as their trunk and see the same images in the same order for as many
steps. Theirs are trained twice: with the loss, optimizer and rate of their CamVid example (`own`),
and with ours (`recipe`). Other options go to the trainer; given again, the command continues.
Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.apart import Failed
from bench.context import images_per_second, last_validation, peak_memory_gib
from bench.options import add_json
from encnet_triton.files import write_json
from encnet_triton.models.trunk import TimmTrunk
from encnet_triton.nn import LossTerms
from encnet_triton.nn.output import SegmentationOutput
from encnet_triton.train import cli, distributed
from encnet_triton.train.config import Config
from encnet_triton.train.distributed import World
from encnet_triton.train.run_folder import finished
from encnet_triton.train.segmentation import Segmentation
from encnet_triton.train.trainer import train
from encnet_triton.weights import load_backbone

TRUNK = "tf_efficientnet_lite0"
THEIRS = ("FPN", "DeepLabV3Plus", "Unet")
RATE = 2e-4


@dataclass(frozen=True)
class Row:
    """A training: options of the trainer, the network if it is theirs, whether the loss is too."""

    options: tuple[str, ...]
    theirs: str = ""
    own: bool = False


def _rows() -> dict[str, Row]:
    base = ("--recipe", "_folder_lite0")
    # AdamW without decay is Adam.
    own = f"--lr {RATE} --weight-decay 0 --layer-decay 1 --warmup-steps 0 --class-weight none"
    rows = {
        "encnet": Row(("--recipe", "folder_encnet_lite0")),
        "fcn": Row((*base, "--model", "fcn")),
    }
    for name in THEIRS:
        rows[f"{name}_own"] = Row((*base, *own.split()), name, own=True)
        rows[f"{name}_recipe"] = Row(base, name)
    return rows


ROWS = _rows()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command; all others go to the trainer."""
    parser.add_argument("--data", required=True, help="a folder data set")
    parser.add_argument("--only", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smp"), help="their folder (default %(default)s)"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    add_json(parser)


def import_smp() -> Any:
    """segmentation_models.pytorch, or a `ValueError` that says how to get it."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise ValueError(
            "segmentation_models.pytorch is not installed: pip install '.[peers]'"
        ) from None
    return smp


def create(name: str, classes: int) -> nn.Module:
    """A network of theirs on the light trunk, from random weights."""
    made: nn.Module = import_smp().create_model(
        name, f"tu-{TRUNK}", encoder_weights=None, classes=classes
    )
    return made


class Dice(nn.Module):
    """Their Dice loss in place of `SegmentationLoss`."""

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._dice = import_smp().losses.DiceLoss("multiclass", ignore_index=ignore_index)

    def pixels_in(self, target: Tensor) -> Tensor:
        """Labelled pixels."""
        return (target != self.ignore_index).sum(dtype=torch.float64)

    def forward(self, output: SegmentationOutput, target: Tensor, **_: Any) -> LossTerms:
        loss = self._dice(output.logits.float(), target.long())
        none = loss.new_zeros(())
        return LossTerms(loss, loss.detach(), none, none)


class Adapted(nn.Module):
    """A network of theirs behind the interface that our trainer uses."""

    align_corners = False  # its logits have the size of the image

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        self.options = {"model": f"smp {name}"}
        self.net = create(name, classes)

    def forward(self, x: Tensor) -> SegmentationOutput:
        return SegmentationOutput(self.net(x), (), None)

    @property
    def backbone(self) -> TimmTrunk:
        """Its encoder as our trunk, which knows its stages and reads its weights."""
        trunk = TimmTrunk.__new__(TimmTrunk)
        nn.Module.__init__(trunk)
        trunk.name, trunk.net = TRUNK, self.net.encoder.model  # type: ignore[union-attr,assignment]
        return trunk

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of the trunk, and the others."""
        trunk = list(self.backbone.parameters())
        known = set(map(id, trunk))
        return {"backbone": trunk, "head": [p for p in self.parameters() if id(p) not in known]}


class Theirs(Segmentation):
    """Training of one of their networks."""

    def __init__(self, config: Config, world: World, name: str, own: bool) -> None:
        self._name = name
        super().__init__(config, world)
        if own:
            self.loss = Dice(self.train_set.ignore_index)  # type: ignore[assignment]

    def network(self, classes: int) -> nn.Module:
        """What is trained, its trunk with the pretrained weights if the configuration has any."""
        made = Adapted(self._name, classes)
        if self.config.model.pretrained:
            load_backbone(made, self.config.model.pretrained)
        return made


def configuration(name: str, options: argparse.Namespace) -> Config:
    """What the trainer is given for a row."""
    given = ["--data", options.data, "--runs", str(options.out), "--name", name, "--resume"]
    return cli.configuration(cli.parse([*ROWS[name].options, *given, *options.extra]))


def chosen(options: argparse.Namespace) -> list[str]:
    """The rows of --only.

    Raises:
        ValueError: there is no such row.
    """
    names = options.only.split(",") if options.only else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"--only {unknown[0]}: there are only {', '.join(ROWS)}")
    return names


def train_row(name: str, config: Config) -> None:
    """Train a row in this process."""
    row = ROWS[name]
    make = partial(Theirs, name=row.theirs, own=row.own) if row.theirs else None
    train(config, distributed.start(config.run.device), make)


def _label(name: str) -> str:
    return f"smp {name}" if ROWS[name].theirs else name


def _table(found: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"trained on one trunk, {TRUNK}: validation with the last weights")
    table.add_column("network")
    for column in ("mIoU %", "pixAcc %", "images/s", "peak GiB"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        scores = (f"{100 * one['miou']:.1f}", f"{100 * one['pixel_accuracy']:.1f}")
        cost = (f"{one['images_per_second']:.2f}", f"{one['peak_memory_gib']:.2f}")
        table.add_row(_label(name), *scores, *cost)
    return table


def run(options: argparse.Namespace) -> int:
    """Train all rows, each in a process of its own, and print the table."""
    if options.row:
        train_row(options.row, configuration(options.row, options))
        return 0
    console, names = Console(), chosen(options)
    import_smp()
    configs = {name: configuration(name, options) for name in names}
    found: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        if not finished(config):
            console.rule(_label(name))
            command = [sys.executable, "-m", "bench", "smp_train", "--row", name]
            command += ["--data", options.data, "--out", str(options.out), *options.extra]
            if status := subprocess.run(command).returncode:
                raise Failed(f"the training {name} ended with status {status}")
        place = options.out / name
        last = last_validation(place)
        found[name] = {key: last[key] for key in ("miou", "pixel_accuracy")}
        found[name]["images_per_second"] = images_per_second(place)
        found[name]["peak_memory_gib"] = peak_memory_gib(place)
    console.print(_table(found))
    if options.json is not None:
        write_json(found, options.json)
    return 0
