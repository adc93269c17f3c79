"""All rows of a table of the paper in one command: ``--sweep table1``.

Rows that are complete are left as they are, others are resumed or started. Afterwards the sweep's
folder holds ``<sweep>.md`` and ``<sweep>.json`` with the paper's figures beside, ``<sweep>.png``
where the rows are points of curves (and matplotlib is installed), and ``<sweep>_grid.png``, what
two of the networks predict for the same images.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from encnet_triton.checkpoint import load_model
from encnet_triton.data import Dataset, create_dataset
from encnet_triton.evaluate import confusion, write_json
from encnet_triton.inference import PAPER_SCALES, Predictor, Views
from encnet_triton.pictures import comparison, save_png
from encnet_triton.protocols import protocol_scores
from encnet_triton.train import checkpoint, distributed
from encnet_triton.train import run as runs
from encnet_triton.train.config import Config, ConfigError, closest
from encnet_triton.train.recipe import build_stages

SWEEPS = Path(__file__).parent / "sweeps"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: what the table calls it.
        recipe, fields: what is trained.
        run: folder below the sweep's; rows with one folder are one training.
        paper: pixAcc and mIoU, or another figure, in percent, as the paper prints them; may be
            empty.
        multi_scale: six scales and mirror images.
        protocol: name in `protocol_scores` that the figure is counted by; "" for the first.
        curve, x: name of the curve and place on its axis, for a figure.
    """

    label: str
    recipe: str
    fields: dict[str, Any]
    run: str
    paper: tuple[float, ...] = ()
    multi_scale: bool = False
    protocol: str = ""
    curve: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A table: its rows, and the two runs whose predictions are drawn side by side, if any."""

    title: str
    rows: tuple[Row, ...]
    grid: tuple[str, str] | None


@dataclass(frozen=True)
class Planned:
    """A row and the configurations of its stages."""

    row: Row
    configs: list[Config]

    @property
    def checkpoint(self) -> Path:
        """The last weights of the last stage."""
        last = self.configs[-1].run
        return Path(last.runs) / last.name / checkpoint.LAST


def sweep_names() -> list[str]:
    """Sweeps that come with the package."""
    return sorted(path.stem for path in SWEEPS.glob("*.toml"))


def read_sweep(name: str) -> Sweep:
    """A sweep by name.

    Raises:
        ConfigError: there is none of this name.
    """
    path = SWEEPS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"unknown sweep {name!r}{closest(name, sweep_names())}")
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = tuple(
        Row(
            label=row["label"],
            recipe=row["recipe"],
            fields=row.get("set", {}),
            run=row["run"],
            paper=tuple(row.get("paper", ())),
            multi_scale=row.get("multi_scale", False),
            protocol=row.get("protocol", ""),
            curve=row.get("curve", ""),
            x=row.get("x", 0.0),
        )
        for row in document["row"]
    )
    grid = document.get("grid")
    return Sweep(document["title"], rows, (grid[0], grid[1]) if grid else None)


def configurations(name: str, overrides: Mapping[str, Any]) -> list[Planned]:
    """Every row with its configurations; the overrides apply to all.

    The sweep's folder is ``runs/<name>``, or has the name that the overrides give.

    Raises:
        ConfigError: a row or an override is wrong.
    """
    shared = {k: v for k, v in overrides.items() if k not in ("name", "runs", "resume")}
    folder = Path(str(overrides.get("runs", "runs"))) / str(overrides.get("name", name))
    planned = []
    for row in read_sweep(name).rows:
        own = {"runs": str(folder), "name": row.run, "resume": True}
        planned.append(Planned(row, build_stages(row.recipe, {**row.fields, **shared, **own})))
    return planned


def run(name: str, planned: list[Planned], world: distributed.World) -> None:
    """Train what is not complete yet, then write the table and the pictures."""
    sweep = read_sweep(name)
    done: dict[str, bool] = {}
    for one in planned:
        if one.row.run not in done:
            done[one.row.run] = runs.train_all(_unfinished(one.configs), world)
        if not done[one.row.run]:
            return  # asked to stop
    measured = [_measure(one, world) for one in planned]
    if not world.main:
        return
    folder = planned_folder(planned)
    _write_tables(sweep, planned, measured, folder / name)
    _draw_curves(planned, measured, folder / f"{name}.png")
    if sweep.grid is not None:
        _draw_grid(sweep.grid, planned, world, folder / f"{name}_grid.png")
    Console().print(f"table and pictures: {folder}")


def planned_folder(planned: list[Planned]) -> Path:
    """The sweep's folder: that of the first row's run, or of its stages, one level up."""
    config = planned[0].configs[0].run
    folder = Path(config.runs)
    return folder.parent if len(planned[0].configs) > 1 else folder


def _unfinished(configs: list[Config]) -> list[Config]:
    return [c for c in configs if not all(distributed.gather(runs.finished(c)))]


def _measure(one: Planned, world: distributed.World) -> dict[str, float]:
    """pixAcc and mIoU of a row, in percent; a row's evaluation is kept beside its checkpoint."""
    kept = one.checkpoint.parent / f"{'multi' if one.row.multi_scale else 'single'}_scale.json"
    if all(distributed.gather(kept.is_file())):
        document = json.loads(kept.read_text(encoding="utf-8"))
    else:
        model, info = load_model(one.checkpoint, world.device)
        views = Views(PAPER_SCALES, flip=True) if one.row.multi_scale else Views()
        predictor = Predictor(model, info, device=world.device, views=views)
        data = _validation_set(one.configs[-1])
        matrix = confusion(predictor, data, rank=world.rank, world_size=world.size)
        found = protocol_scores(matrix, one.configs[-1].data.dataset)
        document = {p.name: [100 * p.pixel_accuracy, 100 * p.miou] for p in found}
        if world.main:
            write_json(document, kept)
    name = one.row.protocol or next(iter(document))
    if name not in document:
        raise ConfigError(f"{kept} has no protocol {name!r}, only {', '.join(document)}")
    accuracy, miou = document[name]
    return {"pixel_accuracy": accuracy, "miou": miou}


