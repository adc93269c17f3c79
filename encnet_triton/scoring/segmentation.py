"""Label maps of a whole data set against its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, Group

from encnet_triton.data import Dataset, create_dataset, eval_samples
from encnet_triton.data.base import class_difference
from encnet_triton.data.check import refuse_unlabelled
from encnet_triton.inference import Predictor
from encnet_triton.inference.predictor import moved
from encnet_triton.scoring.metrics import ConfusionMatrix, Scores
from encnet_triton.scoring.protocols import ProtocolScores, protocol_scores
from encnet_triton.scoring.tables import class_table
from encnet_triton.weights import ModelInfo

__all__ = [
    "Evaluation",
    "PassOn",
    "confusion",
    "evaluate",
    "measure_scores",
    "open_dataset",
    "score_table",
]

PassOn = Callable[[Iterable[Any], int], Iterator[Any]]
"""Passes items on, given how many there are; may show progress or end early."""


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's scores on a data set.

    Attributes:
        checkpoint, dataset, split: what was scored on what.
        images: how many the split has.
        views: how the predictor viewed each, in words.
        released: whether it, and the mean over the classes, are as in the published code.
        classes: their names.
        scores: over the data set's classes.
        protocols: the figures under each protocol that the data set has.
    """

    checkpoint: str
    dataset: str
    split: str
    images: int
    views: str
    released: bool
    classes: list[str]
    scores: Scores
    protocols: list[ProtocolScores]

    def show(self, console: Console) -> None:
        """Print the table and a line for each protocol."""
        console.print(score_table(self.scores, self.classes, f"{self.checkpoint}, {self.views}"))
        for one in self.protocols:
            console.print(one.sentence(), highlight=False, markup=False)

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return {
            "checkpoint": self.checkpoint,
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            "protocol": "released" if self.released else "softmax",
            "views": self.views,
            "protocols": {one.name: one.as_dict() for one in self.protocols},
            **self.scores.as_dict(self.classes),
        }


def measure_scores(
    predictor: Predictor,
    checkpoint: object,
    name: str | None,
    split: str | None,
    root: str | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Evaluation:
    """Predict and score all images of a split; arguments that are None are taken from the training.

    Raises:
        ValueError: the data set has other classes than the network; names the checkpoint.
    """
    info, released = predictor.info, predictor.views.released
    dataset = open_dataset(info, checkpoint, name, split, root)
    refuse_unlabelled(dataset, f"split {split or info.data['split']!r} cannot be scored")
    matrix = confusion(predictor, dataset, rank=rank, world_size=world_size, workers=workers)
    name = name or info.data["name"]
    return Evaluation(
        checkpoint=str(checkpoint),
        dataset=name,
        split=split or info.data["split"],
        images=len(dataset),
        views=predictor.describe(),
        released=released,
        classes=info.classes,
        scores=matrix.scores(absent_is_zero=released),
        protocols=protocol_scores(matrix, name, released),
    )


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    watch: PassOn | None = None,
) -> Scores:
    """Scores over all labelled pixels of a data set; ranks share its images, each counted once."""
    return confusion(
        predictor, dataset, rank=rank, world_size=world_size, workers=workers, watch=watch
    ).scores()


def confusion(
    predictor: Predictor,
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    watch: PassOn | None = None,
) -> ConfusionMatrix:
    """The confusion matrix over a data set, summed over all processes.

    ``watch`` sees this process's images and may end early.
    """
    matrix = ConfusionMatrix(
        len(dataset.classes), dataset.ignore_index, predictor.device, images=len(dataset)
    )
    samples = eval_samples(dataset, rank=rank, world_size=world_size, workers=workers)
    if watch is not None:
        samples = watch(samples, len(range(rank, len(dataset), world_size)))
    for index, sample in samples:
        prediction = predictor(np.asarray(sample.image))
        matrix.update(prediction, moved(sample.label, predictor.device), index)
    matrix.all_reduce()
    return matrix


def score_table(scores: Scores, classes: list[str], title: str) -> Group:
    """Per-class IoU, the mean and the pixel accuracy, as a table for a terminal."""
    rows = (
        (name, "absent" if iou is None else f"{100 * iou:.2f}")
        for name, iou in zip(classes, scores.iou, strict=True)
    )
    means = [
        ("mIoU", f"{100 * scores.miou:.2f}"),
        ("pixAcc", f"{100 * scores.pixel_accuracy:.2f}"),
    ]
    note = "mIoU is over the classes present in a label or a prediction" if scores.absent else ""
    return class_table(title, "IoU %", rows, means, note)


def open_dataset(
    info: ModelInfo, checkpoint: object, name: str | None, split: str | None, root: str | None
) -> Dataset:
    """The data set to score on; what is None is as it was in the training.

    Raises:
        ValueError: it has other classes than the network; names the checkpoint.
    """
    dataset = create_dataset(
        name or info.data["name"],
        split or info.data["split"],
        root or info.data["root"],
        **(info.data["options"] if name in (None, info.data["name"]) else {}),
    )
    difference = class_difference(dataset.classes, info.classes)
    if difference is not None:
        raise ValueError(
            f"{checkpoint} was trained for {len(info.classes)} classes, other ones than the "
            f"{len(dataset.classes)} of the data set: there {difference}"
        )
    return dataset
