"""Convert checkpoints of other projects to networks and files of this one.

Every tensor of a file must find its place and every tensor of the network must be filled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encnet_triton.data import DATASETS, default_palette
from encnet_triton.data.base import IMAGENET_MEAN, IMAGENET_STD
from encnet_triton.models import create_model
from encnet_triton.unpickle import printable
from encnet_triton.weights.checkpoint import ModelInfo, save_model
from encnet_triton.weights.fitting import misfit
from encnet_triton.weights.peer_names import PeerCheckpoint, identify, model_options
from encnet_triton.weights.reading import as_mapping, read_document, state_dict_of

__all__ = ["convert_model", "load_peer"]

# How images are cut and scaled where neither the file nor the caller says: as each project's
# recipes do it, and for street scenes, whose images are larger.
_IMAGES: dict[str, dict[str, Any]] = {
    "PyTorch-Encoding": {"crop": [480, 480], "base_size": 520, "scale_by": "long"},
    "mmsegmentation": {"crop": [512, 512], "base_size": 512, "scale_by": "short"},
    "torchvision": {"crop": [480, 480], "base_size": 520, "scale_by": "short"},
}
_STREETS: dict[str, dict[str, Any]] = {
    "PyTorch-Encoding": {"crop": [768, 768], "base_size": 2048, "scale_by": "long"},
    "mmsegmentation": {"crop": [512, 1024], "base_size": 1024, "scale_by": "short"},
}


def load_peer(
    source: str | Path, *, average: bool = False, config: str | None = None
) -> tuple[nn.Module, PeerCheckpoint]:
    """The network of a checkpoint of another project, in evaluation mode.

    Args:
        source: a file or URL, see `reading.read_document`: a state dict, or a training checkpoint
            with one in it.
        average: take the moving average of the weights that is stored beside them.
        config: text of mmsegmentation's configuration, instead of the one in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is of another origin or of a network that is not here,
            or does not fit; names what.
    """
    name = str(source)
    return peer_in(read_document(name), name, average=average, config=config)


def peer_in(
    document: Any, name: str, *, average: bool = False, config: str | None = None
) -> tuple[nn.Module, PeerCheckpoint]:
    """The same of a document that has been read from the file ``name``."""
    meta: Mapping[Any, Any] = as_mapping((as_mapping(document) or {}).get("meta")) or {}
    if config is not None:
        meta = {**meta, "cfg": config}
    peer = identify(state_dict_of(document, name, average), meta, name)
    options = model_options(peer, name)
    try:
        with torch.device("meta"):  # a damaged shape may ask for more than any memory holds
            model = create_model(**options)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = printable(str(error))
        raise ValueError(f"{name} is a network that cannot be built: {reason}") from error
    own = model.state_dict()
    what = "the network it looks like"
    found = misfit(peer.tensors, own, what, origin=peer.origin_of, uncounted=True)
    if found is not None:
        raise ValueError(f"{name} {found} ({peer.kind} {model.options})")
    model.load_state_dict(
        {key: _taken(peer.tensors.get(key), own[key]) for key in own}, assign=True
    )
    return model.eval(), peer


def _taken(tensor: Tensor | None, own: Tensor) -> Tensor:
    """A tensor as the network has it; batches are not counted in files before PyTorch 0.4.1."""
    if tensor is None:
        return torch.zeros_like(own, device="cpu")
    return tensor.to(own.dtype, copy=True).contiguous()


def convert_model(
    source: str | Path,
    output: Path,
    *,
    document: Any = None,
    dataset: str | None = None,
    crop: tuple[int, int] | None = None,
    base_size: int | None = None,
    average: bool = False,
    config: str | None = None,
    note: Callable[[str], object] = warnings.warn,
) -> nn.Module:
    """Write a peer's checkpoint as one of this project, which evaluate and predict take.

    Args:
        source, average, config: see `load_peer`.
        output: the .safetensors file to write.
        document: what `reading.read_document` has read from the source, if it has.
        dataset: name of the data set it was trained on, for class names and colours; without it
            they are what the file says, else numbers.
        crop: height and width of its training crops, in pixels; None for what the file says, else
            what is usual where it comes from.
        base_size: the same of the edge that its images are scaled to.
        note: called with what is assumed because neither the file nor the caller states it.
    """
    if document is None:
        document = read_document(str(source))
    model, peer = peer_in(document, str(source), average=average, config=config)
    if peer.assumed:
        note(f"{source} has no configuration with its weights, so this is assumed: {peer.assumed}")
    count = int(model.num_classes)  # type: ignore[arg-type]
    classes, palette = peer.classes, peer.palette
    if len(palette) != count:
        palette = default_palette(count).tolist()
    if dataset is not None:
        classes, palette = _names_of(dataset, count)
    if len(classes) != count:
        classes = [f"class {number}" for number in range(count)]
    info = ModelInfo(
        options=dict(model.options),  # type: ignore[arg-type]
        classes=classes,
        palette=palette,
        data={"name": dataset or "folder", "root": None, "split": "val", "options": {}},
        **_image(peer, dataset, crop, base_size),
    )
    save_model(output, model, info, converted_from=peer.kind)
    return model


def _image(
    peer: PeerCheckpoint, dataset: str | None, crop: tuple[int, int] | None, base_size: int | None
) -> dict[str, Any]:
    """The fields of `ModelInfo` about images."""
    image = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **_IMAGES[peer.kind]}
    if dataset == "cityscapes":
        image |= _STREETS.get(peer.kind, {})
    if peer.described is not None:
        image |= peer.described.image
    if crop is not None:
        image["crop"] = list(crop)
    if base_size is not None:
        image["base_size"] = base_size
    return image


def _names_of(dataset: str, count: int) -> tuple[list[str], list[list[int]]]:
    names, colours = DATASETS[dataset].labels_for(count)  # type: ignore[attr-defined]
    if len(names) != count:
        raise ValueError(f"the network has {count} classes, but {dataset} has {len(names)}")
    return list(names), colours.tolist()
