"""The tensor names of other projects, and the networks they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encnet_triton.unpickle import printable
from encnet_triton.weights.backbone import backbone_name, trunk_key
from encnet_triton.weights.mmseg_config import Described, describe
from encnet_triton.weights.reading import listed

__all__ = ["PeerCheckpoint", "identify", "model_options"]

Rules = tuple[tuple[str, str], ...]


def _pair(theirs: str, ours: str, first: int = 0) -> Rules:
    """A convolution and its batch norm, numbered there, named here."""
    return (
        (f"{theirs}{first}\\.", f"{ours}conv."),
        (f"{theirs}{first + 1}\\.", f"{ours}bn."),
    )


def _pairs(theirs: str, ours: str, first: int = 0) -> Rules:
    """`_pair` of four parts, numbered from ``first`` there."""
    parts = (_pair(theirs.format(first + i), ours.format(i)) for i in range(4))
    return tuple(rule for part in parts for rule in part)


# Each rule is a pattern for the start of a name there and what takes its place here.
_PYTORCH_ENCODING: Rules = (
    (r"pretrained\.", "backbone."),
    *_pair(r"auxlayer\.conv5\.", "aux_head.convs.0."),
    (r"auxlayer\.conv5\.4\.", "aux_head.classifier."),
)
_ENCODING_HEADS: dict[str, Rules] = {
    "encnet": (
        *_pair(r"head\.conv5\.", "head.bottleneck."),
        *_pair(r"head\.connect\.0\.", "head.lateral.0."),
        *_pair(r"head\.connect\.1\.", "head.lateral.1."),
        *_pair(r"head\.fusion\.", "head.fusion."),
        *_pair(r"head\.encmodule\.encoding\.", "head.context.project."),
        (r"head\.encmodule\.encoding\.3\.", "head.context.encoding."),
        (r"head\.encmodule\.encoding\.4\.", "head.context.bn."),
        (r"head\.encmodule\.fc\.0\.", "head.context.attention."),
        (r"head\.encmodule\.selayer\.", "head.context.presence."),
        (r"head\.conv6\.1\.", "head.classifier."),
    ),
    "fcn": (
        *_pair(r"head\.conv5\.", "head.convs.0."),
        (r"head\.conv5\.4\.", "head.classifier."),
    ),
    "psp": (
        *_pairs(r"head\.conv5\.0\.conv{}\.", "head.pools.{}.", first=1),
        *_pair(r"head\.conv5\.", "head.bottleneck.", first=1),
        (r"head\.conv5\.5\.", "head.classifier."),
    ),
    "deeplab": (
        *_pairs(r"head\.aspp\.b{}\.", "head.branches.{}."),
        *_pair(r"head\.aspp\.b4\.gap\.", "head.image_pool.", first=1),
        *_pair(r"head\.aspp\.project\.", "head.project."),
        *_pair(r"head\.block\.", "head.bottleneck."),
        (r"head\.block\.4\.", "head.classifier."),
    ),
}
_MMSEG: Rules = (
    (r"auxiliary_head\.convs\.", "aux_head.convs."),
    (r"auxiliary_head\.conv_seg\.", "aux_head.classifier."),
    (r"decode_head\.conv_seg\.", "head.classifier."),
    (r"decode_head\.bottleneck\.", "head.bottleneck."),
)
_MMSEG_HEADS: dict[str, Rules] = {
    "encnet": (
        (r"decode_head\.lateral_convs\.", "head.lateral."),
        (r"decode_head\.fusion\.", "head.fusion."),
        (r"decode_head\.enc_module\.encoding_project\.", "head.context.project."),
        (r"decode_head\.enc_module\.encoding\.0\.", "head.context.encoding."),
        (r"decode_head\.enc_module\.encoding\.1\.", "head.context.bn."),
        (r"decode_head\.enc_module\.fc\.0\.", "head.context.attention."),
        (r"decode_head\.se_layer\.", "head.context.presence."),
    ),
    "fcn": (
        (r"decode_head\.convs\.", "head.convs."),
        (r"decode_head\.conv_cat\.", "head.concat."),
    ),
    "psp": tuple((rf"decode_head\.psp_modules\.{i}\.1\.", f"head.pools.{i}.") for i in range(4)),
    "deeplab": (
        (r"decode_head\.aspp_modules\.", "head.branches."),
        (r"decode_head\.image_pool\.1\.", "head.image_pool."),
    ),
}
_TORCHVISION: Rules = (
    (r"backbone\.", "backbone."),
    *_pair(r"aux_classifier\.", "aux_head.convs.0."),
    (r"aux_classifier\.4\.", "aux_head.classifier."),
    (r"classifier\.4\.", "head.classifier."),
)
_TORCHVISION_HEADS: dict[str, Rules] = {
    "fcn": _pair(r"classifier\.", "head.convs.0."),
    "deeplab": (
        *_pairs(r"classifier\.0\.convs\.{}\.", "head.branches.{}."),
        *_pair(r"classifier\.0\.convs\.4\.", "head.image_pool.", first=1),
        *_pair(r"classifier\.0\.project\.", "head.project."),
        *_pair(r"classifier\.", "head.bottleneck.", first=1),
    ),
}
# Starts of names that only one network's heads have.
_MARKS: dict[str, tuple[tuple[str, str], ...]] = {
    "PyTorch-Encoding": (
        ("head.encmodule.", "encnet"),
        ("head.conv5.0.conv1.", "psp"),
        ("head.aspp.", "deeplab"),
        ("head.conv5.", "fcn"),
    ),
    "mmsegmentation": (
        ("decode_head.enc_module.", "encnet"),
        ("decode_head.psp_modules.", "psp"),
        ("decode_head.aspp_modules.", "deeplab"),
        ("decode_head.convs.", "fcn"),
    ),
    "torchvision": (("classifier.0.convs.", "deeplab"), ("classifier.", "fcn")),
}
_RULES = {
    "PyTorch-Encoding": (_PYTORCH_ENCODING, _ENCODING_HEADS),
    "mmsegmentation": (_MMSEG, _MMSEG_HEADS),
    "torchvision": (_TORCHVISION, _TORCHVISION_HEADS),
}
# The trunk's classifier of images, which files of PyTorch-Encoding had until 1.0.1.
_DROPPED = re.compile(r"(pretrained|backbone)\.fc\.")


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint of another project, under the names of this one.

    Attributes:
        kind: where it comes from: a key of `_RULES`.
        network: "encnet", "fcn", "psp" or "deeplab".
        tensors: by our names.
        origin_of: our name -> name in the file.
        described: what the configuration in the file says; None if there is none.
        classes, palette: class names and colours, if the file has them.
    """

    kind: str
    network: str
    tensors: dict[str, Tensor]
    origin_of: dict[str, str]
    described: Described | None = None
    classes: list[str] = field(default_factory=list)
    palette: list[list[int]] = field(default_factory=list)

    @property
    def assumed(self) -> str:
        """Usual settings assumed because neither weights nor configuration state them, or ""."""
        if self.kind != "mmsegmentation" or self.described is not None:
            return ""
        return "output stride 8, align_corners=False and undilated heads"


