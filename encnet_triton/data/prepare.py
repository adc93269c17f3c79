"""Convert official masks that are not PNGs to PNGs, once: ``python -m encnet_triton.data prepare``.

Every file is written under a temporary name and renamed; a list of images is written last, so that
an interrupted preparation does not look finished and continues where it stopped.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encnet_triton.data import coco, pascal_context, voc
from encnet_triton.data.base import IGNORE_INDEX, DataError
from encnet_triton.data.files import find_root, read_json
from encnet_triton.data.images import read_label
from encnet_triton.data.voc import read_ids
from encnet_triton.files import replacing, write_text

__all__ = ["prepare_coco_voc", "prepare_pascal_context", "prepare_voc_aug"]

Progress = Callable[[Iterable[str]], Iterable[str]]


def prepare_voc_aug(root: Path, sbd: Path, progress: Progress = iter) -> dict[str, int]:
    """Write SegmentationClassAug, trainaug.txt and trainvalaug.txt into VOC2012.

    VOC's own label is used if there is one: it is finer than SBD's and has 255 on outlines.

    Args:
        root: VOC2012 or a folder above it.
        sbd: SBD's folder with ``cls/*.mat``, train.txt and val.txt (benchmark_RELEASE/dataset).
        progress: wraps the names, to show progress.

    Returns the number of images of each list. Raises DataError for what is missing or damaged.
    """
    base = voc.voc_root(root)
    marked = find_root(sbd, ("dataset", "benchmark_RELEASE/dataset"), "cls", voc.VOCAug.source)
    lists = base / voc.LISTS
    own = {s: set(read_ids(lists / f"{s}.txt", voc.VOC.source)) for s in ("train", "val")}
    names = own["train"] | own["val"]
    for split in ("train", "val"):
        names |= set(read_ids(marked / f"{split}.txt", voc.VOCAug.source))
    for name in progress(sorted(names)):
        target = base / voc.AUG_LABELS / f"{name}.png"
        if target.is_file():
            continue
        if name in own["train"] | own["val"]:
            label = read_label(base / "SegmentationClass" / f"{name}.png")
        else:
            source = marked / "cls" / f"{name}.mat"
            with _as_published(source):
                label = _read_mat(source, "GTcls")["Segmentation"][0, 0].astype(np.uint8)
        if label.ndim != 2 or not np.isin(label, (*range(21), 255)).all():
            raise DataError(f"the label of {name} has values other than 0..20 and 255")
        _write_png(label, target)
    found = {"trainvalaug": sorted(names), "trainaug": sorted(names - own["val"])}
    for listing, members in found.items():
        _write_lines(members, lists / f"{listing}.txt")
    return {listing: len(members) for listing, members in found.items()}


def prepare_pascal_context(
    root: Path,
    *,
    mat: Path | None = None,
    detail: Path | None = None,
    progress: Progress = iter,
) -> dict[str, int]:
    """Write SegmentationClassContext, 0 for background and 1..59 in alphabetical order.

    Args:
        root: VOC2010 or a folder above it.
        mat: folder of the official .mat files, each with a 459-label ``LabelMap``; the splits are
            then VOC2010's ImageSets/Main.
        detail: the Detail API's trainval_merged.json, which has the splits; give one of the two.
        progress: wraps the names, to show progress.

    Returns the number of images of each split. Raises DataError for what is missing or damaged.
    """
    if (mat is None) == (detail is None):
        raise DataError("give one of --mat (folder of .mat files) and --detail (JSON file)")
    below = ("VOC2010", "VOCdevkit/VOC2010")
    base = find_root(root, below, "JPEGImages", pascal_context.PascalContext.source)
    labels = base / pascal_context.LABELS
    if mat is not None:
        splits, read = _context_mat(base, mat)
    else:
        assert detail is not None
        splits, read = _context_detail(detail)
    table = np.zeros(65536, np.uint8)
    table[list(pascal_context.OFFICIAL.values())] = np.arange(1, 60)
    for name in progress([name for names in splits.values() for name in names]):
        target = labels / f"{name}.png"
        if not target.is_file():
            with _as_published(f"the official label of {name}"):
                label = table[read(name)]
            _write_png(label, target)
    _write_lines([json.dumps({"label_order": "alphabetical"})], labels / pascal_context.MARK)
    for split, names in splits.items():
        _write_lines(names, base / pascal_context.LISTS / f"{split}.txt")
    return {split: len(names) for split, names in splits.items()}


ReadLabel = Callable[[str], NDArray[np.integer[Any]]]


def _context_mat(base: Path, folder: Path) -> tuple[dict[str, list[str]], ReadLabel]:
    source = pascal_context.PascalContext.source
    main = base / "ImageSets" / "Main"
    splits = {split: read_ids(main / f"{split}.txt", source) for split in ("train", "val")}

    def read(name: str) -> NDArray[np.integer[Any]]:
        path = folder / f"{name}.mat"
        label: NDArray[np.integer[Any]] = _read_mat(path, "LabelMap")
        if label.ndim != 2 or label.dtype.kind not in "iu" or label.min() < 0:
            raise DataError(f"the LabelMap of {path} is {label.dtype} {label.shape}, no label")
        return label

    return splits, read


def _context_detail(path: Path) -> tuple[dict[str, list[str]], ReadLabel]:
    masks = _library("pycocotools.mask")
    document = _annotations(path, ("images", "annos_segmentation"))
    splits: dict[str, list[str]] = {"train": [], "val": []}
    images: dict[str, dict[str, Any]] = {}
    segments = defaultdict(list)
    with _as_published(path):
        for image in document["images"]:
            name = Path(image["file_name"]).stem
            if image["phase"] in splits:
                splits[image["phase"]].append(name)
                images[name] = image
        for segment in document["annos_segmentation"]:
            segments[segment["image_id"]].append(segment)

    def read(name: str) -> NDArray[np.integer[Any]]:
        image = images[name]
        label = np.zeros((image["height"], image["width"]), np.uint16)
        for segment in segments[image["image_id"]]:
            label[masks.decode(segment["segmentation"]) > 0] = segment["category_id"]
        return label

    return splits, read


def prepare_coco_voc(root: Path, split: str, progress: Progress = iter) -> dict[str, int]:
    """Write voc_labels/<split>2017 and its list: images with more than 1,000 pixels of VOC's
    classes.

    Where instances overlap, the one that the annotations name first is on top; crowds are 255.

    Args:
        root: COCO's folder with annotations/instances_<split>2017.json.
        split: "train" or "val".
        progress: wraps the names, to show progress.

    Returns the number of images. Raises DataError for what is missing or damaged.
    """
    source = coco.CocoVOC.source
    base = find_root(root, ("coco",), "annotations", source)
    path = base / "annotations" / f"instances_{split}2017.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; {source}")
    masks = _library("pycocotools.mask")
    document = _annotations(path, ("images", "annotations"))
    classes = {number: c for c, number in enumerate(coco.CATEGORIES, start=1)}
    instances = defaultdict(list)
    with _as_published(path):
        for instance in document["annotations"]:
            if instance["category_id"] in classes:
                instances[instance["image_id"]].append(instance)
        images = {Path(i["file_name"]).stem: i for i in document["images"] if i["id"] in instances}
    kept = []
    for name in progress(sorted(images)):
        image = images[name]
        with _as_published(path):
            label = np.zeros((image["height"], image["width"]), np.uint8)
            for instance in instances[image["id"]]:
                crowd = instance.get("iscrowd")
                inside = _instance_mask(masks, instance["segmentation"], label.shape)
                value = IGNORE_INDEX if crowd else classes[instance["category_id"]]
                label[inside & (label == 0)] = value
        if np.count_nonzero((label > 0) & (label != IGNORE_INDEX)) > coco.LEAST_PIXELS:
            _write_png(label, coco.labels_folder(base, split) / f"{name}.png")
            kept.append(name)
    _write_lines(kept, base / coco.LABELS / f"{split}2017.txt")
    return {f"{split}2017": len(kept)}


def _instance_mask(masks: Any, segmentation: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A polygon list, or run lengths compressed or not, as an H x W mask."""
    if isinstance(segmentation, list):
        runs = masks.merge(masks.frPyObjects(segmentation, *shape))
    elif isinstance(segmentation["counts"], list):
        runs = masks.frPyObjects(segmentation, *shape)
    else:
        runs = segmentation
    inside: NDArray[np.bool_] = masks.decode(runs) > 0
    return inside


@contextmanager
def _as_published(source: object) -> Iterator[None]:
    """Turn a missing or malformed part of a file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{source} is not of the published form ({error!r})") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{name.split('.')[0]} is not installed; it comes with the extra: "
            "pip install 'encnet-triton[data]'"
        ) from None


def _read_mat(path: Path, key: str) -> Any:
    loadmat = _library("scipy.io").loadmat
    if not path.is_file():
        raise DataError(f"label {path} does not exist")
    try:
        return loadmat(path)[key]
    except Exception as error:  # damage can make scipy raise anything
        raise DataError(f"label {path} cannot be read, or has no {key} ({error})") from error


def _annotations(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """A file of annotations, with these keys."""
    document = read_json(path, "annotations")
    missing = [key for key in keys if key not in document]
    if missing:
        raise DataError(f"annotations {path} have no {missing[0]!r}; is it the right file?")
    return document


def _write_png(label: NDArray[np.integer[Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.ascontiguousarray(label, np.uint8))
    picture.putpalette(voc.voc_palette(256).tobytes())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _write_lines(lines: Iterable[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text("".join(f"{line}\n" for line in lines), path)
