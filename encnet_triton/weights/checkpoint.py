"""Model files: weights in safetensors with the metadata needed to use them, written atomically.

A file holds tensors named ``model.<parameter>`` (and others in a training state), one
JSON document of metadata, and checksums of both. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from encnet_triton.files import without_nan, write_tensors
from encnet_triton.models import CifarNet, create_model
from encnet_triton.weights.fitting import misfit

FORMAT = "encnet-triton 1"
MODEL_PREFIX = "model."


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


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata atomically: afterwards the file is the new one or the previous
    one.

    Raises:
        CheckpointError: the file could not be written (full disk, no permission, ...).
    """
    text = json.dumps(without_nan(metadata))
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    document = {"format": FORMAT, "metadata": text, "checksums": json.dumps(checksums(plain, text))}
    try:
        write_tensors(plain, path, document)
    except OSError as error:
        kept = f"the previous {path.name} is untouched" if path.exists() else "nothing was written"
        raise CheckpointError(f"{error}; {kept}") from error


def checksums(tensors: Mapping[str, Tensor], metadata: str) -> dict[str, str]:
    """Hashes of the metadata, and of the tensors by the first part of their names."""
    found = {"metadata": hashlib.blake2b(metadata.encode(), digest_size=16)}
    for name in sorted(tensors):
        tensor = tensors[name]
        group = found.setdefault(name.split(".")[0] + ".", hashlib.blake2b(digest_size=16))
        group.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        group.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {name: digest.hexdigest() for name, digest in found.items()}


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (CPU) whose name starts with ``prefix``, and the metadata, of a file made by `write`.

    Args:
        path: of the file.
        prefix: of whole names, or of groups of them such as ``model.``, whose checksums are then
            compared.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by this project.
    """
    if not path.is_file():
        there = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {there}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = file.metadata() or {}
            if document.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is not an encnet-triton checkpoint "
                    f"(its format is {document.get('format')!r}, expected {FORMAT!r})"
                )
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    metadata = _parsed(path, document, "metadata")
    _compare(path, document, tensors, prefix)
    return tensors, metadata


def _parsed(path: Path, document: Mapping[str, str], name: str) -> dict[str, Any]:
    """A JSON object of a file's header."""
    try:
        found = json.loads(document.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its {name} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its {name} is not a JSON object")
    return found


def _compare(
    path: Path, document: Mapping[str, str], tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Compare the checksums of the groups that were read whole with those in the file; old files
    have none."""
    if document.keys() == {"format", "metadata"}:
        return
    saved = _parsed(path, document, "checksums")
    found = checksums(tensors, document["metadata"])
    for name in sorted(saved.keys() | found.keys()):
        whole = name == "metadata" or name.startswith(prefix)
        if whole and saved.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} is damaged: the checksum of its {name.rstrip('.')} differs from the one "
                "it was written with"
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict under the names used in files."""
    return {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def save_model(path: Path, model: nn.Module, info: ModelInfo, **metadata: Any) -> None:
    """Write a model so that `load_model` can rebuild it from the file alone."""
    write(path, model_tensors(model), {"model": asdict(info), **metadata})


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelInfo]:
    """Rebuild a model from its file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit its own description.
    """
    path = Path(path)
    tensors, metadata = read(path, MODEL_PREFIX)
    info = model_info(metadata, path)
    # A damaged number may describe a network too large for memory; its own weights are not needed.
    with torch.device("meta"):
        model = _build(info, path)
    own = model.state_dict()
    state = fitting_weights(model, tensors, path)
    model.load_state_dict({n: t.to(own[n].dtype) for n, t in state.items()}, assign=True)
    return model.to(device).eval(), info


def _build(info: ModelInfo, path: Path) -> nn.Module:
    make = CifarNet if "unit" in info.options else create_model
    try:
        model: nn.Module = make(**info.options)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes a network that cannot be made: {str(error).splitlines()[0]}"
        ) from error
    return model


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


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the ``model.`` tensors of a file into a model, strictly; raises as `fitting_weights`."""
    model.load_state_dict(fitting_weights(model, tensors, path))


def fitting_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The ``model.`` tensors of a file under the names of a model's state dict.

    Raises:
        CheckpointError: a tensor is missing, too many or of another kind, or a value is not finite.
    """
    state = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(MODEL_PREFIX)
    }
    if (found := misfit(state, model.state_dict())) is not None:
        raise CheckpointError(f"{path} {found}")
    return state
