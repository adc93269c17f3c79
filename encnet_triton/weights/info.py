"""What a network is and how its images are prepared, as its files say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "ModelInfo", "model_info"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read, or does not fit."""


_DATA: dict[str, Any] = {"name": "", "split": "val", "root": None, "options": {}}  # of none


@dataclass(frozen=True)
class ModelInfo:
    """What evaluate and predict need to run a model on new images.

    Attributes:
        options: arguments of ``create_model``, or of `CifarNet` for a classifier.
        classes, palette: names, and RGB triples (0..255), one per class.
        mean, std: of the RGB input in 0..1.
        crop: (height, width) the network was trained on, in pixels; the size of its windows.
        base_size: length in pixels that images are resized to before windows are taken
            (None: their own size), along ``scale_by`` ("short", "long" or "image").
        ignore_index: label value that is no class.
        data: name, split, root and options of the data set it was trained on.
    """

    options: dict[str, Any]
    classes: list[str]
    palette: list[list[int]]
    mean: list[float]
    std: list[float]
    crop: list[int]
    base_size: int | None = None
    scale_by: str = "short"
    ignore_index: int = 255
    data: dict[str, Any] = field(default_factory=lambda: dict(_DATA))


_MAX_OPTION = 100_000  # channels, codewords: beyond any network


def model_info(metadata: Mapping[str, Any], path: Path) -> ModelInfo:
    """What a file says about its model; the type and range of each field are checked.

    Raises:
        CheckpointError: names the field that is missing or wrong.
    """
    found = metadata.get("model")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it does not describe its model")
    required = {"options", "classes", "palette", "mean", "std", "crop"}
    known = {one.name for one in fields(ModelInfo)}
    for name in sorted((required - found.keys()) | (found.keys() - known)):
        what = "is missing" if name in required else "is unknown"
        raise CheckpointError(f"{path} is damaged: the field {name!r} of its model {what}")
    if isinstance(data := found.get("data"), dict):
        found = {**found, "data": {**_DATA, **data}}
    info = ModelInfo(**found)
    for name, right in _right(info).items():
        if not right:
            raise CheckpointError(
                f"{path} is damaged: the field {name!r} of its model is "
                f"{str(getattr(info, name))[:100]!r}"
            )
    return info


def _right(info: ModelInfo) -> dict[str, bool]:
    """Whether each field has a value that it can have."""
    count = len(info.classes) if isinstance(info.classes, list) else -1
    return {
        "options": isinstance(info.options, dict)
        and all(
            not isinstance(value, int) or 0 <= value <= _MAX_OPTION
            for value in info.options.values()
        ),
        "classes": count >= 0 and all(isinstance(name, str) for name in info.classes),
        "palette": isinstance(info.palette, list)
        and len(info.palette) == count
        and all(_numbers(colour, 3, 0, 255, int) for colour in info.palette),
        "mean": _numbers(info.mean, 3, 0, 1),
        "std": _numbers(info.std, 3, 1e-6, 100),
        "crop": _numbers(info.crop, 2, 1, 2**20, int),
        "base_size": info.base_size is None or _numbers([info.base_size], 1, 1, 2**20, int),
        "scale_by": info.scale_by in ("short", "long", "image"),
        "ignore_index": _numbers([info.ignore_index], 1, -1, 255, int),
        "data": isinstance(info.data, dict)
        and all(isinstance(info.data[name], str) for name in ("name", "split"))
        and isinstance(info.data["root"], str | None)
        and isinstance(info.data["options"], dict),
    }


def _numbers(given: Any, count: int, low: float, high: float, kind: Any = (int, float)) -> bool:
    """Whether it is a list of so many numbers of a kind, all within a range."""
    return (
        isinstance(given, Sequence)
        and len(given) == count
        and all(isinstance(n, kind) and not isinstance(n, bool) and low <= n <= high for n in given)
    )
