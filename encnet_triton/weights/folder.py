"""A model as a folder, as repositories of the Hugging Face Hub have it.

The names of the files, those of the tensors and the constructor's arguments in the configuration
are those of huggingface_hub's PyTorchModelHubMixin, which can read it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import encnet_triton
from encnet_triton.files import make_folder, replacing, write_json, write_tensors
from encnet_triton.models import MODELS
from encnet_triton.models.pretrained import Pretrained
from encnet_triton.weights.info import CheckpointError, ModelInfo, model_info
from encnet_triton.weights.reading import listed

__all__ = ["CARD", "CONFIG", "WEIGHTS", "read_folder", "write_folder"]

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_BEST = "best.safetensors"  # in the folder of a run


def write_folder(
    folder: Path,
    model: Pretrained,
    info: ModelInfo,
    card: str,
    keep_card: bool = True,
) -> None:
    """Write a model's weights, configuration and card, each atomically.

    Args:
        folder: made if it is not there.
        model, info: as `encnet_triton.weights.load_model` returns them.
        card: content of README.md.
        keep_card: whether one that is there stays.

    Raises:
        OSError: a file cannot be written.
    """
    make_folder(folder, "the model's folder")
    write_tensors(model.state_dict(), folder / WEIGHTS, {"format": "pt"})
    write_json(_configuration(model, info), folder / CONFIG)
    if not (keep_card and (folder / CARD).exists()):
        with replacing(folder / CARD) as temporary:
            temporary.write_bytes(card.encode("utf-8", "backslashreplace"))


def _configuration(model: Pretrained, info: ModelInfo) -> dict[str, Any]:
    about = asdict(info)
    del about["options"]
    # Folders of the machine that it was trained on mean nothing elsewhere.
    options = about["data"].get("options", {})
    kept = {key: value for key, value in options.items() if not _absolute(value)}
    about["data"] |= {"root": None, "options": kept}
    return {**model.options, **about, "version": encnet_triton.__version__}


def _absolute(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def read_folder(folder: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """The tensors (CPU) of a folder, under the names of the network's state dict, and what they
    are.

    Raises:
        CheckpointError: the folder holds no model, one of another project, or a damaged one.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            hint = f"; a run's is {folder / _BEST}" if (folder / _BEST).is_file() else ""
            raise CheckpointError(f"{folder} holds no model: {name} is not there{hint}")
    info = _described(folder / CONFIG)
    try:
        return load_file(folder / WEIGHTS), info
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder / WEIGHTS}: {error}") from error


def _described(path: Path) -> ModelInfo:
    """A configuration, whose arguments of the network stand beside everything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it cannot be read ({error})") from error
    if not isinstance(found, dict) or not _ours(found):
        keys = f"its keys are {listed(list(found))}" if isinstance(found, dict) else "no object"
        raise CheckpointError(f"{path} does not describe a network of encnet-triton ({keys})")
    about = {one.name for one in fields(ModelInfo)} - {"options"}
    given = {key: value for key, value in found.items() if key in about}
    given["options"] = {k: v for k, v in found.items() if k not in {*about, "version"}}
    return model_info({"model": given}, path)


def _ours(found: Mapping[str, Any]) -> bool:
    name = found.get("name")
    return "unit" in found or (isinstance(name, str) and name in MODELS)