def _validation_set(config: Config) -> Dataset:
    data = config.data
    return create_dataset(data.dataset, data.val_split, data.data, **data.dataset_options())


def _write_tables(
    sweep: Sweep, planned: list[Planned], measured: list[dict[str, float]], path: Path
) -> None:
    header = ("", "pixAcc %", "mIoU %", "paper")
    rows = [
        (
            one.row.label,
            f"{found['pixel_accuracy']:.2f}",
            f"{found['miou']:.2f}",
            " / ".join(f"{value:g}" for value in one.row.paper),
        )
        for one, found in zip(planned, measured, strict=True)
    ]
    table = Table(*header, title=sweep.title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * 4, *rows)]
    _write_text(f"{sweep.title}\n\n" + "\n".join(lines) + "\n", path.with_suffix(".md"))
    document = [
        {"label": one.row.label, "run": one.row.run, "paper": list(one.row.paper), **found}
        for one, found in zip(planned, measured, strict=True)
    ]
    write_json({"title": sweep.title, "rows": document}, path.with_suffix(".json"))


def _write_text(text: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _draw_curves(planned: list[Planned], measured: list[dict[str, float]], path: Path) -> None:
    """mIoU and pixAcc over the place of each row, one panel a curve (paper, figure 5)."""
    curves = list(dict.fromkeys(one.row.curve for one in planned if one.row.curve))
    if not curves:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    for panel, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        points = sorted(
            (one.row.x, found["miou"], found["pixel_accuracy"])
            for one, found in zip(planned, measured, strict=True)
            if one.row.curve == curve
        )
        places = np.arange(len(points))
        panel.plot(places, [p[1] for p in points], marker="o", label="mIoU")
        panel.plot(places, [p[2] for p in points], marker="s", label="pixAcc")
        panel.set(xlabel=curve, ylabel="%", xticks=places)
        panel.set_xticklabels([f"{p[0]:g}" for p in points])
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def _draw_grid(
    names: tuple[str, str], planned: list[Planned], world: distributed.World, path: Path
) -> None:
    """Image, label and the predictions of two runs, for a few validation images (figures 4, 6)."""
    chosen = [next(one for one in planned if one.row.run == name) for name in names]
    data = _validation_set(chosen[0].configs[-1])
    indices = np.linspace(0, len(data) - 1, min(4, len(data))).round().astype(int).tolist()
    samples = [data[index] for index in indices]
    columns = []
    for one in chosen:
        model, info = load_model(one.checkpoint, world.device)
        predictor = Predictor(model, info, device=world.device)
        columns.append([predictor(np.asarray(s.image)).cpu().numpy() for s in samples])
    rows = [
        (np.asarray(s.image), s.label, *predictions)
        for s, *predictions in zip(samples, *columns, strict=True)
    ]
    headings = ("image", "label", *(one.row.label for one in chosen))
    save_png(comparison(rows, headings, data.classes, data.palette), path)
