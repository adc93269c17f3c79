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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.apart import Failed
from bench.options import add_json, place
from encnet_triton.data import Dataset, create_dataset
from encnet_triton.files import write_json
from encnet_triton.inference import compare_checkpoints
from encnet_triton.options import whole
from encnet_triton.pictures import save_png
from encnet_triton.train.log import is_number, read_records

RECIPES = {"FCN": "scenes_fcn", "EncNet": "scenes_encnet", "EncNet+SE": "scenes"}
Figures = dict[str, Any]


def train(
    recipe: str, seed: int, folder: Path, extra: list[str], name: str, quiet: bool = False
) -> None:
    """Run one training to its end, or go on with it.

    Args:
        recipe, seed: of the run.
        folder: of all runs.
        extra: options of the trainer.
        name: of the run.
        quiet: show only its errors.
    """
    command = [sys.executable, "-m", "encnet_triton.train", "--recipe", recipe, "--resume"]
    command += ["--seed", str(seed), "--runs", str(folder), "--name", name, *extra]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode:
        raise Failed(f"the training {name} ended with status {status}")


def last_validation(folder: Path) -> Figures:
    """What the last validation of a run recorded."""
    scores = [record for record in read_records(folder) if record["kind"] == "val"]
    if not scores:
        raise Failed(f"the training {folder.name} ended before a validation: it has no score")
    return scores[-1]


def images_per_second(folder: Path) -> float:
    """The median over the records of a run."""
    return statistics.median(_recorded(folder, "images_per_second"))


def peak_memory_gib(folder: Path) -> float:
    """The most that a run recorded."""
    return max(_recorded(folder, "peak_memory_gib"))


def _recorded(folder: Path, key: str) -> list[float]:
    records = [record for record in read_records(folder) if record["kind"] == "train"]
    return [float(record[key]) for record in records if is_number(record.get(key))]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error, in points."""
    points = [100 * v for v in values]
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else float("nan")
    return statistics.mean(points), error


def score_table(title: str, scores: Mapping[str, Mapping[int, Figures]], bases: list[str]) -> Table:
    """Mean and standard error of each network's runs, and of their differences from ``bases``.

    Args:
        title: of the table.
        scores: for each network the last validation of each seed. Two networks are compared seed by
            seed, over the seeds that both have.
        bases: networks to subtract; those without runs are left out.
    """
    bases = [base for base in bases if scores.get(base)]
    table = Table(title=title)
    for column in ("network", "seeds", "mIoU", "pixAcc", *(f"minus {base}" for base in bases)):
        table.add_column(column, justify="left" if column == "network" else "right")
    for label, rows in scores.items():
        cells = [label, str(len(rows))]
        for name in ("miou", "pixel_accuracy"):
            cells.append(_cell([row[name] for row in rows.values()], "{:.2f}"))
        for base in bases:
            both = sorted(rows.keys() & scores[base].keys())
            differences = [rows[seed]["miou"] - scores[base][seed]["miou"] for seed in both]
            cells.append(_cell([] if label == base else differences, "{:+.2f}"))
        table.add_row(*cells)
    return table


def _cell(values: list[float], form: str) -> str:
    """Mean and standard error in words; the error of one value is not known."""
    if not values:
        return ""
    mean, error = spread(values)
    return form.format(mean) + (f" ± {error:.2f}" if len(values) > 1 else "")


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


def draw(checkpoints: Mapping[str, Path], data: Dataset, file: Path) -> None:
    """Image, predictions of the checkpoints and label of three images, in 255 colours."""
    picture = compare_checkpoints(checkpoints, data, torch.device("cpu"), rows=3)
    save_png(picture.quantize(255), file)


def run(options: argparse.Namespace) -> int:
    """Train every recipe with every seed and print the table, with differences per seed."""
    console = Console()
    scores: dict[str, dict[int, Figures]] = {}
    for seed in range(options.seeds):
        for label, recipe in RECIPES.items():
            console.rule(f"{label}, seed {seed}")
            name = f"{recipe}-seed{seed}"
            train(recipe, seed, options.runs, options.extra, name)
            scores.setdefault(label, {})[seed] = last_validation(options.runs / name)
    title = f"scenes, {options.seeds} seeds: mean and standard error of the mean, in points"
    console.print(score_table(title, scores, ["FCN", "EncNet"]))
    if options.json is not None:
        write_json({label: list(rows.values()) for label, rows in scores.items()}, options.json)
    if options.picture is not None:
        checkpoints = {
            heading: options.runs / f"{RECIPES[label]}-seed0" / "last.safetensors"
            for heading, label in (("FCN", "FCN"), ("EncNet", "EncNet+SE"))
        }
        draw(checkpoints, create_dataset("scenes", "val"), options.picture)
    return 0
