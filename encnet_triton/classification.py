"""CIFAR-10 classifiers after training: test error of a checkpoint, class of a picture.

The commands evaluate and predict come here where a checkpoint holds a classifier.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from encnet_triton.data.cifar10 import Images, load_cifar10
from encnet_triton.weights.checkpoint import ModelInfo

BATCH = 500
MOST_NAMED = 3
_FOR_SEGMENTATION = (
    "multi_scale", "scales", "flip", "whole_image", "batch", "protocol", "workers", "output",
)  # fmt: skip


class Standardise:
    """uint8 images B x 3 x H x W -> float32, channels last, by mean and std of values in 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        spread = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._scale = 1 / (255 * spread)
        self._shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / spread

    def __call__(self, images: Tensor) -> Tensor:
        x = torch.addcmul(self._shift, images, self._scale)
        return x.contiguous(memory_format=torch.channels_last)


class ImageClassifier:
    """A trained classifier in evaluation, in float32.

    Args:
        model, info: as `encnet_triton.weights.checkpoint.load_model` returns them.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, info: ModelInfo, device: torch.device) -> None:
        self.model, self.info, self.device = model, info, device
        self._standardise = Standardise(info.mean, info.std, device)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Probabilities, B x n, of uint8 images B x 3 x H x W."""
        x = self._standardise(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        logits: Tensor = self.model(x)
        return logits.float().softmax(1)

    def errors(self, split: Images) -> NDArray[np.bool_]:
        """Which images of a split are named wrongly."""
        parts = [
            self(split.images[start : start + BATCH]).argmax(1).cpu().numpy()
            for start in range(0, len(split.labels), BATCH)
        ]
        wrong: NDArray[np.bool_] = np.concatenate(parts) != split.labels
        return wrong

    def name(self, image: Image.Image) -> list[tuple[str, float]]:
        """The likeliest classes of a picture, scaled to the size of the training images."""
        height, width = self.info.crop
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        (found,) = self(np.asarray(small).transpose(2, 0, 1)[None])
        values, indices = found.topk(min(MOST_NAMED, len(found)))
        classes = [self.info.classes[i] for i in indices.tolist()]
        return list(zip(classes, values.tolist(), strict=True))


def evaluate(
    classifier: ImageClassifier, options: argparse.Namespace, console: Console
) -> dict[str, object]:
    """What the command evaluate does with a classifier; returns what it writes as JSON.

    Raises:
        ValueError: the data set is another one, or its folder is not known or not there.
    """
    info, checkpoint = classifier.info, options.checkpoint
    if options.dataset not in (None, info.data["name"]):
        raise ValueError(
            f"--dataset {options.dataset}: {checkpoint} is a classifier for {info.data['name']}"
        )
    root = options.data or info.data["root"]
    if root is None:
        raise ValueError(f"{checkpoint} does not say where its images are: give --data")
    if options.data is None and not Path(root).is_dir():
        raise ValueError(f"{checkpoint} was trained on {root}, which is not here: give --data")
    split = options.split or info.data["split"]
    images = load_cifar10(root, split)
    wrong = classifier.errors(images)
    table = Table(title=f"{checkpoint}, {split}, {len(wrong):,} images", title_justify="left")
    table.add_column("class")
    table.add_column("error %", justify="right")
    by_class = {
        name: float(wrong[images.labels == number].mean())
        for number, name in enumerate(info.classes)
        if (images.labels == number).any()
    }
    for name, error in by_class.items():
        table.add_row(name, f"{100 * error:.2f}")
    table.add_section()
    table.add_row("all", f"{100 * wrong.mean():.2f}", style="bold")
    console.print(table)
    return {
        "checkpoint": str(checkpoint),
        "dataset": info.data["name"],
        "split": split,
        "images": len(wrong),
        "error": float(wrong.mean()),
        "error_by_class": by_class,
    }


def predict(
    classifier: ImageClassifier,
    pictures: Iterable[tuple[Path, Image.Image]],
    console: Console,
) -> None:
    """What the command predict does with a classifier: a line a picture; nothing is written."""
    for path, picture in pictures:
        named = ", ".join(f"{name} {share:.1%}" for name, share in classifier.name(picture))
        console.print(f"{path}: {named}", highlight=False, markup=False)


def refuse_segmentation_options(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """A ValueError for the first option that was given and means nothing for a classifier."""
    for name, value in vars(options).items():
        if name in _FOR_SEGMENTATION and value != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for segmentation networks, but "
                f"{options.checkpoint} holds a classifier"
            )
