"""The test error of a CIFAR-10 classifier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from encnet_triton.data.cifar10 import load_cifar10
from encnet_triton.inference import ImageClassifier
from encnet_triton.scoring.tables import class_table

__all__ = ["Errors", "measure_errors"]


@dataclass(frozen=True)
class Errors:
    """Shares of images that are classified wrongly, as fractions.

    Attributes:
        checkpoint, dataset, split: what was measured.
        images: how many there are.
        error, error_by_class: of all, and of those of each class.
    """

    checkpoint: str
    dataset: str
    split: str
    images: int
    error: float
    error_by_class: dict[str, float]

    def show(self, console: Console) -> None:
        """Print the error of each class and of all."""
        title = f"{self.checkpoint}, {self.split}, {self.images:,} images"
        rows = ((label, f"{100 * one:.2f}") for label, one in self.error_by_class.items())
        console.print(class_table(title, "error %", rows, [("all", f"{100 * self.error:.2f}")]))

    def as_dict(self) -> dict[str, object]:
        """JSON-able form."""
        return asdict(self)


def measure_errors(
    classifier: ImageClassifier,
    checkpoint: object,
    name: str | None,
    split: str | None,
    root: str | None,
) -> Errors:
    """Classify all images of a split; arguments that are None are taken from the classifier's
    training.

    Raises:
        ValueError: the data set is another one, or its folder is not known or not there.
    """
    trained = classifier.info.data
    if name not in (None, trained["name"]):
        raise ValueError(f"--dataset {name}: {checkpoint} is a classifier for {trained['name']}")
    folder = root or trained["root"]
    if folder is None:
        raise ValueError(f"{checkpoint} does not say where its images are: give --data")
    if root is None and not Path(folder).is_dir():
        raise ValueError(f"{checkpoint} was trained on {folder}, which is not here: give --data")
    split = split or trained["split"]
    images = load_cifar10(folder, split)
    wrong = classifier.errors(images)
    by_class = {
        label: float(wrong[images.labels == number].mean())
        for number, label in enumerate(classifier.info.classes)
        if (images.labels == number).any()
    }
    return Errors(
        str(checkpoint), trained["name"], split, len(wrong), float(wrong.mean()), by_class
    )
