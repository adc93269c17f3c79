"""Label maps made a tile at a time equal those of scores at full resolution, and need no memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encnet_triton.data import default_palette
from encnet_triton.inference import Predictor, Views, merging, window_starts
from encnet_triton.models import create_model
from encnet_triton.train.forecast import Lifetimes, peak_memory
from encnet_triton.train.recipe import build
from encnet_triton.weights.checkpoint import ModelInfo
from tests.support.reading_back import ReadsNothingBack


def full_scores(view: merging.View, align_corners: bool, released: bool) -> Tensor:
    """Scores of a view, 1 x n x H x W float64, every window at full resolution."""
    (height, width), crop = view.size, view.crop
    n = next(iter(view.windows.values()))[0].shape[2]
    total = torch.zeros(1, n, height + crop[0], width + crop[1], dtype=torch.float64)
    visits = torch.zeros(total.shape[2:], dtype=torch.float64)
    for (top, left), maps in view.windows.items():
        place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
        for low in maps:
            wide = low.permute(2, 0, 1)[None].double()
            up = F.interpolate(wide, crop, mode="bilinear", align_corners=align_corners)
            total[place] += up.exp() if released else up.softmax(1)
        visits[place] += 1
    return (total / visits)[..., :height, :width]


def expected(
    views: list[merging.View], size: tuple[int, int], align_corners: bool, released: bool
) -> tuple[Tensor, Tensor]:
    """Labels, and where the two best scores are too close for float32 to tell."""
    total = torch.zeros((), dtype=torch.float64)
    for view in views:
        scores = full_scores(view, align_corners, released)
        if scores.shape[2:] != size:
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=released)
        total = total + scores
    best, second = total[0].topk(2, 0).values
    # 60 roundings of float32: of two interpolations, an exponential of up to 5 and a sum.
    return total[0].argmax(0), (best - second) / best < 60 * 2**-23


def view_of(
    size: tuple[int, int], crop: tuple[int, int], low: tuple[int, int], maps: int, released: bool
) -> merging.View:
    tops, lefts = (window_starts(s, c, not released) for s, c in zip(size, crop, strict=True))
    dtype = torch.float64 if released else torch.float32
    windows = {
        place: [torch.randn(*low, 7, dtype=dtype) * 2 for _ in range(maps)]
        for place in product(tops, lefts)
    }
    return merging.View(size, crop, tops, lefts, windows)


@pytest.mark.float32
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("entries", [500, 10**6])
@pytest.mark.parametrize(
    ("sizes", "maps"),
    [([(50, 70)], 1), ([(50, 70)], 2), ([(31, 44)], 1), ([(25, 35), (50, 70), (88, 123)], 2)],
    ids=["one", "mirrored", "resized", "several"],
)
def test_labels_are_those_of_scores_at_full_resolution(
    monkeypatch: pytest.MonkeyPatch,
    released: bool,
    align_corners: bool,
    entries: int,
    sizes: list[tuple[int, int]],
    maps: int,
) -> None:
    monkeypatch.setattr(merging, "TILE_ENTRIES", entries)
    torch.manual_seed(entries)
    views = [view_of(s, (32, 24), (5, 4), maps, released) for s in sizes]
    labels = merging.merged_labels(views, (50, 70), align_corners=align_corners, released=released)
    wanted, tied = expected(views, (50, 70), align_corners, released)
    assert tied.float().mean() < 0.01
    assert (labels == wanted)[~tied].all()


def test_logits_far_apart_have_labels_too() -> None:
    # Between two such pixels every class is a hundred below the peak of its pixel.
    low = torch.tensor([[[0.0, -200.0], [-200.0, 0.0]]])
    view = merging.View((1, 9), (1, 9), [0], [0], {(0, 0): [low, low]})
    labels = merging.merged_labels([view], (1, 9), align_corners=True)
    assert labels[0, :4].eq(0).all() and labels[0, 5:].eq(1).all()


def small_info(classes: int, crop: int) -> ModelInfo:
    return ModelInfo(
        options={}, classes=[str(k) for k in range(classes)],
        palette=default_palette(classes).tolist(), mean=[0.5] * 3, std=[0.25] * 3,
        crop=[crop, crop],
    )  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Dispatch modes do not see other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_prediction_reads_nothing_back() -> None:
    model = create_model("fcn", 7, backbone="demo", head_channels=8).eval()
    image = np.zeros((70, 90, 3), np.uint8)
    views = Views((0.75, 1.0), flip=True)
    with ReadsNothingBack():
        assert Predictor(model, small_info(7, 64))(image).shape == (70, 90)
        assert Predictor(model, small_info(7, 64), views=views)(image).shape == (70, 90)


@pytest.mark.usefixtures("one_thread")
def test_a_validation_needs_less_memory_than_a_step_was_forecast_to() -> None:
    given = {"backbone": "demo", "crop": [64, 64], "batch_size": 4, "amp": "off"}
    config = build("scenes_encnet", given)
    forecast = peak_memory(config, 150, 1)
    model = create_model(num_classes=150, **config.model.options()).eval()
    weights = sum(p.nbytes for p in model.parameters())
    image = np.zeros((150, 200, 3), np.uint8)
    with Lifetimes() as live:
        Predictor(model, small_info(150, 64))(image)
    scores = 4 * 150 * 150 * 200
    assert weights + live.peak < forecast
    assert live.peak < scores / 2
