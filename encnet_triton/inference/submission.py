"""Archives of predictions in the layout that the test servers of VOC 2012 and ADE20K ask for."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from encnet_triton.data import Dataset, create_dataset, eval_samples
from encnet_triton.data.base import class_difference
from encnet_triton.data.voc import voc_palette
from encnet_triton.files import replacing
from encnet_triton.inference.predictor import Predictor
from encnet_triton.weights import ModelInfo

__all__ = ["SERVERS", "open_test_split", "write_archive"]

SERVERS = {"voc": 21, "voc_aug": 21, "ade20k": 150}
"""Data sets with a test server, and their number of classes."""

_ROUND = 8
_Member = tuple[str, bytes, tuple[int, ...]]  # name in the archive, content, height and width


def open_test_split(
    info: ModelInfo, checkpoint: object, name: str, split: str, root: str | None
) -> Dataset:
    """The images to predict.

    Raises:
        ValueError: the data set has no server, or other classes than the network.
    """
    if name not in SERVERS:
        raise ValueError(f"{name} has no test server; --dataset must be {', '.join(SERVERS)}")
    if len(info.classes) != SERVERS[name]:
        raise ValueError(
            f"{checkpoint} has {len(info.classes)} classes, but {name} has {SERVERS[name]}"
        )
    dataset = create_dataset(name, split, root or info.data["root"])
    difference = class_difference(dataset.classes, info.classes)
    if difference is not None:
        raise ValueError(
            f"{checkpoint} was trained for other classes than {name}'s: there {difference}"
        )
    return dataset


def write_archive(
    predictor: Predictor,
    dataset: Dataset,
    name: str,
    path: Path,
    *,
    competition: str = "comp6",
    progress: Callable[[range], Iterable[int]] = iter,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> int:
    """Predict all images and write the archive; returns how many files it has.

    Every process calls it: each predicts its share, rank 0 writes (the others return 0).

    Args:
        predictor: of a network with the data set's classes.
        dataset: its test split.
        name: of the data set, a key of `SERVERS`.
        path: of the archive; nothing is there until it is complete and verified.
        competition: VOC's "comp5" (trained on VOC alone) or "comp6" (other data too).
        progress: wraps this process's images, to show progress.
        workers: processes that read images ahead.
    """
    own = iter(progress(range(rank, len(dataset), world_size)))
    samples = eval_samples(dataset, rank=rank, world_size=world_size, workers=workers)

    def predict(index: int) -> _Member:
        image = np.asarray(next(samples)[1].image)
        label = predictor(image).cpu().numpy().astype(np.uint8)
        inside = _file_name(name, Path(dataset.name_of(index)).stem, competition)
        return inside, _encode_png(label, name), image.shape[:2]

    # In rounds, so that no process holds more than a few unwritten images.
    rounds = range(0, len(dataset), _ROUND * world_size)
    made = (_gathered([predict(i) for i in islice(own, _ROUND)], rank, world_size) for _ in rounds)
    if rank > 0:
        return sum(map(len, made))
    sizes: dict[str, tuple[int, ...]] = {}
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for inside, content, size in chain.from_iterable(made):
                archive.writestr(inside, content)
                sizes[inside] = size
        _verify(temporary, name, sizes)
    return len(sizes)


def _gathered(own: list[_Member], rank: int, world_size: int) -> list[_Member]:
    """On rank 0 the items of all processes, in the order of the images; elsewhere nothing."""
    if world_size == 1:
        return own
    found: list[list[_Member]] | None = [[]] * world_size if rank == 0 else None
    dist.gather_object(own, found)
    turns = zip_longest(*(found or []))
    return [member for turn in turns for member in turn if member is not None]


def _verify(path: Path, dataset: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Verify an archive: exactly these files, each of its image's size and with allowed values.

    Raises:
        ValueError: names the file that is wrong.
    """
    first = 1 if dataset == "ade20k" else 0
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(sizes):
            raise ValueError(f"{path} has {len(names)} files, but {len(sizes)} were written")
        for name in names:
            picture = Image.open(io.BytesIO(archive.read(name)))
            label = np.asarray(picture)
            mode = "L" if dataset == "ade20k" else "P"
            if picture.mode != mode or label.shape != sizes[name]:
                raise ValueError(f"{name} is {picture.mode} {label.shape}, not {sizes[name]}")
            if not first <= label.min() <= label.max() < SERVERS[dataset] + first:
                raise ValueError(f"{name} has values {label.min()}..{label.max()}")


def _file_name(dataset: str, stem: str, competition: str) -> str:
    """Where the server looks for the prediction of an image, inside the archive."""
    if dataset == "ade20k":
        return f"{stem}.png"
    return f"results/VOC2012/Segmentation/{competition}_test_cls/{stem}.png"


def _encode_png(label: NDArray[np.uint8], dataset: str) -> bytes:
    """A label map of classes 0..n-1 as the PNG that the server reads.

    VOC: palette PNG, values 0..20. ADE20K: single channel, values 1..150.
    """
    if dataset == "ade20k":
        picture = Image.fromarray(label + np.uint8(1))
    else:
        picture = Image.fromarray(label)
        picture.putpalette(voc_palette(256).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
