"""Atomic writes: a file is written under another name, then renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "make_folder",
    "refuse_unwritable",
    "naming",
    "remove_leftovers",
    "replacing",
    "without_nan",
    "write_json",
    "write_tensors",
    "write_text",
]

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_LONG_GONE = 24 * 3600.0  # seconds


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to it when the block ends.

    The content is flushed to disk before the rename. If the block or the writing fails, the file
    that was at ``path`` is untouched and no temporary file is left. The file's permissions follow
    the umask, whatever the block gives it.

    Raises:
        OSError: it cannot be written (full disk, quota, no permission); names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            with open(temporary, "wb") as made:
                mode = os.fstat(made.fileno()).st_mode & 0o777
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only disk: the error of the writing says so
            temporary.unlink()


@contextmanager
def naming(path: Path, *temporary: Path) -> Iterator[None]:
    """Give ``path`` to an error of the system that names no file, or a temporary one.

    Opening a file names it, but writing to it does not: "No space left on device".
    """
    unnamed = (None, *temporary, *map(str, temporary))
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in unnamed:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path, what: str) -> Path:
    """A folder that ``what`` describes, made if it is not there.

    Raises:
        OSError: it cannot be made; names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{what} {path} cannot be made ({error.strerror})") from error
    return path


def refuse_unwritable(path: Path, what: str) -> None:
    """Refuse what `make_folder` would refuse, without making it.

    Raises:
        OSError: it cannot be made; names it.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise OSError(f"{what} {path} cannot be made ({os.strerror(errno.ENOTDIR)})")
    if there != path and not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{what} {path} cannot be made ({os.strerror(errno.EACCES)})")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that `replacing` left in a folder when its process was killed."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        try:
            if not _runs(int(match[1])) or time.time() - path.stat().st_mtime > _LONG_GONE:
                path.unlink()
        except OSError:
            continue  # another process removed it, or only another user may


def _runs(process: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def without_nan(value: Any) -> Any:
    """A JSON-able value in which floats that are not finite, which JSON lacks, are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return value


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(document: Mapping[str, Any] | Sequence[Any], path: Path) -> None:
    """Write a JSON file; floats that are not finite are null in it."""
    write_text(json.dumps(without_nan(document), indent=2) + "\n", path)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file.

    Raises:
        OSError: it could not be written (full disk, no permission).
    """
    plain = _plain(tensors)
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, dict(metadata) if metadata is not None else None)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which stands here
        raise OSError(f"cannot save {path}: {reason}") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors needs them: contiguous, and none sharing memory with another; copied if
    necessary."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != plain.nbytes:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found
