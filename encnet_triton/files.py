"""Files that are there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["replacing", "write_json", "write_tensors", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name in the folder of ``path`` to write to, and renames it when the block ends.

    The content is on disk before it gets its name. Where the block or the writing fails, a file
    that was at ``path`` is untouched and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a UTF-8 file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(document: Mapping[str, Any] | Sequence[Any], path: Path) -> None:
    """Write a JSON file."""
    write_text(json.dumps(document, indent=2) + "\n", path)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file.

    Raises:
        OSError: it could not be written (full disk, no permission).
    """
    # Copies in one layout: safetensors refuses views that share memory and other strides.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, dict(metadata) if metadata is not None else None)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save {path}: {error}") from error
