"""The tensor names of PyTorch-Encoding and mmsegmentation, and what networks they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from encnet_triton.weights.backbone import backbone_name
from encnet_triton.weights.reading import listed

__all__ = ["PeerCheckpoint", "identify", "model_options"]

Rules = tuple[tuple[str, str], ...]

_CONV_BN = (("0", "conv"), ("1", "bn"))


def _pair(theirs: str, ours: str) -> Rules:
    """A convolution and its batch norm, numbered there, named here."""
    return tuple((f"{theirs}{number}\\.", f"{ours}{name}.") for number, name in _CONV_BN)


# Each rule is a pattern for the start of a name there and what takes its place here. An EncNet of
# PyTorch-Encoding has its classifier in conv6, an FCN as the fifth layer of conv5.
_PYTORCH_ENCODING: Rules = (
    (r"pretrained\.(?!fc\.)", "backbone."),
    *_pair(r"auxlayer\.conv5\.", "aux_head.convs.0."),
    (r"auxlayer\.conv5\.4\.", "aux_head.classifier."),
)
_PYTORCH_ENCODING_ENCNET: Rules = (
    *_PYTORCH_ENCODING,
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
)
_PYTORCH_ENCODING_FCN: Rules = (
    *_PYTORCH_ENCODING,
    *_pair(r"head\.conv5\.", "head.convs.0."),
    (r"head\.conv5\.4\.", "head.classifier."),
)
_MMSEG: Rules = (
    (r"backbone\.stem\.7\.", "backbone.bn1."),
    (r"backbone\.stem\.", "backbone.conv1."),
    (r"backbone\.", "backbone."),
    (r"auxiliary_head\.convs\.", "aux_head.convs."),
    (r"auxiliary_head\.conv_seg\.", "aux_head.classifier."),
    (r"decode_head\.conv_seg\.", "head.classifier."),
)
_MMSEG_ENCNET: Rules = (
    *_MMSEG,
    (r"decode_head\.bottleneck\.", "head.bottleneck."),
    (r"decode_head\.lateral_convs\.", "head.lateral."),
    (r"decode_head\.fusion\.", "head.fusion."),
    (r"decode_head\.enc_module\.encoding_project\.", "head.context.project."),
    (r"decode_head\.enc_module\.encoding\.0\.", "head.context.encoding."),
    (r"decode_head\.enc_module\.encoding\.1\.", "head.context.bn."),
    (r"decode_head\.enc_module\.fc\.0\.", "head.context.attention."),
    (r"decode_head\.se_layer\.", "head.context.presence."),
)
_MMSEG_FCN: Rules = (
    *_MMSEG,
    (r"decode_head\.convs\.", "head.convs."),
    (r"decode_head\.conv_cat\.", "head.concat."),
)


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint of another project, under the names of this one.

    Attributes:
        kind: where it comes from, in words.
        network: "encnet" or "fcn".
        tensors: by our names.
        origin_of: our name -> name in the file.
        classes: class names, if the file has them.
        mmseg: whether mmsegmentation made it, which upsamples with align_corners=False and drops
            whole channels.
    """

    kind: str
    network: str
    tensors: dict[str, Tensor]
    origin_of: dict[str, str]
    classes: list[str]
    mmseg: bool


def identify(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str) -> PeerCheckpoint:
    """Find out whose checkpoint it is and rename its tensors.

    Raises:
        ValueError: of no known origin, or a tensor without a place here; names it.
    """
    # DataParallel puts a prefix on every name.
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if any(key.startswith("pretrained.") for key in tensors):
        _refuse_early(tensors, source)
        encnet = any(key.startswith("head.encmodule.") for key in tensors)
        rules = _PYTORCH_ENCODING_ENCNET if encnet else _PYTORCH_ENCODING_FCN
        kind, mmseg = "PyTorch-Encoding", False
    elif any(key.startswith("decode_head.") for key in tensors):
        encnet = any(key.startswith("decode_head.enc_module.") for key in tensors)
        rules = _MMSEG_ENCNET if encnet else _MMSEG_FCN
        kind, mmseg = "mmsegmentation", True
    else:
        raise ValueError(
            f"{source} is no checkpoint of PyTorch-Encoding, mmsegmentation or a torchvision "
            f"ResNet: it starts with {listed(list(tensors))}"
        )
    renamed: dict[str, str] = {}
    strange: list[str] = []
    for key in tensors:
        name = _rename(key, rules)
        if name is None:
            strange.append(key)
        elif name in renamed:
            raise ValueError(f"{source}: {key} and {renamed[name]} both stand for {name}")
        else:
            renamed[name] = key
    if strange:
        raise ValueError(f"{source}: {listed(strange)} of {kind} have no place in this project")
    return PeerCheckpoint(
        kind=kind,
        network="encnet" if encnet else "fcn",
        tensors={name: tensors[key] for name, key in renamed.items()},
        origin_of=renamed,
        classes=_class_names(meta),
        mmseg=mmseg,
    )


def _rename(key: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        found = re.match(pattern, key)
        if found:
            return replacement + key[found.end() :]
    return None


def _refuse_early(tensors: Mapping[str, Tensor], source: str) -> None:
    if "head.encmodule.encoding.0.codewords" in tensors:
        raise ValueError(
            f"{source} is an EncNet of PyTorch-Encoding before 0.5, whose assignment weights were "
            "normalised over the pixels in place of the codewords; there is no such layer here"
        )


def _class_names(meta: Mapping[str, Any]) -> list[str]:
    described = meta.get("dataset_meta")
    names = meta.get("CLASSES")
    if isinstance(described, Mapping):
        names = described.get("classes", names)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def model_options(peer: PeerCheckpoint, source: str) -> dict[str, Any]:
    """Arguments of `create_model`, read from the shapes of the tensors.

    Raises:
        ValueError: no such backbone, or a tensor that tells a size is missing.
    """
    tensors = peer.tensors
    if "head.classifier.weight" not in tensors:
        raise ValueError(f"{source} has no last layer, so the number of classes is not known")
    prefix = "backbone."
    trunk = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    count, channels = tensors["head.classifier.weight"].shape[:2]
    options: dict[str, Any] = {
        "name": peer.network,
        "num_classes": count,
        "backbone": backbone_name(trunk, source),
        "head_channels": channels,
        "aux": "aux_head.classifier.weight" in tensors,
        "align_corners": not peer.mmseg,
        "dropout_kind": "channel" if peer.mmseg else "element",
    }
    if peer.network == "encnet":
        codewords = tensors.get("head.context.encoding.codewords")
        return {
            **options,
            "form": "released",
            "num_codewords": 32 if codewords is None else len(codewords),
            "se_loss": "head.context.presence.weight" in tensors,
            "lateral": "head.fusion.conv.weight" in tensors,
        }
    return {
        **options,
        "num_convs": 2 if "head.convs.1.conv.weight" in tensors else 1,
        "concat_input": "head.concat.conv.weight" in tensors,
    }
