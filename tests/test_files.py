"""Whatever writes a file leaves the former one and nothing else when it fails."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from encnet_triton.files import (
    remove_leftovers,
    replacing,
    write_json,
    write_tensors,
    write_text,
)
from encnet_triton.pictures import save_png
from encnet_triton.train.log import Log

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text("new", path),
    "json": lambda path: write_json({"new": 1}, path),
    "tensors": lambda path: write_tensors({"new": torch.zeros(3)}, path),
    "picture": lambda path: save_png(Image.new("RGB", (4, 4)), path),
}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that is flushed to disk finds no room there."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failing_write_leaves_the_old_content_and_nothing_else(
    kind: str, full_disk: None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left"):
        WRITERS[kind](path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        WRITERS[kind](path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_finds_no_room_is_named(kind: str, full_disk: None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left") as failure:
        WRITERS[kind](path)
    assert str(path) in str(failure.value) and "tmp:" not in str(failure.value)


def test_a_read_only_disk_refuses_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

    # Removing, too, is refused there, even of a file that was not made.
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: '.*/file'"):
        write_text("new", tmp_path / "file")


def test_an_error_without_a_number_keeps_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk left")

    monkeypatch.setattr("encnet_triton.files.save_file", fail)
    with pytest.raises(OSError, match="cannot save .*/file: the disk left"):
        write_tensors({"new": torch.zeros(3)}, tmp_path / "file")


def test_a_record_that_finds_no_room_names_its_file(tmp_path: Path) -> None:
    log = Log(tmp_path, enabled=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # opens, but takes nothing
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics.jsonl'"):
        log.write({"kind": "train", "step": 1})


def test_content_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(UnicodeEncodeError):
        write_text("half of a pair \ud800", path)
    with pytest.raises(RuntimeError, match="on the way"), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("on the way")
    with pytest.raises(FileNotFoundError):
        write_text("new", tmp_path / "absent" / "file")
    with pytest.raises(OSError, match="cannot save .*absent/file: "):
        write_tensors({"new": torch.zeros(3)}, tmp_path / "absent" / "file")
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_all_there_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text("a longer text that was there before", path)
    write_text("é\n", path)
    assert path.read_bytes() == "é\n".encode()
    whole = torch.arange(12.0).view(3, 4)
    given = {"turned": whole.T, "part": whole[:2], "whole": whole, "again": whole}
    write_tensors(given, path, {"format": "x"})
    found = load_file(path)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert list(tmp_path.iterdir()) == [path]


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead, living = 2**22 + 1, os.getpid()
    names = [f".a.png.{dead}.tmp", f".b.{living}.tmp", ".other.tmp", "c", f".d.{living}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    then = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / names[-1], (then, then))
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert {p.name for p in tmp_path.iterdir()} == set(names[1:-1])


def test_json_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    write_json({"a": float("nan"), "b": [1.5, float("-inf")], "c": {"d": 2}}, tmp_path / "x")
    found = json.loads((tmp_path / "x").read_text(), parse_constant=lambda text: 1 / 0)
    assert found == {"a": None, "b": [1.5, None], "c": {"d": 2}}
