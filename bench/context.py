"""What context is worth: FCN, EncNet and EncNet+SE on the embedded data set, several seeds each.

The three recipes differ only in the network's head: trunk, data, order of samples and number of
steps are the same. Each run is an ordinary training run; one that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.apart import Failed
from bench.options import add_json, place
from encnet_triton.data import create_dataset
from encnet_triton.files import write_json
from encnet_triton.inference import compare_checkpoints
from encnet_triton.options import whole
from encnet_triton.pictures import save_png
from encnet_triton.train.log import read_records

RECIPES = {"FCN": "scenes_fcn", "EncNet": "scenes_encnet", "EncNet+SE": "scenes"}


def train(recipe: str, seed: int, folder: Path, extra: list[str]) -> dict[str, float]:
    """Run one training to its end; returns its last validation record."""
    name = f"{recipe}-seed{seed}"
    command = [sys.executable, "-m", "encnet_triton.train", "--recipe", recipe, "--resume"]
    command += ["--seed", str(seed), "--runs", str(folder), "--name", name, *extra]
    if status := subprocess.run(command).returncode:
        raise Failed(f"the training {name} ended with status {status}")
    return [record for record in read_records(folder / name) if record["kind"] == "val"][-1]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error, in points."""
    points = [100 * v for v in values]
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else float("nan")
    return statistics.mean(points), error


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command; all others go to the trainer."""
    parser.add_argument(
        "--seeds", type=whole(1), default=3, help="runs of each network (default %(default)s)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/context"), help="their folder (default %(default)s)"
    )
    parser.add_argument(
        "--picture", type=place, help="also draw what FCN and EncNet+SE predict (seed 0), a PNG"
    )
    add_json(parser)


def draw(folder: Path, file: Path) -> None:
    """Image, FCN, EncNet+SE and label of three validation images, in 255 colours."""
    checkpoints = {
        heading: folder / f"{RECIPES[label]}-seed0" / "last.safetensors"
        for heading, label in (("FCN", "FCN"), ("EncNet", "EncNet+SE"))
    }
    data = create_dataset("scenes", "val")
    picture = compare_checkpoints(checkpoints, data, torch.device("cpu"), rows=3)
    save_png(picture.quantize(255), file)


def run(options: argparse.Namespace) -> int:
    """Train every recipe with every seed and print the table, with differences per seed."""
    console = Console()
    scores: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for label, recipe in RECIPES.items():
            console.rule(f"{label}, seed {seed}")
            scores.setdefault(label, []).append(train(recipe, seed, options.runs, options.extra))
    table = Table(
        title=f"scenes, {options.seeds} seeds: mean and standard error of the mean, in points"
    )
    for column in ("network", "mIoU", "pixAcc", "minus FCN", "minus EncNet"):
        table.add_column(column, justify="left" if column == "network" else "right")
    miou = {label: [r["miou"] for r in rows] for label, rows in scores.items()}
    for label, rows in scores.items():
        cells = [label]
        for values in (miou[label], [r["pixel_accuracy"] for r in rows]):
            cells.append("{:.2f} ± {:.2f}".format(*spread(values)))
        for base in ("FCN", "EncNet"):
            differences = [a - b for a, b in zip(miou[label], miou[base], strict=True)]
            cells.append("" if label == base else "{:+.2f} ± {:.2f}".format(*spread(differences)))
        table.add_row(*cells)
    console.print(table)
    if options.json is not None:
        write_json(scores, options.json)
    if options.picture is not None:
        draw(options.runs, options.picture)
    return 0
