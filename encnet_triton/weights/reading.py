"""Tensor files from other projects, on disk or at a URL, and the state dict in them.

Nothing in a file can run: pickles are read by `encnet_triton.unpickle`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from encnet_triton.unpickle import Placeholder, printable
from encnet_triton.weights.torch_file import read_torch_file

__all__ = ["as_mapping", "listed", "read_document", "read_tensors", "state_dict_of"]

_SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".bin")
# Names such as resnet50-0676ba61.pth carry the start of the file's SHA-256.
_HASHED_NAME = re.compile(r"-([0-9a-f]{8,})\.[^/]*$")

# Keys under which trainers keep the network's state dict and its moving average.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")
# Prefixes that wrappers add to all names, and parts that others insert anywhere.
_PREFIXES = ("module.", "model.", "net.", "network.")
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_DEEPEST = 3


def listed(keys: Sequence[str]) -> str:
    """The first keys of a list, for an error."""
    if not keys:
        return "no keys"
    shown = ", ".join(printable(key) for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def read_document(source: str) -> Any:
    """The object in a local file or at a URL, its tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    try:
        return _load(_download(source) if "://" in source else Path(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no weights at {source}") from error
    except _WrongName:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        reason = printable(str(error) or type(error).__name__)
        raise ValueError(
            f"{source} is damaged, out of reach or not a file of tensors: {reason}"
        ) from error


def read_tensors(source: str) -> dict[str, Tensor]:
    """The tensors of a network's state dict in a local file or at a URL, on the CPU."""
    return state_dict_of(read_document(source), source)


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """A dictionary, also of a class of its own that was not made; None for anything else."""
    if isinstance(value, Placeholder) and value.items:
        return value.items
    if isinstance(value, Placeholder) and value.arguments and len(value.arguments) == 1:
        value = value.arguments[0]  # as MMEngine's ConfigDict stores itself
    return value if isinstance(value, Mapping) else None


def state_dict_of(document: Any, source: str, average: bool = False) -> dict[str, Tensor]:
    """The network's state dict in a document, without what trainers put around it: the outer
    dictionaries of a checkpoint, and the prefixes of DataParallel, torch.compile and others.

    Args:
        document: what `read_document` returned.
        source: its name, for errors.
        average: take the moving average of the weights that is stored beside them.

    Raises:
        ValueError: there is none; names the source.
    """
    found = _average_in(document, source) if average else document
    for _ in range(_DEEPEST):
        inner = as_mapping(found) or {}
        kept = (inner.get(key) for key in _WRAPPERS)
        within = next((one for one in kept if isinstance(one, Mapping | Placeholder)), None)
        if within is None:
            break
        found = within
    tensors = as_mapping(found)
    if isinstance(found, Placeholder) and tensors is None:
        raise ValueError(
            f"{source} holds an object of the class {found.name}, which is not made from a file: "
            "save the state dict of the network"
        )
    if not tensors:
        raise ValueError(f"{source} holds something other than a state dict of tensors")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = value.name if isinstance(value, Placeholder) else type(value).__name__
            raise ValueError(
                f"{source} holds something other than a state dict of tensors: "
                f"{printable(str(key))} is a {kind}"
            )
    return _plain_names(_without_averages(tensors, average), source)


def _without_averages(tensors: Mapping[str, Tensor], average: bool) -> dict[str, Tensor]:
    """The state dict without the buffers in which MMCV 1 keeps averages, or with their values."""
    buffers = {key for key in tensors if key.startswith("ema_") and "." not in key}
    taken = {key: tensor for key, tensor in tensors.items() if key not in buffers}
    if average:
        names = {key: "ema_" + key.replace(".", "_") for key in taken}
        taken = {key: tensors.get(names[key], tensor) for key, tensor in taken.items()}
    return taken


def _average_in(document: Any, source: str) -> Any:
    whole = as_mapping(document) or {}
    key = next((key for key in _AVERAGES if as_mapping(whole.get(key))), None)
    if key is None:
        inside = as_mapping(whole.get("state_dict")) or {}
        if any(isinstance(name, str) and name.startswith("ema_") for name in inside):
            return document
        raise ValueError(f"{source} has no moving average of the weights ({', '.join(_AVERAGES)})")
    if key == "ema_state_dict" and "message_hub" in whole:
        # MMEngine exchanges the two when it saves, so that what is loaded is the average.
        key = "state_dict"
    found = dict(as_mapping(whole[key]) or {})
    for counter in ("n_averaged", "steps"):
        found.pop(counter, None)
    return found


def _plain_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        for infix in _INFIXES:
            name = name.replace(infix, "")
        if name in plain:
            raise ValueError(f"{source}: two tensors are called {printable(name)}")
        plain[name] = tensor
    for _ in range(_DEEPEST):
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in plain)), None)
        if prefix is None:
            break
        plain = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    return plain


class _WrongName(ValueError):
    """The name of the source says already that it cannot be read."""


def _download(url: str) -> Path:
    if not url.endswith(_SUFFIXES):
        raise _WrongName(f"{url}: a URL must end in one of {_suffixes()}")
    hashed, name = _HASHED_NAME.search(url), url.rpartition("/")[2]
    if not hashed:  # files of other URLs may have the same name
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hashed and hashed[1], progress=False)
    return path


def _load(path: Path) -> Any:
    if path.exists() and not path.is_file():  # a folder, or a pipe, which would be waited for
        raise _WrongName(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return load_file(path)
    if not path.name.endswith(_SUFFIXES):
        raise _WrongName(f"{path}: weights must be a {_suffixes()} or .safetensors file")
    return read_torch_file(path)


def _suffixes() -> str:
    return ", ".join(_SUFFIXES)
