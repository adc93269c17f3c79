"""The sections of a report about a network's scores on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from encnet_triton.data import Dataset
from encnet_triton.inference import Predictor
from encnet_triton.pictures import palette_image
from encnet_triton.report.drawings import confusion_matrix
from encnet_triton.report.page import Html, picture, section, table, text
from encnet_triton.scoring.metrics import Scores

__all__ = ["class_sections", "image_sections"]

_SHOWN = 12  # worst images, and as many others
_WIDTH = 320  # pixels of a picture
_CONFUSED = 3  # classes named beside each


def class_sections(scores: Scores, classes: Sequence[str]) -> list[Html]:
    """The scores, the classes from the best to the worst, and the confusion matrix."""
    counts = scores.counts
    total = max(1, scores.labelled_pixels)
    order = sorted(range(len(classes)), key=lambda c: -1.0 if (i := scores.iou[c]) is None else i)
    rows = (
        (
            classes[c],
            _percent(scores.iou[c]),
            f"{100 * float(counts[c].sum()) / total:.2f}",
            _taken_for(counts[c], c, classes),
        )
        for c in reversed(order)
    )
    heading = f"mIoU {_percent(scores.miou)} %, pixel accuracy {_percent(scores.pixel_accuracy)} %"
    head = ("class", "IoU %", "of all pixels %", "its pixels are taken for")
    return [
        section(heading, table(head, rows, (1, 2))),
        section("What is taken for what", confusion_matrix(counts, classes)),
    ]


def _percent(share: float | None) -> str:
    return "absent" if share is None else f"{100 * share:.2f}"


def _taken_for(row: Tensor, own: int, classes: Sequence[str]) -> str:
    """The classes that most of a class's pixels are taken for, with their shares."""
    total = float(row.sum())
    others = row.clone()
    others[own] = 0
    counts, found = others.topk(min(_CONFUSED, len(classes)))
    return ", ".join(
        f"{classes[c]} {100 * n / total:.1f} %"
        for n, c in zip(counts.tolist(), found.tolist(), strict=True)
        if n
    )


def image_sections(predictor: Predictor, dataset: Dataset, scores: Scores) -> list[Html]:
    """The images with the lowest pixel accuracy, and others at random.

    Each is predicted again. Columns: image, label, prediction, where it is wrong.
    """
    accuracy = scores.accuracy_of_images
    scored = [i for i, value in enumerate(accuracy.tolist()) if value == value]
    worst = sorted(scored, key=lambda i: float(accuracy[i]))[:_SHOWN]
    rest = [i for i in range(len(dataset)) if i not in worst]
    chance = np.random.default_rng(0)
    others = sorted(chance.choice(rest, min(_SHOWN, len(rest)), replace=False).tolist())
    made = []
    for heading, chosen in (("Worst images", worst), ("Images at random", others)):
        if chosen:
            rows = [_row(predictor, dataset, i, float(accuracy[i])) for i in chosen]
            made.append(section(heading, _COLUMNS, *rows))
    return made


_COLUMNS = Html("<p>Image, label, prediction, and in red where the prediction is wrong.</p>")


def _row(predictor: Predictor, dataset: Dataset, index: int, accuracy: float) -> Html:
    sample, info = dataset[index], predictor.info
    image, label = np.asarray(sample.image), np.asarray(sample.label)
    prediction = predictor(image).cpu().numpy()
    wrong = (prediction != label) & (label != dataset.ignore_index)
    name = Path(dataset.name_of(index)).name
    said = "no labelled pixels" if accuracy != accuracy else f"{100 * accuracy:.1f} % right"
    parts = (
        picture(_reduced(Image.fromarray(image)), f"{name}: image"),
        picture(_map(label, info.palette), f"{name}: label"),
        picture(_map(prediction, info.palette), f"{name}: prediction"),
        picture(_reduced(_marked(image, wrong)), f"{name}: where it is wrong"),
    )
    present = np.union1d(np.unique(label), np.unique(prediction)).tolist()
    caption = f"{text(name)}, {text(said)}<br>{_key(present, info.classes, info.palette)}"
    row = f'<div class="row">{"".join(parts)}</div>'
    return Html(f"<figure><figcaption>{caption}</figcaption>{row}</figure>")


def _key(present: Sequence[int], classes: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    """Coloured squares with class names."""
    made = (
        f'<span class="key"><i style="background:rgb({",".join(map(str, palette[c]))})"></i>'
        f"{text(classes[c])}</span>"
        for c in present
        if c < len(classes)
    )
    return "".join(made)


def _map(label: NDArray[Any], palette: Sequence[Sequence[int]]) -> Image.Image:
    return _reduced(palette_image(label, palette), Image.Resampling.NEAREST)


def _marked(image: NDArray[np.uint8], wrong: NDArray[np.bool_]) -> Image.Image:
    """The image pale and grey, with the wrong pixels in red."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    pale = np.repeat((160 + grey // 3)[:, :, None], 3, 2).astype(np.uint8)
    pale[wrong] = (220, 30, 30)
    return Image.fromarray(pale)


def _reduced(
    image: Image.Image, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """At most `_WIDTH` wide and high."""
    factor = min(1.0, _WIDTH / max(image.size))
    width, height = (max(1, round(factor * edge)) for edge in image.size)
    return image if factor == 1.0 else image.resize((width, height), resample)