def identify(tensors: Mapping[str, Tensor], meta: Mapping[Any, Any], source: str) -> PeerCheckpoint:
    """Recognise a checkpoint's project and rename its tensors.

    Raises:
        ValueError: of no known origin, of a network that is not here, or a tensor without a place
            here; names it.
    """
    kind = _origin(tensors, source)
    described = describe(meta, source) if kind == "mmsegmentation" else None
    marked = (n for start, n in _MARKS[kind] if any(key.startswith(start) for key in tensors))
    network = next(marked, None)
    if network is None:
        raise ValueError(f"{source} is a checkpoint of {kind} with a head that is not here")
    if described is not None and described.network != network:
        raise ValueError(
            f"{source} describes a network of the kind {described.network}, "
            f"but its weights are those of {network}"
        )
    shared, heads = _RULES[kind]
    renamed: dict[str, str] = {}
    strange: list[str] = []
    for key in tensors:
        if _DROPPED.match(key):
            continue
        name = _rename(key, (*heads[network], *shared), kind)
        if name is None:
            strange.append(key)
        elif name in renamed:
            raise ValueError(f"{source}: {key} and {renamed[name]} both stand for {name}")
        else:
            renamed[name] = key
    if strange:
        raise ValueError(f"{source}: {listed(strange)} of {kind} have no place in this project")
    found = {name: tensors[key] for name, key in renamed.items()}
    if (kind, network) == ("mmsegmentation", "deeplab"):
        _move_image_pool_last(found)
    return PeerCheckpoint(
        kind=kind,
        network=network,
        tensors=found,
        origin_of=renamed,
        described=described,
        classes=_class_names(meta),
        palette=_colours(meta),
    )


