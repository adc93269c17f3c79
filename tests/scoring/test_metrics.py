"""Scores against a count pixel by pixel, and the protocol's corner cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encnet_triton.scoring.metrics import ConfusionMatrix
from tests.support.reading_back import ReadsNothingBack


def by_hand(prediction: np.ndarray, label: np.ndarray, n: int) -> tuple[float, float]:
    """Pixel accuracy and mIoU over the occurring classes, one class at a time."""
    kept = label != 255
    prediction, label = prediction[kept], label[kept]
    ious = []
    for c in range(n):
        union = ((prediction == c) | (label == c)).sum()
        if union:
            ious.append(((prediction == c) & (label == c)).sum() / union)
    return float((prediction == label).mean()), float(np.mean(ious))


def test_scores_equal_a_count_by_hand() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 7, (3, 20, 30))
    label[rng.random(label.shape) < 0.2] = 255
    prediction = np.where(rng.random(label.shape) < 0.5, label % 8, rng.integers(0, 7, label.shape))
    prediction[prediction == 7] = 0
    matrix = ConfusionMatrix(9)
    for p, t in zip(prediction, label, strict=True):
        matrix.update(torch.as_tensor(p), torch.as_tensor(t.astype(np.uint8)))
    scores = matrix.scores()
    accuracy, miou = by_hand(prediction, label, 9)
    assert scores.pixel_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert scores.miou == pytest.approx(miou, abs=1e-12)
    assert scores.absent == (7, 8)
    assert scores.iou[7] is None
    assert scores.labelled_pixels == int((label != 255).sum())


def test_an_accelerator_counts_the_same_and_is_asked_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    label, prediction = torch.randint(0, 5, (2, 20, 30), dtype=torch.uint8)
    label[:3] = 255
    asked, waiting = ConfusionMatrix(5), ConfusionMatrix(5)
    monkeypatch.setattr(waiting, "_asks", False)
    asked.update(prediction, label)
    with ReadsNothingBack():
        waiting.update(prediction, label)
    waiting.all_reduce()
    assert torch.equal(asked.counts, waiting.counts)
    with ReadsNothingBack():
        waiting.update(torch.tensor([0, 7, 7]), torch.tensor([6, 1, 255]))
    with pytest.raises(ValueError, match="2 pixels hold a label or a prediction that is not"):
        waiting.all_reduce()


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    scores = matrix.scores()
    assert scores.iou == (pytest.approx(2 / 3), 0.0, None)
    assert scores.miou == pytest.approx(1 / 3)


def test_predictions_on_ignored_pixels_do_not_count() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([1, 1, 1]), torch.tensor([1, 255, 255]))
    assert matrix.scores().pixel_accuracy == 1.0
    assert matrix.scores().labelled_pixels == 1


def test_wrong_values_are_named() -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="label holds the value 7; allowed are 0 to 2 and 255"):
        matrix.update(torch.tensor([0]), torch.tensor([7]))
    with pytest.raises(ValueError, match="prediction holds the value 255; allowed are 0 to 2$"):
        matrix.update(torch.tensor([255]), torch.tensor([0]))
    with pytest.raises(ValueError, match="prediction is .* but label is"):
        matrix.update(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
