"""Windows cover every pixel, agree with one pass where they must, and undo resizing and padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encnet_triton.data import DataError
from encnet_triton.inference import Predictor, Views, resized, window_starts
from encnet_triton.weights.checkpoint import ModelInfo


class Output(NamedTuple):
    logits: Tensor


class Brightness(nn.Module):
    """Class = the third of the brightness range; logits at an eighth of the size."""

    align_corners = False

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Output:
        self.sizes.append(tuple(x.shape))
        value = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8, ceil_mode=True)
        centres = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
        return Output(-20 * (value - centres) ** 2)


def info(crop: tuple[int, int], **options: object) -> ModelInfo:
    return ModelInfo(
        options={}, classes=["dark", "grey", "light"], palette=[[0] * 3] * 3,
        mean=[0.5] * 3, std=[0.5] * 3, crop=list(crop), **options,
    )  # fmt: skip


def stripes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Three broad stripes and the classes they should get."""
    label = np.repeat(np.arange(width)[None] * 3 // width, height, 0)
    image = np.array([0, 128, 255], dtype=np.uint8)[label]
    return np.repeat(image[..., None], 3, 2), label


@pytest.mark.parametrize("window", [1, 2, 3, 7, 48, 97, 120])
def test_windows_cover_and_stay_inside(window: int) -> None:
    for size in range(1, 501):
        starts = window_starts(size, window)
        covered = np.zeros(max(size, window), dtype=bool)
        for start in starts:
            assert 0 <= start <= max(0, size - window)
            covered[start : start + window] = True
        assert covered[:size].all()
        assert len(set(starts)) == len(starts)


@pytest.mark.parametrize(
    ("shape", "crop", "windows"),
    [((64, 96), (64, 96), 1), ((64, 192), (64, 96), 3), ((40, 50), (64, 96), 1)],
    ids=["exact", "sliding", "padded"],
)
def test_every_route_labels_the_stripes(
    shape: tuple[int, int], crop: tuple[int, int], windows: int
) -> None:
    image, label = stripes(*shape)
    model = Brightness()
    prediction = Predictor(model, info(crop))(image)
    assert sum(size[0] for size in model.sizes) == windows
    assert all(size[2:] == crop for size in model.sizes)
    inner = np.ones_like(label, dtype=bool)
    for edge in (shape[1] // 3, 2 * shape[1] // 3):
        inner[:, edge - 8 : edge + 8] = False
    if shape[1] < crop[1]:  # the fill shows in the features of the border
        inner[-8:] = inner[:, -10:] = False
    assert (prediction.numpy() == label)[inner].all()


def test_whole_image_is_one_pass_at_the_images_size() -> None:
    image, _ = stripes(64, 192)
    model = Brightness()
    Predictor(model, info((32, 32)), whole_image=True)(image)
    assert model.sizes == [(1, 3, 64, 192)]


def test_base_size_is_undone_in_the_label_map() -> None:
    image, label = stripes(60, 120)
    model = Brightness()
    prediction = Predictor(model, info((120, 240), base_size=120))(image)
    assert model.sizes == [(1, 3, 120, 240)]
    assert prediction.shape == label.shape
    assert (prediction.numpy() == label).mean() > 0.9


@pytest.mark.parametrize(
    ("scale_by", "expected"), [("short", (50, 100)), ("long", (25, 50)), ("image", (30, 60))]
)
def test_scale_by_names_the_edge(scale_by: str, expected: tuple[int, int]) -> None:
    assert resized(30, 60, 50, scale_by) == expected
    assert resized(30, 60, None, scale_by) == (30, 60)


class Replayed(nn.Module):
    """Writes its logits where those of the call before are, as a CUDA graph does."""

    align_corners = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.logits = model, torch.empty(0)

    def forward(self, x: Tensor) -> Output:
        logits = self.model(x).logits
        if self.logits.shape != logits.shape:
            self.logits = logits.to(memory_format=torch.channels_last, copy=True)
        return Output(self.logits.copy_(logits))


@pytest.mark.parametrize("views", [Views(), Views((1.0, 0.5), flip=True)], ids=["one", "several"])
def test_a_network_may_write_its_logits_where_the_last_ones_are(views: Views) -> None:
    image, _ = stripes(64, 192)
    image[:32] = image[:32, ::-1]
    model = Brightness()
    expected = Predictor(model, info((48, 64)), views=views)(image)
    assert torch.equal(Predictor(Replayed(model), info((48, 64)), views=views)(image), expected)
    assert len(expected.unique()) == 3


def test_a_line_that_would_become_a_giant_is_refused() -> None:
    predictor = Predictor(Brightness(), info((520, 520), base_size=520))
    with pytest.raises(DataError, match="1 x 2000 pixels would be scaled to 520 x 1,040,000 by"):
        predictor(np.zeros((1, 2000, 3), np.uint8))


def test_wrong_images_are_refused() -> None:
    predictor = Predictor(Brightness(), info((32, 32)))
    with pytest.raises(ValueError, match="H x W x 3 uint8 RGB, got float64 of shape"):
        predictor(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"got uint8 of shape \(4, 4\)"):
        predictor(np.zeros((4, 4), dtype=np.uint8))


def test_the_released_protocol_keeps_a_pixel_of_what_is_very_long() -> None:
    views = Views(scales=(0.5, 1.0), released=True)
    predictor = Predictor(Brightness().eval(), info((32, 32), base_size=64), views=views)
    assert predictor(np.zeros((2, 300, 3), np.uint8)).shape == (2, 300)
