"""Weights of a network of timm, into a trunk and out of it, under timm's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from encnet_triton.models.trunk import TimmTrunk, whole_network
from encnet_triton.unpickle import printable
from encnet_triton.weights.fitting import misfit
from encnet_triton.weights.reading import read_tensors

__all__ = ["FROM_TIMM", "load_trunk", "timm_tensors"]

FROM_TIMM = "timm"
"""In place of a file: the weights that timm has for a name, from its cache or the Hub."""


def load_trunk(trunk: TimmTrunk, source: str) -> None:
    """Fill a trunk from timm's own weights ("timm"), or from a file or URL.

    The file holds the whole classifier or its trunk, under the names of timm, of its
    ``features_only`` networks, or of EfficientNet-PyTorch. Every tensor of the trunk must be there,
    and every other one must belong to the classifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights cannot be read, or do not fit; names file and key.
    """
    whole = _of_timm(trunk.name) if source == FROM_TIMM else whole_network(trunk.name)
    names = _names(trunk, whole)
    if source == FROM_TIMM:
        given: Mapping[str, Tensor] = whole.state_dict()
    else:
        given = _renamed(read_tensors(source), whole.state_dict())
        given = {names.get(key, key): tensor for key, tensor in given.items()}
    own = {names[key]: tensor for key, tensor in trunk.net.state_dict().items()}
    head = whole.state_dict().keys() - own.keys()
    wanted = {key: tensor for key, tensor in given.items() if key not in head}
    if (found := misfit(wanted, own, f"timm's {trunk.name}", uncounted=True)) is not None:
        raise ValueError(f"{source} {found}")
    filled = {key: wanted.get(name, own[name]) for key, name in names.items()}
    trunk.net.load_state_dict(filled)


def timm_tensors(trunk: TimmTrunk) -> dict[str, Tensor]:
    """The trunk's tensors under timm's names for the whole network."""
    names = _names(trunk, whole_network(trunk.name))
    return {names[key]: tensor for key, tensor in trunk.net.state_dict().items()}


def _of_timm(name: str) -> nn.Module:
    """The classifier with the weights that timm loads into it, strictly."""
    try:
        return whole_network(name, pretrained=True)
    except Exception as error:  # whatever the Hub's client raises
        reason = printable((str(error) or type(error).__name__).splitlines()[0])
        raise ValueError(
            f"timm's weights of {name} are neither in its cache nor within reach ({reason}); give "
            "a file of them to --pretrained"
        ) from error


def _names(trunk: TimmTrunk, whole: nn.Module) -> dict[str, str]:
    """Names of the trunk's tensors -> those of the whole network, which timm's wrappers change."""
    known = whole.state_dict().keys()
    return {key: _whole_name(key, known) for key in trunk.net.state_dict()}


def _whole_name(key: str, known: Iterable[str]) -> str:
    first, dot, rest = key.partition(".")
    # "stages_0.x" was "stages.0.x", and a wrapper may keep the network as its "body" or "model".
    cuts = [place.start() for place in re.finditer("_", first)]
    split = (f"{first[:cut]}.{first[cut + 1 :]}{dot}{rest}" for cut in cuts)
    return next((name for name in (key, *split, rest) if name in known), key)


def _renamed(tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors under EfficientNet-PyTorch's names, under timm's; others as they are."""
    if "_conv_stem.weight" not in tensors:
        return tensors
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in whole)
    places = sorted({(int(one[1]), int(one[2])) for one in found if one})
    expanded = {key.split(".")[1] for key in tensors if "._expand_conv." in key}
    return {_timm_key(key, places, expanded): tensor for key, tensor in tensors.items()}


_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
         "_fc": "classifier"}  # fmt: skip
_EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_SEPARABLE = {**_EXPANDED, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _timm_key(key: str, places: list[tuple[int, int]], expanded: set[str]) -> str:
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([_ENDS.get(parts[0], parts[0]), *parts[1:]])
    if len(parts) < 4 or not parts[1].isdecimal() or int(parts[1]) >= len(places):
        return key
    stage, block = places[int(parts[1])]
    layers = _EXPANDED if parts[1] in expanded else _SEPARABLE
    return ".".join([f"blocks.{stage}.{block}", layers.get(parts[2], parts[2]), *parts[3:]])
