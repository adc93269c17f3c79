"""Files of tensors that others have written: .pth, .pt and .safetensors, on disk or at a URL.

Pickles are read with ``weights_only=True``: nothing in them can run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["listed", "read_document", "read_tensors", "tensors_in"]

# Names such as resnet50-0676ba61.pth carry the start of the file's SHA-256.
_HASHED_NAME = re.compile(r"-[0-9a-f]{8,}\.[^/]*$")


def listed(keys: Sequence[str]) -> str:
    """The first keys of a list, for an error."""
    if not keys:
        return "no keys"
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def read_document(source: str) -> Any:
    """What a local file or URL holds, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    try:
        content = _download(source) if "://" in source else _load(Path(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no weights at {source}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source} is damaged, out of reach or not a file of tensors: {reason}"
        ) from error
    return content


def read_tensors(source: str) -> dict[str, Tensor]:
    """The tensors of a state dict in a local file or at a URL, on the CPU."""
    return tensors_in(read_document(source), source)


def tensors_in(content: Any, source: str) -> dict[str, Tensor]:
    """A document as a state dict; ValueError, naming the source, if it is something else."""
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
        raise ValueError(f"{path}: weights must be a .pth, .pt or .safetensors file")
    return torch.load(path, map_location="cpu", weights_only=True)
