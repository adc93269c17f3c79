"""Reading weights that others have trained."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Names such as resnet50-0676ba61.pth carry the start of the file's SHA-256.
_HASHED_NAME = re.compile(r"-[0-9a-f]{8,}\.[^/]*$")


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
    tensors = {k: v for k, v in _read(source).items() if k not in ("fc.weight", "fc.bias")}
    own = backbone.state_dict()
    unknown = [key for key in tensors if key not in own]
    # Files from before PyTorch 0.4.1 do not count batches.
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    if unknown or missing:
        raise ValueError(
            f"{source} does not fit the backbone: {_listed(unknown)} in the file match nothing, "
            f"{_listed(missing)} of the backbone are not in the file "
            f"(torchvision's weights fit resnet18, 34, 50, 101 and 152)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{source} does not fit the backbone: {key} is {tuple(tensor.shape)} in the file "
                f"and {tuple(own[key].shape)} in the backbone"
            )
    backbone.load_state_dict({**own, **tensors})


def _listed(keys: list[str]) -> str:
    if not keys:
        return "no keys"
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _read(source: str) -> dict[str, Tensor]:
    """The tensors of a local file or URL, on the CPU."""
    try:
        content = _download(source) if "://" in source else _load(Path(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no backbone weights at {source}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source} is damaged, out of reach or not a file of tensors: {reason}"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{source} holds something else than a state dict of tensors")
    return dict(content)


def _download(url: str) -> Any:
    if not url.endswith((".pth", ".pt")):
        raise ValueError(f"{url}: a URL must end in .pth or .pt")
    return torch.hub.load_state_dict_from_url(
        url,
        map_location="cpu",
        progress=False,
        check_hash=_HASHED_NAME.search(url) is not None,
        weights_only=True,
    )


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: backbone weights must be a .pth, .pt or .safetensors file")
    return torch.load(path, map_location="cpu", weights_only=True)
