"""Convolutions with fewer products: which are taken, and that they are float32's convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.inference import Predictor, winograd
from encnet_triton.inference.winograd import fewer_products
from encnet_triton.models import create_model
from encnet_triton.weights.checkpoint import ModelInfo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes small convolutions too, in several parts of their channels."""
    monkeypatch.setattr(winograd, "_LEAST_PAIRS", 1)
    monkeypatch.setattr(winograd, "_INPUTS", 8)
    monkeypatch.setattr(winograd, "_OUTPUTS", 8)
    monkeypatch.setattr(winograd, "_TILES", 16)


def calls(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of convolutions that are computed with fewer products."""
    seen, image = [], winograd._image
    patch.setattr(winograd, "_image", lambda x, *more: seen.append(x) or image(x, *more))
    return seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "dilation"),
    [
        pytest.param(8, 8, (8, 16), 1, id="tiles divide the map"),
        pytest.param(3, 5, (22, 27), 1, id="odd"),
        pytest.param(12, 20, (23, 30), 2, id="parts of channels, dilated"),
        pytest.param(9, 7, (31, 29), 4, id="dilation of the last stage"),
    ],
)
@torch.no_grad()
def test_it_is_the_convolution(
    channels: int, outputs: int, size: tuple[int, int], dilation: int,
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, 3, padding=dilation, dilation=dilation)
    conv.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, channels, *size).to(memory_format=layout)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), 1, dilation, dilation)
    seen = calls(monkeypatch)
    with fewer_products(conv):
        y = conv(x)
    assert len(seen) == 2 and y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Measured at 512 channels: at most 2e-6 of the largest output, sixteen roundings.
    assert (y - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_the_matrices_make_every_single_convolution_exact() -> None:
    """One weight and one input at a time: the 9 x 36 pairs of a tile."""
    inputs, weights, outputs = (m.double() for m in winograd._matrices())
    tile, taps = torch.eye(36, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    found = torch.einsum("ok,ki,kw->iwo", outputs, inputs @ tile, weights @ taps)
    expected = F.conv2d(tile.view(36, 1, 6, 6), taps.view(9, 1, 3, 3)).flatten(2)
    assert (found - expected).abs().max() < 1e-5  # the matrices are in float32


@torch.no_grad()
def test_only_large_plain_convolutions_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    x = torch.randn(1, 256, 16, 16)
    refused = [
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3, stride=2, padding=1),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, padding=1, groups=2),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(256, 128, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=16, dilation=16),  # a tile has 64 x 64 pixels
    ]
    for conv in refused:
        expected = conv(x)
        with fewer_products(conv):
            assert torch.equal(conv(x), expected)
    taken = nn.Conv2d(256, 256, 3, padding=1)
    with fewer_products(taken), torch.autocast("cpu", torch.bfloat16):
        taken(x)
    assert not seen
    with fewer_products(taken):
        taken(x)
    taken(x)
    assert len(seen) == 1 and "forward" not in vars(taken)
    taken.forward = taken.forward  # type: ignore[method-assign]
    with fewer_products(taken):
        taken(x)
    assert len(seen) == 1 and "forward" in vars(taken)


@pytest.mark.usefixtures("small")
def test_a_predictor_uses_them_unless_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    torch.manual_seed(0)
    model = create_model("fcn", 7, backbone="demo", head_channels=8).eval()
    model.head.classifier.weight.data.normal_()
    info = ModelInfo({}, ["x"] * 7, [[0] * 3] * 7, [0.5] * 3, [0.2] * 3, [32, 32])
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    found = Predictor(model, info)(image)
    assert len(seen) == 8  # windows, each through four convolutions
    seen.clear()
    assert torch.equal(Predictor(model, info, exact=True)(image), found) and not seen
    assert not Predictor(model, info, autocast=torch.bfloat16)(image).is_floating_point()
    assert not seen
