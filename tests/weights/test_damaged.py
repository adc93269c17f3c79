"""A checkpoint of ours that is damaged or does not fit is one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from encnet_triton.models import create_model
from encnet_triton.weights.checkpoint import (
    FORMAT,
    CheckpointError,
    load_model,
    model_tensors,
    read,
    save_model,
)
from tests.support.checkpoints import INFO, OPTIONS, write_unchecked


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save_model(path, create_model(**OPTIONS), INFO)
    return path


def rewritten(
    original: Path, to: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> Path:
    """A copy without checksums, as files of before, whose tensors and metadata were changed."""
    tensors, metadata = read(original)
    change(tensors, metadata)
    write_unchecked(to, tensors, metadata)
    return to


def test_files_without_checksums_are_read(original: Path, tmp_path: Path) -> None:
    old = rewritten(original, tmp_path / "old.safetensors", lambda tensors, metadata: None)
    model, info = load_model(old)
    assert info.classes == ["a", "b"] and not model.training


def test_each_flipped_bit_is_found(original: Path, tmp_path: Path) -> None:
    """Of the numbers, anywhere; and of the header, which says what they are."""
    content = original.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8, header, 41), header, (header + len(content)) // 2, len(content) - 1]
    path = tmp_path / "flipped.safetensors"
    for place in places:
        for bit in (0, 6):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("options", []),
        ("options", {**OPTIONS, "name": "unknown"}),
        ("options", {**OPTIONS, "unknown": 1}),
        ("options", {**OPTIONS, "head_channels": 10**12}),
        ("options", {**OPTIONS, "head_channels": "8"}),
        ("options", {**OPTIONS, "num_classes": -1}),
        ("options", {"unit": 5}),
        ("classes", "ab"),
        ("classes", [1, 2]),
        ("palette", [[0, 0, 0]]),
        ("palette", [[0, 0, 0], [0, 0, 300]]),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, "x"]),
        ("std", [0.2, 0.0, 0.2]),
        ("crop", [32, 32.5]),
        ("crop", [0, 32]),
        ("base_size", "none"),
        ("scale_by", ["short"]),
        ("ignore_index", 1000),
        ("data", None),
        ("unknown", 1),
    ],
)
def test_metadata_of_any_content_is_one_sentence(
    field: str, value: object, original: Path, tmp_path: Path
) -> None:
    path = rewritten(
        original, tmp_path / "x.safetensors", lambda _, found: found["model"].update({field: value})
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_metadata_that_is_no_document_is_one_sentence(
    text: str, original: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(read(original)[0], path, {"format": FORMAT, "metadata": text})
    with pytest.raises(CheckpointError, match="is damaged: its metadata"):
        load_model(path)
    save_file(read(original)[0], path, {"format": FORMAT})
    with pytest.raises(CheckpointError, match="is damaged: its metadata"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.fill_(float("nan")), "holds values that are not finite"),
        (lambda t: t.to(torch.int32), r"is torch.int32 in the file and torch.float32 in the model"),
        (lambda t: t.to(torch.complex64), "is torch.complex64 in the file"),
        (lambda t: t[:1], "in the file"),
    ],
)
def test_weights_that_cannot_be_weights_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], sentence: str, original: Path, tmp_path: Path
) -> None:
    name = "model.backbone.layer1.0.conv1.weight"
    path = tmp_path / "x.safetensors"
    rewritten(original, path, lambda tensors, _: tensors.update({name: change(tensors[name])}))
    with pytest.raises(CheckpointError, match=sentence):
        load_model(path)


def test_a_model_without_a_value_is_not_saved(original: Path, tmp_path: Path) -> None:
    model, info = load_model(original)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("inf")
    assert model_tensors(model)
    save_model(tmp_path / "x.safetensors", model, info)
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="has no umask")
def test_a_checkpoint_follows_the_umask(original: Path, tmp_path: Path) -> None:
    model, info = load_model(original)
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "x.safetensors", model, info)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert "checksums" in file.metadata()
