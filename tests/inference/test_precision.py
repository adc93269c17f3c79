"""The arithmetic of predictions, and what the options say about it and about readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from encnet_triton import evaluate, options
from encnet_triton.inference import Predictor
from encnet_triton.inference.precision import compute_dtype
from encnet_triton.models import create_model
from encnet_triton.weights.checkpoint import ModelInfo

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def info() -> ModelInfo:
    return ModelInfo(
        options={}, classes=list("abcdefg"), palette=[[0] * 3] * 7, mean=[0.5] * 3, std=[0.25] * 3,
        crop=[32, 32],
    )  # fmt: skip


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed in the test, and as it was after it."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("gains", [False, True])
def test_auto_is_bfloat16_where_it_gains(monkeypatch: pytest.MonkeyPatch, gains: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: gains)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gains)
    for device in (CPU, GPU):
        assert compute_dtype("auto", device) is (torch.bfloat16 if gains else None)
    assert torch.backends.cudnn.allow_tf32  # nobody asked for float32


@pytest.mark.usefixtures("tf32")
def test_float32_is_without_tf32() -> None:
    assert compute_dtype("float32", GPU) is None
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("tf32")
def test_the_option_reaches_the_network() -> None:
    torch.manual_seed(0)
    model = create_model("fcn", 7, backbone="demo", head_channels=8).eval()
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda *hooked: seen.append(hooked[2].logits.dtype))
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    found = {}
    for name in ("float32", "bfloat16"):
        given = evaluate.make_parser().parse_args(["--checkpoint", "x", "--precision", name])
        predictor = options.make_predictor(given, model, info(), CPU)
        found[name] = predictor(image)
        assert ("bfloat16" in predictor.describe()) is (name == "bfloat16")
    assert set(seen[:2]) == {torch.float32} and set(seen[2:]) == {torch.bfloat16}
    assert (found["float32"] == found["bfloat16"]).float().mean() > 0.9


def test_weights_are_in_the_layout_of_the_images() -> None:
    model = create_model("fcn", 7, backbone="demo", head_channels=8).eval()
    Predictor(model, info())
    for name, weight in model.named_parameters():
        assert weight.dim() < 4 or weight.is_contiguous(memory_format=torch.channels_last), name


def test_readers_are_counted_by_the_cores_a_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert options.reader_count(None, GPU) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert options.reader_count(None, GPU) == 1
    assert options.reader_count(None, CPU) == 1
    assert options.reader_count(0, GPU) == 0
