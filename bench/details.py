"""Where a network is better: IoU by class and area, and how well its context predicts the classes.

The paper says that the SE loss helps small objects, because in it a class counts by its presence
and not by its pixels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from encnet_triton.data import Dataset
from encnet_triton.inference import Predictor
from encnet_triton.inference.explaining import Explainer
from encnet_triton.models import EncNet
from encnet_triton.weights import load_model

AREAS = (0.005, 0.02, 0.08, 1.0)
"""Upper limits of a class's share of the labelled pixels of an image."""

Details = dict[str, dict[str, float | None]]


def details(weights: Path, data: Dataset) -> Details:
    """Figures of a checkpoint on a data set, each None where there is nothing to count.

    - class: IoU over all images.
    - area: for each range of `AREAS`, the IoU of a class in an image, averaged over all classes and
      images in which the class has such an area.
    - presence: average precision of the SE loss's prediction that a class is in an image, for
      classes that are in some images and not in all; empty for a network without SE loss.
    """
    model, info = load_model(weights)
    predictor = Predictor(model, info)
    knows = isinstance(model, EncNet) and bool(model.options["se_loss"])
    explainer = Explainer(model, info, "cpu") if knows else None
    counts, presence = [], []
    for index in range(len(data)):
        sample = data[index]
        image, label = np.asarray(sample.image), np.asarray(sample.label)
        counts.append(
            overlaps(predictor(image).numpy(), label, len(data.classes), data.ignore_index)
        )
        if explainer is not None:
            presence.append(explainer(image).presence)
    of_images = np.array(counts)  # [images, 3, classes]
    found = of_images[:, 2] > 0
    return {
        "class": dict(zip(data.classes, ratios(of_images.sum(0)), strict=True)),
        "area": by_area(of_images),
        "presence": dict(_precisions(np.array(presence), found, data.classes)) if presence else {},
    }


def overlaps(
    prediction: NDArray[Any], label: NDArray[Any], classes: int, ignored: int
) -> NDArray[np.int64]:
    """Intersection, union and labelled pixels of each class in an image: 3 x classes."""
    keep = label != ignored
    label, prediction = label[keep].astype(np.int64), prediction[keep].astype(np.int64)
    there = np.bincount(label, minlength=classes)
    both = np.bincount(label[label == prediction], minlength=classes)
    return np.stack([both, there + np.bincount(prediction, minlength=classes) - both, there])


def ratios(counts: NDArray[np.int64]) -> list[float | None]:
    """IoU of each class from 3 x classes counts."""
    return [float(both / union) if union else None for both, union, _ in counts.T]


def by_area(counts: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean IoU of a class in its image, by its area there, from images x 3 x classes counts."""
    both, union, there = counts.transpose(1, 0, 2)
    shares = there / np.maximum(1, there.sum(1, keepdims=True))
    found: dict[str, float | None] = {}
    for low, high in zip((0.0, *AREAS), AREAS, strict=False):
        inside = (shares > low) & (shares <= high)
        mean = float((both[inside] / union[inside]).mean()) if inside.any() else None
        found[f"{low:.1%} to {high:.1%}"] = mean
    return found


def average_precision(score: NDArray[np.floating], true: NDArray[np.bool_]) -> float | None:
    """Mean precision at the rank of each true entry; None if all or none are true."""
    if true.all() or not true.any():
        return None
    ranked = true[np.argsort(-score, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


def _precisions(
    presence: NDArray[np.floating], found: NDArray[np.bool_], classes: Sequence[str]
) -> list[tuple[str, float | None]]:
    each = (average_precision(presence[:, k], found[:, k]) for k in range(len(classes)))
    return list(zip(classes, each, strict=True))


def detail_tables(of_runs: Mapping[str, Mapping[int, Details]]) -> list[Table]:
    """Means over the seeds of each network, in %."""
    titles = {
        "class": "IoU by class",
        "area": "IoU of a class in an image, by its area there",
        "presence": "average precision of the classes that the context predicts",
    }
    return [_table(title, of_runs, part) for part, title in titles.items()]


def _table(title: str, of_runs: Mapping[str, Mapping[int, Details]], part: str) -> Table:
    columns = {name: [run[part] for run in runs.values()] for name, runs in of_runs.items()}
    columns = {name: runs for name, runs in columns.items() if runs[0]}
    table = Table(title=f"{title}, %, mean over seeds")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key in next(iter(columns.values()), [{}])[0]:
        cells = []
        for runs in columns.values():
            values = [value for run in runs if (value := run[key]) is not None]
            cells.append(f"{100 * statistics.mean(values):.1f}" if values else "")
        if any(cells):
            table.add_row(key, *cells)
    if columns and part == "presence" and not table.rows:
        table.caption = "none: each class is in all of these images, or in none"
    return table
