"""What context is worth on photographs: networks on one pretrained trunk, several seeds each.

    python -m bench real --data DIR --pretrained efficientnet-lite0-57934424.pth --ignore-label 11

Every run is an ordinary run of the trainer, in a folder of its own below --out, with the same
images, order of samples and steps for all networks. You can stop the command at any time and give
it again: finished runs are kept, and the interrupted one continues from its last checkpoint.

--study settings compares learning rates and other settings of one network instead. Choose on the
validation images. When all runs are finished, --test scores the last weights on the test images, of
every network or of the setting that is best on the validation images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.apart import Failed
from bench.context import (
    Figures,
    draw,
    images_per_second,
    last_validation,
    peak_memory_gib,
    score_table,
    spread,
    train,
)
from bench.details import Details, detail_tables, details
from bench.options import add_json
from bench.static.cost import gmac
from bench.studies import STUDIES, Run
from encnet_triton.data import Dataset, create_dataset
from encnet_triton.files import write_json
from encnet_triton.inference.windows import resized, window_starts
from encnet_triton.options import whole
from encnet_triton.pictures import save_figure
from encnet_triton.train.config import Config
from encnet_triton.train.run_folder import finished
from encnet_triton.weights import load_model

TIMED_STEPS = 8
GRID: Sequence[str] = ("fcn", "encnet_se")  # the columns of grid.png
FORWARD = 1 / 3  # of the time of a training step, per pixel


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command; all others go to the trainer."""
    parser.add_argument("--data", required=True, help="a folder data set")
    parser.add_argument("--study", choices=STUDIES, default="networks", help="default networks")
    parser.add_argument("--only", help="rows of the study, such as fcn,encnet_se (default: all)")
    parser.add_argument(
        "--seeds", type=whole(1), help="runs of each row (default: 5 or 2; for settings 1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/real"), help="their folder (default %(default)s)"
    )
    parser.add_argument(
        "--show", action="store_true", help="train nothing; print what is finished and what is left"
    )
    parser.add_argument(
        "--details", action="store_true", help="IoU by class and area; one more validation per run"
    )
    parser.add_argument("--test", action="store_true", help="score the split test at the end")
    add_json(parser)


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that an unfinished study compares whole seeds.

    Raises:
        ValueError: --only names a row that the study does not have.
    """
    study = STUDIES[options.study]
    rows = options.only.split(",") if options.only else list(study.variants)
    if unknown := [row for row in rows if row not in study.variants]:
        known = ", ".join(study.variants)
        raise ValueError(f"--only {unknown[0]}: the study {options.study} has only {known}")
    seeds = {row: options.seeds or study.variants[row].seeds for row in rows}
    shared = ["--data", options.data, *options.extra]
    return [
        Run(row, seed, study.recipe, [*shared, *study.variants[row].options], options.out)
        for seed in range(max(seeds.values()))
        for row in rows
        if seed < seeds[row]
    ]


def images(config: Config, split: str) -> Dataset:
    """A split of a run's data set."""
    data = config.data
    return create_dataset(data.dataset, split, data.data, **data.dataset_options())


