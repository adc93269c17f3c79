"""Tables and figures of the paper that hold pixAcc and mIoU: measured, written and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from encnet_triton.data import Dataset, create_dataset
from encnet_triton.files import write_json
from encnet_triton.inference import PAPER_SCALES, Predictor, Views, compare_checkpoints
from encnet_triton.pictures import save_figure, save_png
from encnet_triton.scoring import confusion
from encnet_triton.scoring.protocols import protocol_scores
from encnet_triton.train import distributed
from encnet_triton.train.config import Config, ConfigError
from encnet_triton.train.sweeps.plan import Planned, Sweep
from encnet_triton.train.sweeps.table import show_and_write
from encnet_triton.weights.checkpoint import load_model


def report(
    name: str, sweep: Sweep, planned: list[Planned], folder: Path, world: distributed.World
) -> None:
    """Measure every row, on all ranks, and write ``<name>.md``, ``.json`` and the pictures."""
    measured = [_measure(one, world) for one in planned]
    if not world.main:
        return
    _write_tables(sweep, planned, measured, folder / name)
    _draw_panels(planned, measured, folder / f"{name}.png")
    if sweep.grid is not None:
        _draw_grid(sweep.grid, planned, world, folder / f"{name}_grid.png")


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
        matrix = confusion(
            predictor, data, rank=world.rank, world_size=world.size, watch=world.watch.each
        )
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
    rows = [
        (
            one.row.label,
            f"{found['pixel_accuracy']:.2f}",
            f"{found['miou']:.2f}",
            " / ".join(f"{value:g}" for value in one.row.paper),
        )
        for one, found in zip(planned, measured, strict=True)
    ]
    header = ("", "pixAcc %", "mIoU %", "paper")
    show_and_write(sweep.title, header, rows, path.with_suffix(".md"))
    document = [
        {"label": one.row.label, "run": one.row.run, "paper": list(one.row.paper), **found}
        for one, found in zip(planned, measured, strict=True)
    ]
    write_json({"title": sweep.title, "rows": document}, path.with_suffix(".json"))


def _draw_panels(planned: list[Planned], measured: list[dict[str, float]], path: Path) -> None:
    """mIoU and pixAcc over the place of each row, one panel per curve (paper, figure 5)."""
    curves = list(dict.fromkeys(one.row.curve for one in planned if one.row.curve))
    if not curves:
        return

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for panel, curve in zip(panels, curves, strict=True):
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

    save_figure(draw, (4.5 * len(curves), 3.5), path)


def _draw_grid(
    names: tuple[str, str], planned: list[Planned], world: distributed.World, path: Path
) -> None:
    """Image, the predictions of two runs and the label, for a few validation images (figure 4)."""
    chosen = [next(one for one in planned if one.row.run == name) for name in names]
    checkpoints = {one.row.label: one.checkpoint for one in chosen}
    data = _validation_set(chosen[0].configs[-1])
    save_png(compare_checkpoints(checkpoints, data, world.device), path)
