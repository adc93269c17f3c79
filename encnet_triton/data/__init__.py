"""Data sets, augmentation and loaders.

`create_dataset` makes a data set by name; `Augment` makes training crops; `TrainLoader` and
`eval_samples` feed a network.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

from encnet_triton.data.ade20k import ADE20K
from encnet_triton.data.augment import Augment
from encnet_triton.data.base import DataError, Dataset, Sample, default_palette, mean_colour
from encnet_triton.data.cityscapes import Cityscapes
from encnet_triton.data.coco import CocoVOC
from encnet_triton.data.folder import Folder
from encnet_triton.data.images import decode
from encnet_triton.data.loader import Batch, TrainLoader, eval_samples
from encnet_triton.data.pascal_context import PascalContext
from encnet_triton.data.scenes import Scenes
from encnet_triton.data.voc import VOC, VOCAug

__all__ = [
    "ADE20K",
    "DATASETS",
    "VOC",
    "Augment",
    "Batch",
    "Cityscapes",
    "CocoVOC",
    "DataError",
    "Dataset",
    "Folder",
    "PascalContext",
    "Sample",
    "Scenes",
    "TrainLoader",
    "VOCAug",
    "create_dataset",
    "decode",
    "default_palette",
    "eval_samples",
    "mean_colour",
]

DATASETS: dict[str, type] = {
    "scenes": Scenes,
    "folder": Folder,
    "ade20k": ADE20K,
    "pascal_context": PascalContext,
    "voc": VOC,
    "voc_aug": VOCAug,
    "coco_voc": CocoVOC,
    "cityscapes": Cityscapes,
}
"""Data sets by name. One whose constructor takes `root` reads files; the others are drawn."""


def create_dataset(
    name: str, split: str, root: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Make the `split` ("train", "val") of a data set.

    Args:
        name: one of `DATASETS`.
        root: its folder; needed by data sets that read files, not allowed for those that are drawn.
        options: further arguments of the data set's class.

    Raises DataError for an unknown name, split or option, and for files that are missing or do not
    fit.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    maker = DATASETS[name]
    parameters = list(inspect.signature(maker).parameters)
    allowed = [p for p in parameters if p not in ("root", "split")]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise DataError(
            f"data set {name!r} has no option {unknown[0]!r}; it has {', '.join(allowed)}"
        )
    if "root" in parameters:
        if root is None:
            raise DataError(f"data set {name!r} reads files: give its folder with --data")
        options["root"] = root
    elif root is not None:
        raise DataError(f"data set {name!r} is drawn and has no folder, but {root} was given")
    try:
        dataset: Dataset = maker(split=split, **options)
    except OSError as error:
        raise DataError(f"the data set in {root} cannot be read ({error})") from error
    return dataset
