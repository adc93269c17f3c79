"""Checkpoints of PyTorch-Encoding and mmsegmentation as networks, and as files, of this project.

Every tensor of a file must find its place and every tensor of the network must be filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from encnet_triton.data import DATASETS, default_palette
from encnet_triton.data.base import IMAGENET_MEAN, IMAGENET_STD
from encnet_triton.models import create_model
from encnet_triton.weights.checkpoint import ModelInfo, save_model
from encnet_triton.weights.peer_names import PeerCheckpoint, identify, model_options
from encnet_triton.weights.reading import listed, read_document, tensors_in

__all__ = ["convert_model", "load_peer"]


def load_peer(source: str | Path) -> tuple[nn.Module, PeerCheckpoint]:
    """The network of a PyTorch-Encoding or mmsegmentation checkpoint, in evaluation mode.

    Args:
        source: a .pth, .pt or .safetensors file or URL: a state dict, or a training checkpoint that
            has one under ``state_dict``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is of another origin, or does not fit; names the keys.
    """
    name = str(source)
    document = read_document(name)
    meta: Mapping[str, Any] = {}
    if isinstance(document, Mapping) and isinstance(document.get("state_dict"), Mapping):
        found = document.get("meta")
        meta = found if isinstance(found, Mapping) else {}
        document = document["state_dict"]
    tensors = tensors_in(document, name)
    peer = identify(tensors, meta, name)
    model = create_model(**model_options(peer, name))
    own = model.state_dict()
    missing = [k for k in own if k not in peer.tensors and not k.endswith("_tracked")]
    extra = [peer.origin_of[k] for k in peer.tensors if k not in own]
    if missing or extra:
        raise ValueError(
            f"{name} does not fit the network it looks like ({peer.kind} {model.options}): "
            f"{listed(extra)} in the file match nothing, {listed(missing)} are not in the file"
        )
    for key, tensor in peer.tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{name}: {peer.origin_of[key]} is {tuple(tensor.shape)}, but {key} of the "
                f"network it looks like is {tuple(own[key].shape)}"
            )
    model.load_state_dict({**own, **peer.tensors})
    return model.eval(), peer


def convert_model(
    source: str | Path,
    output: Path,
    *,
    dataset: str | None = None,
    crop: int = 480,
    base_size: int = 520,
) -> nn.Module:
    """Write a peer's checkpoint as one of this project, which evaluate and predict take.

    Args:
        source: see `load_peer`.
        output: the .safetensors file to write.
        dataset: name of the data set it was trained on, for class names and colours; without it
            they are what the file says, else numbers.
        crop, base_size: pixels of its training crops and of its images' long edge.
    """
    model, peer = load_peer(source)
    count = int(model.num_classes)  # type: ignore[arg-type]
    classes, palette = peer.classes, default_palette(count).tolist()
    if dataset is not None:
        classes, palette = _names_of(dataset, count)
    if len(classes) != count:
        classes = [f"class {number}" for number in range(count)]
    info = ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
        classes=classes,
        palette=palette,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
        crop=[crop, crop],
        base_size=base_size,
        scale_by="long",
        data={"name": dataset or "folder", "root": None, "split": "val", "options": {}},
    )
    save_model(output, model, info, converted_from=peer.kind)
    return model


def _names_of(dataset: str, count: int) -> tuple[list[str], list[list[int]]]:
    names, colours = DATASETS[dataset].labels_for(count)  # type: ignore[attr-defined]
    if len(names) != count:
        raise ValueError(f"the network has {count} classes, but {dataset} has {len(names)}")
    return list(names), colours.tolist()