def _origin(tensors: Mapping[str, Tensor], source: str) -> str:
    """Whose checkpoint it is, a key of `_RULES`."""
    if any(key.startswith("pretrained.") for key in tensors):
        _refuse_early(tensors, source)
        return "PyTorch-Encoding"
    if any(key.startswith("decode_head.") for key in tensors):
        return "mmsegmentation"
    if any(key.startswith("backbone.") for key in tensors):
        if any(key.startswith("classifier.") for key in tensors):
            return "torchvision"
        if any(key.startswith("head.") for key in tensors):
            raise ValueError(f"{source} is a checkpoint of this project or of an image classifier")
    raise ValueError(
        f"{source} is not a checkpoint of PyTorch-Encoding, mmsegmentation or torchvision: "
        f"it starts with {listed(list(tensors))}"
    )


def _rename(key: str, rules: Rules, kind: str) -> str | None:
    if kind == "mmsegmentation" and key.startswith("backbone."):
        return "backbone." + trunk_key(key.removeprefix("backbone."))
    for pattern, replacement in rules:
        found = re.match(pattern, key)
        if found:
            return replacement + key[found.end() :]
    return None


def _move_image_pool_last(tensors: dict[str, Tensor]) -> None:
    """mmsegmentation has the image's mean before the other parts of the pyramid, not behind."""
    name = "head.bottleneck.conv.weight"
    weight = tensors.get(name)
    if weight is not None and weight.dim() == 4:
        tensors[name] = torch.roll(weight, -weight.shape[0], dims=1)


def _refuse_early(tensors: Mapping[str, Tensor], source: str) -> None:
    if "head.encmodule.encoding.0.codewords" in tensors:
        raise ValueError(
            f"{source} is an EncNet of PyTorch-Encoding before 0.5, whose assignment weights were "
            "normalised over the pixels instead of the codewords; there is no such layer here"
        )


def _described_data(meta: Mapping[Any, Any], old: str, new: str) -> list[Any]:
    """A list about the data set in the ``meta`` of mmsegmentation 0.x or 1.x; else empty."""
    described = meta.get("dataset_meta")
    found = described.get(new, meta.get(old)) if isinstance(described, Mapping) else meta.get(old)
    if isinstance(found, np.ndarray):
        found = found.tolist()
    return list(found) if isinstance(found, list | tuple) else []


def _class_names(meta: Mapping[Any, Any]) -> list[str]:
    return [printable(str(name)) for name in _described_data(meta, "CLASSES", "classes")]


def _colours(meta: Mapping[Any, Any]) -> list[list[int]]:
    """RGB triples; empty unless each is one."""
    return [
        [int(value) for value in colour]
        for colour in _described_data(meta, "PALETTE", "palette")
        if isinstance(colour, list | tuple)
        and len(colour) == 3
        and all(isinstance(value, int | float) and 0 <= value <= 255 for value in colour)
    ]


def model_options(peer: PeerCheckpoint, source: str) -> dict[str, Any]:
    """Arguments of `create_model`, read from the shapes of the tensors and the configuration.

    Raises:
        ValueError: no such backbone, or a tensor that tells a size is missing.
    """
    tensors = peer.tensors
    last = tensors.get("head.classifier.weight")
    if last is None or last.dim() != 4:
        raise ValueError(f"{source} has no last layer, so the number of classes is not known")
    prefix = "backbone."
    trunk = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    mmseg = peer.kind == "mmsegmentation"
    options: dict[str, Any] = {
        "name": peer.network,
        "num_classes": last.shape[0],
        "backbone": backbone_name(trunk, source, openmmlab=mmseg),
        "head_channels": last.shape[1],
        "aux": "aux_head.classifier.weight" in tensors,
        "align_corners": peer.kind == "PyTorch-Encoding",
        "dropout_kind": "channel" if mmseg else "element",
        "output_stride": 8,
    }
    if peer.network == "encnet":
        codewords = tensors.get("head.context.encoding.codewords")
        options |= {
            "form": "released",
            "num_codewords": 32 if codewords is None else len(codewords),
            "se_loss": "head.context.presence.weight" in tensors,
            "lateral": "head.fusion.conv.weight" in tensors,
        }
    elif peer.network == "fcn":
        convs = len({name.split(".")[2] for name in tensors if name.startswith("head.convs.")})
        if convs not in (1, 2):
            raise ValueError(f"{source}: the head of its FCN has {convs} convolutions, not 1 or 2")
        options |= {"num_convs": convs, "concat_input": "head.concat.conv.weight" in tensors}
    elif peer.network == "deeplab":
        options["project"] = "head.project.conv.weight" in tensors
    return options | (peer.described.options if peer.described is not None else {})
