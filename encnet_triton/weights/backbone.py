"""Weights of the trunk alone: from ImageNet and other projects, and trained here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from encnet_triton.files import write_tensors
from encnet_triton.models import BACKBONES, create_backbone
from encnet_triton.models.resnet import Bottleneck
from encnet_triton.models.trunk import TimmTrunk
from encnet_triton.weights.checkpoint import load_model
from encnet_triton.weights.fitting import misfit
from encnet_triton.weights.reading import read_tensors
from encnet_triton.weights.trunk import load_trunk, timm_tensors

__all__ = [
    "backbone_name",
    "convert_backbone",
    "export_backbone",
    "is_trunk",
    "load_backbone",
    "trunk_key",
    "trunk_of",
]


def load_backbone(model: nn.Module, path_or_url: str | Path) -> None:
    """Load ImageNet weights into a model's backbone.

    Every tensor of the file except the classifier must have a place and every tensor of the
    backbone must be filled; otherwise nothing changes. `encnet_triton.weights.trunk.load_trunk`
    reads those of networks of timm.

    Args:
        model: a network of `encnet_triton.models`, or its backbone itself.
        path_or_url: "timm" for the weights that timm has for its network, or a local file, or the
            URL of one that torch downloads into its hub cache once: a state dict, alone or in the
            checkpoint of a trainer, for a ResNet under torchvision's names (timm's and
            PyTorch-Encoding's are the same) or those of MMClassification.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or does not fit the backbone; names file and key.
    """
    source = str(path_or_url)
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, TimmTrunk):
        load_trunk(backbone, source)
    else:
        _fill(backbone, trunk_of(read_tensors(source)), source)


def _fill(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    own = backbone.state_dict()
    if (found := misfit(tensors, own, "the backbone", uncounted=True)) is not None:
        raise ValueError(f"{source} {found}{_looks_like(tensors, source, own)}")
    backbone.load_state_dict({**own, **tensors})


def _looks_like(tensors: Mapping[str, Tensor], source: str, own: Mapping[str, Tensor]) -> str:
    """The end of the error about a file with other tensor names: what it holds, if known."""
    if tensors.keys() == own.keys():
        return ""
    if "backbone.conv1.weight" in tensors or "backbone.conv1.0.weight" in tensors:
        return "; it holds a whole network, of which encnet_triton.convert can write the backbone"
    try:
        return f"; it has the weights of {backbone_name(tensors, source)}"
    except ValueError:
        return ""


def export_backbone(checkpoint: Path, output: Path) -> None:
    """Write the backbone of a checkpoint of this project under torchvision's names.

    The file loads into torchvision's ResNet of the same depth with ``strict=False`` (it has no
    ``fc``), and into this project's networks with ``--pretrained``. A stem of three convolutions
    has the names of PyTorch-Encoding; torchvision has no such network. A network of timm has timm's
    names.
    """
    model, _ = load_model(checkpoint)
    if not hasattr(model, "backbone"):
        raise ValueError(f"{checkpoint} holds a classifier, which has no backbone")
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    own = timm_tensors(backbone) if isinstance(backbone, TimmTrunk) else backbone.state_dict()
    write_tensors(own, output)


def convert_backbone(tensors: Mapping[str, Tensor], source: str, output: Path) -> str:
    """Write ImageNet weights of a ResNet, verified, for ``--pretrained``; returns its name."""
    plain = trunk_of(tensors)
    name = backbone_name(plain, source)
    _fill(create_backbone(name), plain, source)
    write_tensors(plain, output)
    return name


def is_trunk(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of an image classifier on a ResNet, or of its trunk."""
    return "layer1.0.conv1.weight" in trunk_of(tensors)


def trunk_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk of an image classifier under torchvision's names, without its classifier.

    A state dict of something else is returned as it is.
    """
    prefix = "backbone."
    # MMClassification has the classifier beside the trunk.
    without = {k: t for k, t in tensors.items() if not k.startswith("head.fc.")}
    if without and all(key.startswith(prefix) for key in without):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in without.items()}
    plain = {trunk_key(key): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in plain.items() if not key.startswith("fc.")}


def trunk_key(key: str) -> str:
    """A name of OpenMMLab's trunks, whose deep stem is one list, as torchvision has it."""
    if key.startswith("stem.7."):
        return "bn1." + key.removeprefix("stem.7.")
    return "conv1." + key.removeprefix("stem.") if key.startswith("stem.") else key


def backbone_name(tensors: Mapping[str, Tensor], source: str, openmmlab: bool = False) -> str:
    """The entry of `BACKBONES` with the stem and the blocks that a state dict has.

    Args:
        tensors: under torchvision's names.
        source: name of the file, for errors.
        openmmlab: dilated as OpenMMLab does it, where the weights are those of two entries.

    Raises:
        ValueError: there is none.
    """
    stranger = _stranger(tensors)
    if stranger is not None:
        raise ValueError(f"{source} has a {stranger} for its backbone, which is not here")
    depths = tuple(
        len({k.split(".")[1] for k in tensors if k.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    stem = tuple(
        tensors[key].shape[0]
        for key in ("conv1.weight", "conv1.0.weight", "conv1.3.weight", "conv1.6.weight")
        if key in tensors and tensors[key].dim() == 4
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    average = "layer2.0.downsample.2.weight" in tensors
    fitting = [
        name
        for name, config in BACKBONES.items()
        if (config.depths, config.stem, config.average) == (depths, stem, average)
        and (config.block is Bottleneck) == bottleneck
    ]
    if not fitting:
        kind = ", an averaging shortcut" if average else ""
        raise ValueError(
            f"{source} has a backbone of depths {depths} and stem {stem}{kind}, which is none of "
            f"{', '.join(BACKBONES)}"
        )
    # Those that OpenMMLab dilates differently come after torchvision's.
    return fitting[-1 if openmmlab else 0]


def _stranger(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a family of networks that is not here, recognised by what only it has."""
    for key, name in (
        ("layer1.0.conv2.conv.weight", "ResNeSt"),
        ("layer1.0.conv2.fc1.weight", "ResNeSt"),
        ("layer1.0.se.fc1.weight", "SE-ResNet"),
        ("layer1.0.se.conv1.weight", "SE-ResNet"),
        ("layer1.0.se_layer.conv1.conv.weight", "SE-ResNet"),
        ("layer1.0.conv2_offset.weight", "ResNet with deformable convolutions"),
        ("layer1.0.conv2.conv_offset.weight", "ResNet with deformable convolutions"),
        ("layer1.0.convs.0.weight", "Res2Net"),
        ("mod1.conv1.weight", "WideResNet-38"),
        ("stage2.0.branches.0.0.conv1.weight", "HRNet"),
        ("block1.rep.0.conv1.weight", "Xception"),
        ("patch_embed.projection.weight", "Vision Transformer"),
        ("patch_embed.proj.weight", "Vision Transformer"),
        ("features.0.0.weight", "MobileNet"),
        ("0.0.weight", "MobileNet"),
    ):
        if key in tensors:
            return name
    middle, last = tensors.get("layer1.0.conv2.weight"), tensors.get("layer1.0.conv3.weight")
    if middle is None or last is None or middle.dim() != 4 or last.dim() != 4:
        return None
    if middle.shape[1] < middle.shape[0]:
        return "ResNeXt"
    return "Wide ResNet" if middle.shape[0] * 4 != last.shape[0] else None
