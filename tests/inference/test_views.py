"""Averages over windows, scales and mirror images, against restatements."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.inference import PAPER_SCALES, Predictor, Views
from encnet_triton.weights.checkpoint import ModelInfo


class Output(NamedTuple):
    logits: Tensor


class Random(nn.Module):
    """A strided convolution with fixed random weights, so that borders, scales and mirrors show."""

    align_corners = True

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 9, stride=8, padding=4)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Output:
        self.batches.append(len(x))
        return Output(self.conv(x))


def info(crop: int, base_size: int | None) -> ModelInfo:
    return ModelInfo(
        options={}, classes=list("abcde"), palette=[[0] * 3] * 5, mean=[0.5] * 3, std=[0.25] * 3,
        crop=[crop, crop], base_size=base_size, scale_by="long",
    )  # fmt: skip


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (70, 100, 3), dtype=np.uint8)


def assert_alike(labels: Tensor, others: Tensor) -> None:
    """At most one pixel in a thousand is another class.

    Rounding moves a score by 1e-6 of itself and so decides where two classes are as close as that:
    one pixel in 1e5 of these images.
    """
    assert (labels == others).float().mean() >= 0.999


def normalised(image: np.ndarray) -> Tensor:
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    return (x / 255 - 0.5) / 0.25


@pytest.mark.float32
@torch.no_grad()
def test_scales_and_mirror_images_are_averaged_as_probabilities(image: np.ndarray) -> None:
    model = Random()
    x, total = normalised(image), torch.zeros(1, 5, 70, 100)
    for scale in (0.8, 1.2):
        view = F.interpolate(
            x, size=(round(70 * scale), round(100 * scale)), mode="bilinear", antialias=True
        )
        for mirrored in (False, True):
            logits = model(view.flip(3) if mirrored else view).logits
            up = F.interpolate(logits, view.shape[2:], mode="bilinear", align_corners=True)
            probability = up.softmax(1)
            probability = probability.flip(3) if mirrored else probability
            total += F.interpolate(probability, (70, 100), mode="bilinear")
    views = Views((0.8, 1.2), flip=True)
    prediction = Predictor(model, info(64, None), whole_image=True, views=views)(image)
    assert_alike(prediction, total.argmax(1)[0])


@pytest.mark.float32
def test_a_mirrored_image_has_the_mirrored_prediction(image: np.ndarray) -> None:
    # One window, so that its borders are the same for both.
    predictor = Predictor(Random(), info(104, None), views=Views((1.0,), flip=True))
    wide = np.pad(image, ((0, 34), (2, 2), (0, 0)), mode="edge")
    straight = predictor(wide)
    mirrored = predictor(np.ascontiguousarray(wide[:, ::-1]))
    assert_alike(straight, mirrored.flip(1))
    alone = Predictor(Random(), info(104, None))(wide)
    assert (alone != straight).any()  # mirroring makes a difference here


@pytest.mark.float32
def test_the_number_of_windows_computed_at_once_changes_nothing(image: np.ndarray) -> None:
    one, many = Random(), Random()
    views = Views(PAPER_SCALES, flip=True)
    first = Predictor(one, info(48, 100), views=views, batch=1)(image)
    second = Predictor(many, info(48, 100), views=views, batch=8)(image)
    assert_alike(first, second)
    assert max(one.batches) == 1 and max(many.batches) == 8
    assert sum(one.batches) == sum(many.batches)


def black_below(x: Tensor, height: int, width: int) -> Tensor:
    black = normalised(np.zeros((1, 1, 3), np.uint8))
    right = black.expand(-1, -1, x.shape[2], width - x.shape[3])
    below = black.expand(-1, -1, height - x.shape[2], width)
    return torch.cat([torch.cat([x, right], 3), below], 2)


@torch.no_grad()
def released(model: nn.Module, image: np.ndarray, base: int, crop: int) -> Tensor:
    """The published evaluation, restated: long edge, grid of windows cut at the border, and
    exp(logits + mirrored logits), averaged over windows and summed over scales."""
    height, width = image.shape[:2]
    total = torch.zeros(1, 5, height, width, dtype=torch.float64)
    for scale in PAPER_SCALES:
        long = math.ceil(base * scale)
        h, w = (
            (long, int(width * long / height + 0.5))
            if height > width
            else (int(height * long / width + 0.5), long)
        )
        x = F.interpolate(normalised(image), (h, w), mode="bilinear", align_corners=True)
        ph, pw = max(h, crop), max(w, crop)
        x = black_below(x, ph, pw)
        stride = int(crop * 2 / 3)
        rows = math.ceil((ph - crop) / stride) + 1
        columns = math.ceil((pw - crop) / stride) + 1
        sums = torch.zeros(1, 5, ph, pw, dtype=torch.float64)
        count = torch.zeros(1, 1, ph, pw)
        for row in range(rows):
            for column in range(columns):
                top, left = row * stride, column * stride
                bottom, right = min(top + crop, ph), min(left + crop, pw)
                window = x[:, :, top:bottom, left:right]
                window = black_below(window, crop, crop)
                up = [
                    F.interpolate(m, (crop, crop), mode="bilinear", align_corners=True)
                    for m in (model(window).logits, model(window.flip(3)).logits)
                ]
                scores = (up[0] + up[1].flip(3)).double().exp()
                sums[:, :, top:bottom, left:right] += scores[:, :, : bottom - top, : right - left]
                count[:, :, top:bottom, left:right] += 1
        averaged = (sums / count)[:, :, :h, :w]
        total += F.interpolate(averaged, (height, width), mode="bilinear", align_corners=True)
    return total.argmax(1)[0]


@pytest.mark.float32
@pytest.mark.parametrize("tall", [False, True])
def test_released_protocol_equals_its_restatement(image: np.ndarray, tall: bool) -> None:
    picture = np.ascontiguousarray(image.transpose(1, 0, 2)) if tall else image
    views = Views(PAPER_SCALES, flip=True, released=True)
    prediction = Predictor(Random(), info(48, 90), views=views)(picture)
    expected = released(Random(), picture, 90, 48)
    assert_alike(prediction, expected)
    softmax = Predictor(Random(), info(48, 90), views=Views(PAPER_SCALES, flip=True))(picture)
    assert (softmax != expected).float().mean() > 0.001  # the protocols do differ


@pytest.mark.parametrize("scales", [(), (0.0,), (-1.0,), (9.0,)])
def test_scales_out_of_range_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales must be"):
        Views(scales)