def work(config: Config) -> float:
    """Images that a run trains on, plus those it validates, weighted by the time that they take."""
    data, epochs, every = config.data, config.optim.epochs, config.run.val_every
    train_images, val_images = images(config, data.train_split), images(config, data.val_split)
    width, height = val_images[0].image.size
    edges = resized(height, width, data.base_size, data.scale_by)
    down, across = (len(window_starts(edges[i], data.crop[i])) for i in range(2))
    validations = -(-epochs // every) if every else 1
    each = down * across * FORWARD
    return epochs * len(train_images) + validations * len(val_images) * each


def forecast(runs: list[Run], done: list[Run]) -> float:
    """Hours that ``runs`` will take, from the speed of those done, or else of a few steps."""
    timed = done or [_timing(runs[0])]
    speed = statistics.median(images_per_second(run.place) for run in timed)
    return sum(work(run.config) for run in runs) / speed / 3600


def _timing(run: Run) -> Run:
    """The first steps of a run, in a folder of its own."""
    few = ["--stop-at", str(TIMED_STEPS), "--log-every", str(TIMED_STEPS // 2)]
    trial = Run(f"timing_{run.variant}", run.seed, run.recipe, [*run.options, *few], run.folder)
    train(trial.recipe, trial.seed, trial.folder, trial.options, trial.name, quiet=True)
    return trial


def cost(run: Run) -> dict[str, float]:
    """Parameters, multiply-accumulates of a forward pass of one crop, and what the run recorded."""
    model, info = load_model(run.weights)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmac": gmac(lambda: model(torch.zeros(1, 3, *info.crop))),
        "images_per_second": images_per_second(run.place),
        "peak_memory_gib": peak_memory_gib(run.place),
    }


def cost_table(costs: dict[str, dict[str, float]]) -> Table:
    """What each network costs."""
    table = Table(title="forward pass of one crop; speed and memory of training, as recorded")
    table.add_column("network")
    for column in ("parameters", "GMAC", "images/s", "peak GiB"):
        table.add_column(column, justify="right")
    for label, row in costs.items():
        speed, memory = row["images_per_second"], row["peak_memory_gib"]
        table.add_row(
            label,
            f"{row['parameters']:,.0f}", f"{row['gmac']:.2f}", f"{speed:.2f}", f"{memory:.2f}",
        )  # fmt: skip
    return table


def draw_bars(scores: dict[str, dict[int, Figures]], file: Path) -> bool:
    """The mIoU of each row with its standard error; False where matplotlib is not installed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, rows in enumerate(scores.values()):
            mean, error = spread([row["miou"] for row in rows.values()])
            axes.barh(place, mean, xerr=error if len(rows) > 1 else 0, color="C0", capsize=3)
            axes.text(1, place, f"{mean:.1f}", va="center", color="white")
        axes.set(xlabel="mIoU of the validation images, %", xlim=(0, 100))
        axes.set_yticks(range(len(scores)), list(scores))
        axes.invert_yaxis()

    return save_figure(draw, (7, 0.45 * len(scores) + 1), file)


def collect(runs: list[Run], figures: Any) -> dict[str, dict[int, Figures]]:
    """``figures`` of each run, by variant and seed."""
    scores: dict[str, dict[int, Figures]] = {}
    for run in runs:
        scores.setdefault(run.variant, {})[run.seed] = figures(run)
    return scores


def firsts(runs: list[Run]) -> dict[str, Run]:
    """The first seed of each variant."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.variant, run)
    return found


def test_scores(run: Run) -> Figures:
    """Scores of the last weights on the split test; computed once, then read."""
    file = run.place / "test.json"
    if not file.exists():
        command = [sys.executable, "-m", "encnet_triton.evaluate", "--split", "test"]
        command += ["--checkpoint", str(run.weights), "--json", str(file)]
        if status := subprocess.run(command).returncode:
            raise Failed(f"scoring {run.name} on test ended with status {status}")
    found: Figures = json.loads(file.read_text(encoding="utf-8"))
    return found


def run_details(run: Run) -> Details:
    """Details of the last weights on the validation images; computed once, then read."""
    file = run.place / "details.json"
    if not file.exists():
        write_json(details(run.weights, images(run.config, run.config.data.val_split)), file)
    found: Details = json.loads(file.read_text(encoding="utf-8"))
    return found


def chosen(study: str, runs: list[Run], scores: dict[str, dict[int, Figures]]) -> list[Run]:
    """The runs to be scored on test: all networks, or only the best setting."""
    if study == "networks":
        return runs
    means = {k: statistics.mean(r["miou"] for r in rows.values()) for k, rows in scores.items()}
    best = max(means, key=lambda variant: means[variant])
    return [run for run in runs if run.variant == best]


def train_all(runs: list[Run], console: Console) -> None:
    """Train what is not finished, and say before each run how long the rest takes."""
    done = [run for run in runs if finished(run.config)]
    left = [run for run in runs if run not in done]
    while left:
        hours = forecast(left, done)
        console.rule(f"{left[0].name}; {len(left)} of {len(runs)} runs left, {hours:.1f} hours")
        run = left.pop(0)
        train(run.recipe, run.seed, run.folder, run.options, run.name)
        done.append(run)


def _sections(
    options: argparse.Namespace, runs: list[Run], done: list[Run]
) -> Iterator[tuple[str, Table, Any]]:
    """Name, table and figures of each part of the result."""
    study = STUDIES[options.study]
    scores = collect(done, lambda run: last_validation(run.place))
    yield "val", score_table("validation images, last weights", scores, study.bases), scores
    costs = {variant: cost(run) for variant, run in firsts(done).items()}
    yield "cost", cost_table(costs), costs
    if options.details:
        found = collect(done, run_details)
        for table in detail_tables(found):
            yield "details", table, found
    if options.test and len(done) < len(runs):
        raise ValueError("--test scores the test images when all runs are finished, not before")
    if options.test:
        tested = collect(chosen(options.study, done, scores), test_scores)
        yield "test", score_table("test images, last weights", tested, study.bases), tested


def run(options: argparse.Namespace) -> int:
    """Train what is left, and print the tables of what is finished."""
    console = Console()
    runs = plan(options)
    if not options.show:
        train_all(runs, console)
    done = [run for run in runs if finished(run.config)]
    console.print(f"{len(done)} of {len(runs)} runs are finished, in {options.out}")
    if not done:
        return 0
    document: dict[str, Any] = {}
    for name, table, figures in _sections(options, runs, done):
        console.print(table)
        document[name] = figures
    if options.json is not None:
        write_json(document, options.json)
    draw_bars(document["val"], options.out / "bars.png")
    first = firsts(done)
    shown = {name: first[name].weights for name in GRID if name in first}
    if len(shown) == len(GRID):
        val = images(done[0].config, done[0].config.data.val_split)
        draw(shown, val, options.out / "grid.png")
    return 0
