"""Protocols by which published figures of a data set were computed, by name."""

from __future__ import annotations

from dataclasses import dataclass

from encnet_triton.scoring.metrics import ConfusionMatrix

__all__ = ["ProtocolScores", "protocol_scores"]


@dataclass(frozen=True)
class ProtocolScores:
    """Figures under one protocol, in fractions of one.

    Attributes:
        name: short, for JSON.
        text: what it counts, in words.
        pixel_accuracy, miou: over the protocol's pixels and classes.
        score: (pixAcc + mIoU) / 2, the figure of the ADE20K challenge (paper, table 5).
    """

    name: str
    text: str
    pixel_accuracy: float
    miou: float

    @property
    def score(self) -> float:
        return (self.pixel_accuracy + self.miou) / 2

    def sentence(self) -> str:
        """One line for a person."""
        return (
            f"{self.text}: pixAcc {self.pixel_accuracy:.2%}, mIoU {self.miou:.2%}, "
            f"their mean {self.score:.2%}"
        )

    def as_dict(self) -> dict[str, object]:
        """JSON-able form, without the name."""
        return {
            "counts": self.text,
            "pixel_accuracy": self.pixel_accuracy,
            "miou": self.miou,
            "score": self.score,
        }


def protocol_scores(
    matrix: ConfusionMatrix, dataset: str, released: bool = False
) -> list[ProtocolScores]:
    """The figures of a confusion matrix under each protocol that its data set has.

    - PASCAL-Context with 59 classes: those classes; and the paper's figure for 60, which is
      59/60 of the first: the background counts as a class of IoU 0, but its pixels do not count as
      false positives of the others.
    - PASCAL-Context trained with 60 classes: all 60; and the 59, where background pixels are left
      out and a class predicted as background is a miss.
    - All others: their classes.

    Args:
        matrix: counts over the whole split, summed over all processes.
        dataset: name of the data set.
        released: classes that do not occur count as IoU 0 (see `ConfusionMatrix.scores`).
    """
    n = matrix.num_classes
    whole = _scores(str(n), f"{n} classes", matrix, released)
    if dataset != "pascal_context":
        return [whole]
    if n == 60:
        whole = _scores("60-trained", "60 classes as trained", matrix, released)
        rest = ConfusionMatrix(60, matrix.ignore_index, matrix.counts.device)
        rest.counts = matrix.counts.clone()
        rest.counts[0] = 0
        text = "59 classes, background pixels left out"
        return [whole, _without_background(rest, text, released)]
    text = "60 classes as in the paper: 59/60 of the mean over 59"
    paper = ProtocolScores("60-paper", text, whole.pixel_accuracy, whole.miou * 59 / 60)
    return [whole, paper]


def _scores(name: str, text: str, matrix: ConfusionMatrix, released: bool) -> ProtocolScores:
    scores = matrix.scores(absent_is_zero=released)
    if released:
        text += ", absent ones counted 0"
    return ProtocolScores(name, text, scores.pixel_accuracy, scores.miou)


def _without_background(matrix: ConfusionMatrix, text: str, released: bool) -> ProtocolScores:
    """Mean over classes 1.. of a matrix in which no label is background (class 0)."""
    scores = matrix.scores()
    iou = [value for value in scores.iou[1:] if value is not None]
    divisor = matrix.num_classes - 1 if released else len(iou)
    mean = sum(iou) / divisor if iou else float("nan")
    return ProtocolScores("59-of-60", text, scores.pixel_accuracy, mean)
