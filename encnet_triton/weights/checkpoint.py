"""Model files: weights in safetensors with the metadata a stranger needs, written atomically.

A file holds tensors named ``model.<parameter>`` (and, in a training state, more beside them) and
one JSON document of metadata. No pickle is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from encnet_triton.files import write_tensors
from encnet_triton.models import CifarNet, create_model

FORMAT = "encnet-triton 1"
MODEL_PREFIX = "model."


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read, or does not fit."""


@dataclass(frozen=True)
class ModelInfo:
    """What evaluate and predict need to use a model on new images.

    Attributes:
        options: arguments of ``create_model``, or of `CifarNet` for a classifier.
        classes, palette: names, and RGB triples (0..255), one per class.
        mean, std: of the RGB input in 0..1.
        crop: (height, width) the network was trained on, in pixels; the size of its windows.
        base_size: length in pixels that images are resized to before windows are taken
            (None: their own size), along ``scale_by`` ("short", "long" or "image").
        ignore_index: label value that is no class.
        data: name and options of the data set it was trained on.
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
    data: dict[str, Any] = field(default_factory=dict)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata: the whole new file is there afterwards, or the previous one.

    Raises:
        CheckpointError: the file could not be written (full disk, no permission, ...).
    """
    document = {"format": FORMAT, "metadata": json.dumps(dict(metadata))}
    try:
        write_tensors(tensors, path, document)
    except OSError as error:
        kept = f"the previous {path.name} is untouched" if path.exists() else "nothing was written"
        raise CheckpointError(f"{error}; {kept}") from error


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (CPU) whose name starts with ``prefix``, and the metadata, of a file made by `write`.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by this project.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = file.metadata() or {}
            if document.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is no encnet-triton checkpoint "
                    f"(its format is {document.get('format')!r}, expected {FORMAT!r})"
                )
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    return tensors, json.loads(document["metadata"])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict under the names used in files."""
    return {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def save_model(path: Path, model: nn.Module, info: ModelInfo, **metadata: Any) -> None:
    """Write a model that `load_model` can rebuild without anything else."""
    write(path, model_tensors(model), {"model": asdict(info), **metadata})


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelInfo]:
    """Rebuild a model from its file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit its own description.
    """
    path = Path(path)
    tensors, metadata = read(path, MODEL_PREFIX)
    info = ModelInfo(**metadata["model"])
    model = CifarNet(**info.options) if "unit" in info.options else create_model(**info.options)
    load_weights(model, tensors, path)
    return model.to(device).eval(), info


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the ``model.`` tensors of a file into a model, strictly.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape.
    """
    state = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(MODEL_PREFIX)
    }
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit the model: missing {missing[:3] or 'nothing'}"
            f"{' ...' if len(missing) > 3 else ''}, left over {extra[:3] or 'nothing'}"
            f"{' ...' if len(extra) > 3 else ''}"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{path} does not fit the model: {name} is {tuple(tensor.shape)} in the file "
                f"and {tuple(own[name].shape)} in the model"
            )
    model.load_state_dict(state)
