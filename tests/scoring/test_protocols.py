"""Each protocol against a count in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encnet_triton.scoring.metrics import ConfusionMatrix
from encnet_triton.scoring.protocols import protocol_scores


def maps(classes: int, ignored: float) -> tuple[np.ndarray, np.ndarray]:
    """A random label map and a prediction that is right for half of the pixels."""
    rng = np.random.default_rng(7)
    label = rng.integers(0, classes, (60, 80))
    prediction = np.where(rng.random(label.shape) < 0.5, label, rng.integers(0, classes, (60, 80)))
    label = np.where(rng.random(label.shape) < ignored, 255, label)
    return prediction, label


def count(prediction: np.ndarray, label: np.ndarray, classes: range) -> tuple[float, float]:
    """pixAcc and mIoU over the classes, over the pixels that are labelled with one of them."""
    keep = np.isin(label, list(classes))
    p, t = prediction[keep], label[keep]
    iou = []
    for c in classes:
        union = ((p == c) | (t == c)).sum()
        if union:
            iou.append(((p == c) & (t == c)).sum() / union)
    return (p == t).mean(), float(np.mean(iou))


def matrix_of(prediction: np.ndarray, label: np.ndarray, classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.tensor(prediction), torch.tensor(label))
    return matrix


def test_pascal_context_with_59_classes_gives_both_figures_of_the_paper() -> None:
    prediction, label = maps(59, ignored=0.3)
    own, paper = protocol_scores(matrix_of(prediction, label, 59), "pascal_context")
    accuracy, miou = count(prediction, label, range(59))
    assert (own.name, paper.name) == ("59", "60-paper")
    assert own.pixel_accuracy == pytest.approx(accuracy) and own.miou == pytest.approx(miou)
    assert paper.miou == pytest.approx(miou * 59 / 60)
    # The paper prints 52.6 for 59 classes and 51.7 for 60.
    assert round(52.6 * 59 / 60, 1) == 51.7


def test_pascal_context_with_60_classes_counts_background_or_leaves_it_out() -> None:
    prediction, label = maps(60, ignored=0.1)
    trained, rest = protocol_scores(matrix_of(prediction, label, 60), "pascal_context")
    assert (trained.name, rest.name) == ("60-trained", "59-of-60")
    assert trained.miou == pytest.approx(count(prediction, label, range(60))[1])
    accuracy, miou = count(prediction, label, range(1, 60))
    assert rest.pixel_accuracy == pytest.approx(accuracy) and rest.miou == pytest.approx(miou)


def test_ade20k_score_is_the_mean_of_accuracy_and_miou() -> None:
    prediction, label = maps(150, ignored=0.1)
    (only,) = protocol_scores(matrix_of(prediction, label, 150), "ade20k")
    accuracy, miou = count(prediction, label, range(150))
    assert only.name == "150" and only.score == pytest.approx((accuracy + miou) / 2)


def test_released_counts_absent_classes_as_zero() -> None:
    prediction, label = maps(20, ignored=0.0)  # class 20 of 21 occurs nowhere
    matrix = matrix_of(prediction, label, 21)
    (skipped,) = protocol_scores(matrix, "voc")
    (counted,) = protocol_scores(matrix, "voc", released=True)
    assert counted.miou == pytest.approx(skipped.miou * 20 / 21)
    assert "counted 0" in counted.text
