"""IoU by class and area, and average precision, on numbers that can be counted by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.details import (
    AREAS,
    average_precision,
    by_area,
    detail_tables,
    details,
    overlaps,
    ratios,
)
from encnet_triton.models import create_model
from encnet_triton.weights.checkpoint import ModelInfo, save_model


def test_overlaps_leave_out_what_has_no_label() -> None:
    label = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 1], [2, 0, 0, 2]], np.uint8)
    counts = overlaps(prediction, label, 4, 255)
    assert counts.tolist() == [[1, 2, 1, 0], [3, 3, 2, 0], [2, 2, 2, 0]]
    assert ratios(counts) == [1 / 3, 2 / 3, 1 / 2, None]


def test_each_class_of_an_image_counts_once_by_its_area() -> None:
    # Two images of 1000 pixels: areas 0.4 % and 99.6 %, then 0.4 % and 99.6 %.
    small = [[[1, 900], [4, 1000], [4, 996]], [[3, 996], [4, 996], [4, 996]]]
    found = by_area(np.array(small))
    assert list(found) == ["0.0% to 0.5%", "0.5% to 2.0%", "2.0% to 8.0%", "8.0% to 100.0%"]
    assert list(found.values()) == [(1 / 4 + 3 / 4) / 2, None, None, (0.9 + 1) / 2]
    assert AREAS[-1] == 1.0


@pytest.mark.parametrize(
    ("true", "expected"),
    [
        ([True, False, True, False], (1 + 2 / 3) / 2),
        ([False, False, True, True], (1 / 3 + 2 / 4) / 2),
        ([True, True, True, True], None),
        ([False, False, False, False], None),
    ],
)
def test_average_precision(true: list[bool], expected: float | None) -> None:
    found = average_precision(np.array([0.9, 0.8, 0.3, 0.1]), np.array(true))
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("name", ["encnet", "fcn"])
def test_details_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, 2, backbone="demo", head_channels=8).eval()
    file = tmp_path / "model.safetensors"
    palette = [[0, 0, 0], [9, 9, 9]]
    info = ModelInfo(model.options, ["a", "b"], palette, [0.5] * 3, [0.2] * 3, [16, 16])
    save_model(file, model, info)

    class Data:
        classes, ignore_index = ("a", "b"), 255

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> SimpleNamespace:
            label = np.full((16, 16), index, np.uint8)
            return SimpleNamespace(image=Image.new("RGB", (16, 16), (90 * index,) * 3), label=label)

    found = details(file, Data())
    assert found["class"].keys() == {"a", "b"} and found["area"]["8.0% to 100.0%"] is not None
    assert found["presence"].keys() == ({"a", "b"} if name == "encnet" else set())
    tables = detail_tables({name: {0: found, 1: found}})
    assert [len(table.columns) for table in tables] == [2, 2, 1 + (name == "encnet")]
    everywhere = found | {"presence": dict.fromkeys(found["presence"])}
    caption = detail_tables({name: {0: everywhere}})[2].caption
    assert (caption is not None and caption.startswith("none:")) is (name == "encnet")
