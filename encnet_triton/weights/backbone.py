"""Weights of a network's trunk alone: ImageNet's from torchvision, and those trained here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from encnet_triton.files import write_tensors
from encnet_triton.models import BACKBONES, create_model
from encnet_triton.models.resnet import Bottleneck
from encnet_triton.weights.checkpoint import load_model
from encnet_triton.weights.reading import listed, read_tensors

__all__ = ["backbone_name", "convert_backbone", "export_backbone", "load_backbone"]


def load_backbone(model: nn.Module, path_or_url: str | Path) -> None:
    """Load ImageNet weights of a torchvision ResNet into a model's backbone.

    Every tensor of the file but the classifier ``fc`` must find its place and every tensor of the
    backbone must be filled; otherwise nothing is changed.

    Args:
        model: a network of `encnet_triton.models`, or a `ResNet` itself.
        path_or_url: local .pth, .pt or .safetensors file, or the URL of a .pth file, which torch
            downloads into its hub cache once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or does not fit the backbone; names file and key.
    """
    backbone = getattr(model, "backbone", model)
    source = str(path_or_url)
    tensors = {k: v for k, v in read_tensors(source).items() if k not in ("fc.weight", "fc.bias")}
    own = backbone.state_dict()
    unknown = [key for key in tensors if key not in own]
    # Files from before PyTorch 0.4.1 do not count batches.
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    if unknown or missing:
        raise ValueError(
            f"{source} does not fit the backbone: {listed(unknown)} in the file match nothing, "
            f"{listed(missing)} of the backbone are not in the file "
            f"(torchvision's weights fit resnet18, 34, 50, 101 and 152)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{source} does not fit the backbone: {key} is {tuple(tensor.shape)} in the file "
                f"and {tuple(own[key].shape)} in the backbone"
            )
    backbone.load_state_dict({**own, **tensors})


def export_backbone(checkpoint: Path, output: Path) -> None:
    """Write the backbone of a checkpoint of this project under torchvision's names.

    The file loads into torchvision's ResNet of the same depth with ``strict=False`` (it has no
    ``fc``), and into this project's networks with ``--pretrained``. A stem of three convolutions
    has the names of PyTorch-Encoding, which torchvision has no network for.
    """
    model, _ = load_model(checkpoint)
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    write_tensors(backbone.state_dict(), output)


def convert_backbone(tensors: Mapping[str, Tensor], source: str, output: Path) -> str:
    """Write ImageNet weights of a ResNet, verified, for ``--pretrained``; returns its name."""
    plain = {k: t for k, t in tensors.items() if k not in ("fc.weight", "fc.bias")}
    name = backbone_name(plain, source)
    model = create_model("fcn", 2, backbone=name)
    load_backbone(model, source)
    write_tensors(plain, output)
    return name


def backbone_name(tensors: Mapping[str, Tensor], source: str) -> str:
    """The entry of `BACKBONES` with the stem and the blocks that a state dict has.

    Raises:
        ValueError: there is none.
    """
    depths = tuple(
        len({k.split(".")[1] for k in tensors if k.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    stem = tuple(
        len(tensors[key])
        for key in ("conv1.weight", "conv1.0.weight", "conv1.3.weight", "conv1.6.weight")
        if key in tensors
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    for name, config in BACKBONES.items():
        same_block = (config.block is Bottleneck) == bottleneck
        if config.depths == depths and config.stem == stem and same_block:
            return name
    raise ValueError(
        f"{source} has a backbone of depths {depths} and stem {stem}, which is none of "
        f"{', '.join(BACKBONES)}"
    )
