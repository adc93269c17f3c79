"""Read files written by torch.save (torch 0.4 and newer) without running anything in them."""

from __future__ import annotations

import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from encnet_triton.unpickle import NUMBERS, load_pickle

__all__ = ["read_torch_file"]

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


# What zipfile, its decompressors and struct raise; torch.save compresses nothing, damage may.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors are views of."""

    flat: Tensor


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save, its tensors on the CPU.

    Objects of classes other than tensors, numbers and containers are `unpickle.Placeholder`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or something else; a sentence without the file's name.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(file, path.stat().st_size)
            file.seek(0)
            return _read_legacy(file, path.stat().st_size)
    except UnpicklingError as error:
        raise ValueError(str(error)) from error
    except _DAMAGE as error:
        raise ValueError(f"it is damaged: {str(error) or type(error).__name__}") from error


def _read_zip(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        documents = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(documents) != 1:
            raise UnpicklingError("it is a ZIP archive of something other than torch.save's")
        folder = documents[0].partition("/")[0]
        if f"{folder}/constants.pkl" in entries:
            raise UnpicklingError("it is a TorchScript program: save the state dict of the network")
        if f"{folder}/byteorder" in entries and archive.read(f"{folder}/byteorder") != b"little":
            raise UnpicklingError("it was written on a big-endian machine, which is not read")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise UnpicklingError("it claims to hold more bytes than it has")
        read: dict[str, bytearray] = {}

        def storage(kind: _StorageType, key: str, count: int) -> _Storage:
            name = f"{folder}/data/{key}"
            if name not in read:
                if name not in entries:
                    raise UnpicklingError(f"it is damaged: {name} is not in it")
                read[name] = bytearray(archive.read(name))
            if count * kind.dtype.itemsize > len(read[name]):
                raise UnpicklingError(f"it is damaged: {name} is shorter than its tensors")
            return _Storage(_numbers(read[name], kind.dtype, count))

        with archive.open(documents[0]) as document:
            return _load(document, storage)


def _numbers(content: bytearray, dtype: torch.dtype, count: int) -> Tensor:
    if count == 0:  # which frombuffer does not take
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count)


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """The format before torch 1.6: pickles one after the other, then the storages' bytes."""
    try:
        started = load_pickle(file, {}) == _LEGACY_MAGIC
        known = started and load_pickle(file, {}) == _LEGACY_PROTOCOL
    except UnpicklingError:
        known = False
    if not known:
        raise UnpicklingError("it is not a file of torch.save")
    system = load_pickle(file, {})
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise UnpicklingError("it was written on a big-endian machine, which is not read")
    made: dict[str, _Storage] = {}
    left = size

    def storage(kind: _StorageType, key: str, count: int) -> _Storage:
        nonlocal left
        if key not in made:
            left -= count * kind.dtype.itemsize
            if left < 0:
                raise UnpicklingError("it claims to hold more bytes than it has")
            made[key] = _Storage(torch.zeros(count, dtype=kind.dtype))
        if made[key].flat.dtype != kind.dtype or len(made[key].flat) < count:
            raise UnpicklingError(f"it is damaged: the storage {key!r} is of two types")
        return made[key]

    content = _load(file, storage)
    keys = load_pickle(file, {})
    if not isinstance(keys, list) or not all(key in made for key in keys) or len(keys) < len(made):
        raise UnpicklingError("it is damaged: its list of storages is wrong")
    for key in keys:
        _fill(made[key].flat, file)
    return content


def _fill(flat: Tensor, file: BinaryIO) -> None:
    (count,) = struct.unpack("<q", file.read(8))
    if count != len(flat):
        raise UnpicklingError("it is damaged: a storage has another length than its tensors say")
    data = bytearray(file.read(count * flat.element_size()))
    if len(data) < count * flat.element_size():
        raise UnpicklingError("it is damaged: it ends too early")
    flat.copy_(_numbers(data, flat.dtype, count))


def _load(file: Any, storage: Callable[[_StorageType, str, int], _Storage]) -> Any:
    def persistent(identity: Any) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise UnpicklingError("it is damaged: it refers to something that is not a storage")
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, _StorageType):
            raise UnpicklingError(f"it has numbers of the type {kind!r}, which is not read")
        if not isinstance(key, str) or not _is_size(count) or view not in ([], [None]):
            raise UnpicklingError("it is damaged: it refers to something that is not a storage")
        return storage(kind, key, count)

    return load_pickle(file, _KNOWN, placeholders=True, persistent=persistent)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, as far as it reaches."""
    if not isinstance(storage, _Storage) or not _is_size(offset):
        raise TypeError("a tensor has no storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise TypeError("a tensor has no shape")
    if len(size) > 16 or not all(_is_size(n) for n in (*size, *stride)):
        raise TypeError("a tensor has no shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= len(storage.flat) or math.prod(size) > len(storage.flat)):
        raise UnpicklingError("a tensor has more entries than its storage, or reaches beyond it")
    if 0 in size:
        return storage.flat.new_empty(size)
    return storage.flat.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter is not a tensor")
    return data


def _size(*numbers: Any) -> tuple[Any, ...]:
    (sizes,) = numbers
    return tuple(sizes)


def _dictionary(*_: Any) -> dict[Any, Any]:
    """A defaultdict; what it makes of missing keys is left out."""
    return {}


_KNOWN = {
    **NUMBERS,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("collections", "defaultdict"): _dictionary,
}
