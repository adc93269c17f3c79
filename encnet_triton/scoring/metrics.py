"""Pixel accuracy and intersection over union, from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, as fractions.

    ``iou[c]`` is None for a class that is in no label and in no prediction; such classes are listed
    in ``absent`` and left out of ``miou``, unless `ConfusionMatrix.scores` was told otherwise.

    Attributes:
        counts: the matrix, n x n int64 on the CPU; rows are labels.
        accuracy_of_images: the share of each image's labelled pixels that are right, NaN where it
            has none; empty if the images were not told apart.
    """

    pixel_accuracy: float
    miou: float
    iou: tuple[float | None, ...]
    absent: tuple[int, ...]
    labelled_pixels: int
    counts: Tensor = field(repr=False, compare=False)
    accuracy_of_images: Tensor = field(repr=False, compare=False)

    def as_dict(self, classes: Sequence[str]) -> dict[str, object]:
        """With class names instead of numbers, for `files.write_json`."""
        return {
            "pixel_accuracy": self.pixel_accuracy,
            "miou": self.miou,
            "iou": dict(zip(classes, self.iou, strict=True)),
            "absent": [classes[c] for c in self.absent],
            "labelled_pixels": self.labelled_pixels,
        }


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over all labelled pixels of a data set.

    Args:
        num_classes: n; the matrix is n x n int64, rows are labels.
        ignore_index: label value whose pixels are left out, in the label and in the prediction.
        device: where the counts live; predictions and labels must be there too.
        images: how many there are, if they are to be told apart.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
        images: int = 0,
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._of_images = torch.zeros(images, 2, dtype=torch.int64, device=device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=device)
        # Reading a value back would stall an accelerator until the next image.
        self._asks = self.counts.device.type == "cpu"

    def update(self, prediction: Tensor, label: Tensor, image: int | None = None) -> None:
        """Add one or more label maps: integer tensors of one shape, on this matrix's device.

        ``image`` is the number of the image that they are of.

        Raises:
            ValueError: shapes differ, or a value is neither a class nor ``ignore_index``. (The
                latter on an accelerator in `all_reduce`, which is not asked here.)
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction is {tuple(prediction.shape)} but label is {tuple(label.shape)}; "
                "they must have one shape"
            )
        n = self.num_classes
        keep = label != self.ignore_index
        if image is not None:
            right = (prediction == label) & keep
            self._of_images[image] += torch.stack([right.sum(), keep.sum()])
        if not self._asks:
            self._count(prediction.long(), label.long(), keep)
            return
        rows, columns = label[keep].long(), prediction[keep].long()
        for name, values in (("label", rows), ("prediction", columns)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < n:
                wrong = values[(values < 0) | (values >= n)][0]
                # An ignored label is gone by now; a prediction cannot be ignored.
                also = f" and {self.ignore_index} (ignore)" if name == "label" else ""
                raise ValueError(
                    f"{name} holds the value {int(wrong)}; allowed are 0 to {n - 1}{also}"
                )
        self.counts += torch.bincount(rows * n + columns, minlength=n * n).view(n, n)

    def _count(self, prediction: Tensor, label: Tensor, keep: Tensor) -> None:
        """`update` without reading anything back."""
        n = self.num_classes
        allowed = (prediction >= 0) & (prediction < n) & (label >= 0) & (label < n)
        right = keep & allowed
        place = (label * n + prediction).where(right, 0)
        self.counts.view(-1).scatter_add_(0, place.flatten(), right.long().flatten())
        self._wrong += (keep & ~allowed).sum()

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over all processes; without a group they are complete.

        Raises:
            ValueError: values of pixels counted by this process were not allowed.
        """
        if not self._asks and (wrong := int(self._wrong)):
            raise ValueError(
                f"{wrong} pixels hold a label or a prediction that is not allowed; allowed are 0 "
                f"to {self.num_classes - 1} and, in a label, {self.ignore_index} (ignore)"
            )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts, group=group)
            if len(self._of_images):
                dist.all_reduce(self._of_images, group=group)

    def scores(self, absent_is_zero: bool = False) -> Scores:
        """Accuracy over all labelled pixels and the mean IoU over the classes that occur.

        Args:
            absent_is_zero: take the mean over all classes, with an IoU of 0 for one that occurs
                neither in a label nor in a prediction, as the published evaluation code does.
        """
        counts = self.counts.double().cpu()
        correct = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - correct
        total = float(counts.sum())
        present = union > 0
        iou = tuple(float(c / u) if u > 0 else None for c, u in zip(correct, union, strict=True))
        return Scores(
            pixel_accuracy=float(correct.sum()) / total if total else float("nan"),
            miou=self._mean(correct[present] / union[present], absent_is_zero),
            iou=iou,
            absent=tuple(c for c in range(self.num_classes) if not present[c]),
            labelled_pixels=int(total),
            counts=self.counts.cpu(),
            accuracy_of_images=self._of_images[:, 0].cpu() / self._of_images[:, 1].cpu(),
        )

    def _mean(self, iou: Tensor, absent_is_zero: bool) -> float:
        if not len(iou):
            return float("nan")
        return float(iou.sum()) / (self.num_classes if absent_is_zero else len(iou))
