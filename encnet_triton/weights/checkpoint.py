"""Model files: weights in safetensors with the metadata needed to use them, written atomically.

A file holds tensors named ``model.<parameter>`` (and others in a training state), one
JSON document of metadata, and checksums of both. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from encnet_triton.files import without_nan, write_tensors
from encnet_triton.models import CifarNet, create_model
from encnet_triton.models.pretrained import Pretrained
from encnet_triton.unpickle import printable
from encnet_triton.weights.fitting import misfit
from encnet_triton.weights.folder import read_folder
from encnet_triton.weights.info import CheckpointError, ModelInfo, model_info
from encnet_triton.weights.remote import place_of

__all__ = [
    "FORMAT",
    "MODEL_PREFIX",
    "CheckpointError",
    "ModelInfo",
    "checksums",
    "fitting_weights",
    "load_model",
    "load_weights",
    "model_info",
    "model_tensors",
    "read",
    "read_model",
    "save_model",
    "write",
]

FORMAT = "encnet-triton 1"
MODEL_PREFIX = "model."


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


def read_model(source: Path | str) -> tuple[dict[str, Tensor], ModelInfo]:
    """The ``model.`` tensors (CPU) of a model, and what it is.

    Args:
        source: a file made by `save_model`, a folder made by ``save_pretrained``, or the name of
            one on the Hugging Face Hub: ``hf://user/name``, with ``@revision`` if need be.

    Raises:
        CheckpointError: it is missing, damaged or out of reach.
    """
    place = place_of(source)
    if place.is_dir():
        tensors, info = read_folder(place)
        return {MODEL_PREFIX + name: tensor for name, tensor in tensors.items()}, info
    tensors, metadata = read(place, MODEL_PREFIX)
    return tensors, model_info(metadata, place)


def load_model(
    source: Path | str, device: torch.device | str = "cpu"
) -> tuple[Pretrained, ModelInfo]:
    """Rebuild a model, in evaluation mode; ``source`` is as in `read_model`.

    Raises:
        CheckpointError: it is missing, damaged, out of reach, or does not fit its own description.
    """
    tensors, info = read_model(source)
    # A damaged number may describe a network too large for memory; its own weights are not needed.
    with torch.device("meta"):
        model = _build(info, source)
    own = model.state_dict()
    state = fitting_weights(model, tensors, source)
    model.load_state_dict({n: t.to(own[n].dtype) for n, t in state.items()}, assign=True)
    model.info = info
    return model.to(device).eval(), info


def _build(info: ModelInfo, source: Path | str) -> Pretrained:
    try:
        if "unit" in info.options:
            return CifarNet(**info.options)
        return create_model(**info.options)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = printable((str(error) or type(error).__name__).splitlines()[0], 500)
        raise CheckpointError(
            f"{source} describes a network that cannot be made: {reason}"
        ) from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy the ``model.`` tensors of a file into a model, strictly; raises as `fitting_weights`."""
    model.load_state_dict(fitting_weights(model, tensors, source))


def fitting_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], source: Path | str
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
        raise CheckpointError(f"{source} {found}")
    return state
