"""Images per second from JPEGs to training batches: ``python -m bench loader [--data DIR]``.

Two worker processes make batches of 8 crops of 480 x 480, taken one after the other as a trainer
does:

- ours: `TrainLoader`, with the augmentation in one warp; batches are bytes, normalised on the
  device.
- sequential: torch's DataLoader, whose workers resize, flip, rotate, pad and crop one after the
  other, convert to float32, normalise and stack.

The images are those of a folder data set, or generated: 96 JPEGs of 683 x 512 with the entropy of
photos.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils import data as torch_data

from bench import cases, peers, report
from encnet_triton.data import Dataset
from encnet_triton.data.augment import Augment
from encnet_triton.data.loader import TrainLoader

CROP, BASE, BATCH, IMAGES = 480, 520, 8, 96
WARM_UP, MEASURED, REPEATS = 4, 12, 3


class Sequential(torch_data.Dataset[tuple[Tensor, Tensor]]):
    """Prepares one image as frameworks do."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._mean = torch.tensor(dataset.mean).view(3, 1, 1)
        self._std = torch.tensor(dataset.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample, rng = self._dataset[index], np.random.default_rng(index)
        label = Image.fromarray(sample.label)
        image, marks = peers.sequential_crop(sample.image, label, CROP, BASE, cases.FILL, rng)
        x = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255)
        return (x - self._mean) / self._std, torch.from_numpy(marks.copy()).long()


def _ours(dataset: Dataset, workers: int) -> Iterator[object]:
    augment = Augment(
        CROP, base_size=BASE, scale=(0.5, 2.0), rotation=10.0, flip=0.5, fill=cases.FILL
    )
    loader = TrainLoader(dataset, augment, batch_size=BATCH, seed=0, workers=workers)
    epoch = 0
    try:
        while True:
            yield from loader.epoch(epoch)
            epoch += 1
    finally:
        loader.close()


def _sequential(dataset: Dataset, workers: int) -> Iterator[object]:
    loader = torch_data.DataLoader(
        Sequential(dataset),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


VARIANTS: dict[str, tuple[Callable[[Dataset, int], Iterator[object]], int]] = {
    "ours, 2 workers": (_ours, 2),
    "sequential, 2 workers": (_sequential, 2),
    "sequential, no workers": (_sequential, 0),
}


def rate(batches: Iterator[object]) -> float:
    """Images per second once the queues are full: the median of a few runs of batches."""
    for _ in islice(batches, WARM_UP):
        pass
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in islice(batches, MEASURED):
            pass
        rates.append(MEASURED * BATCH / (time.perf_counter() - start))
    return statistics.median(rates)


def write_folder(root: Path, images: int, classes: int = 11) -> None:
    """Write a folder data set of generated images, labelled with the first 11 of the classes."""
    lines = []
    for number in range(images):
        image, label = cases.made_files(number)
        (root / f"{number}.jpg").write_bytes(image)
        (root / f"{number}.png").write_bytes(label)
        lines.append(f"{number}.jpg {number}.png")
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(f"class {k}" for k in range(classes)) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--data", help="a folder data set to take the images from")


def run(options: argparse.Namespace) -> int:
    """Measure every variant and print the table; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_folder(Path(folder), IMAGES)
        dataset = cases.folder(Path(options.data or folder))
        found = {}
        for name, (make, workers) in VARIANTS.items():
            batches = make(dataset, workers)
            found[name] = rate(batches)
            batches.close()  # type: ignore[attr-defined]
    console = report.console(150)
    console.print(report.machine(torch.device("cpu")), highlight=False)
    table = Table(title=f"batches of {BATCH} crops of {CROP} x {CROP}", title_justify="left")
    for column in ("", "images/s", "ours / this"):
        table.add_column(column, no_wrap=True, justify="right" if column else "left")
    best = found["ours, 2 workers"]
    for name, value in found.items():
        table.add_row(name, f"{value:.1f}", f"{best / value:.2f}x")
    console.print(table)
    return 0
