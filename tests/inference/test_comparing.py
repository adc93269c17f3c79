"""One picture of what several checkpoints make of the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from encnet_triton.data import create_dataset
from encnet_triton.inference import comparing


def test_columns_are_the_image_each_checkpoint_and_the_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that predicts one class only gives a column of its colour."""
    data = create_dataset("scenes", "val")
    predicted = {"a.safetensors": 1, "b.safetensors": 2}

    def predictor(model: int, info: None, device: torch.device):
        return lambda image: torch.full(image.shape[:2], model)

    monkeypatch.setattr(comparing, "load_model", lambda file, _: (predicted[file.name], None))
    monkeypatch.setattr(comparing, "Predictor", predictor)
    files = {"A": Path("a.safetensors"), "B": Path("b.safetensors")}
    picture = np.asarray(comparing.compare_checkpoints(files, data, torch.device("cpu"), rows=2))
    for row, index in enumerate((0, len(data) - 1)):
        middle, columns = 28 + row * 208 + 100, [8 + column * 208 for column in range(4)]
        found = [picture[middle, left : left + 200] for left in columns]
        assert (found[1] == data.palette[1]).all() and (found[2] == data.palette[2]).all()
        line = data[index].label[data[index].label.shape[0] // 2]
        colours = {tuple(data.palette[c]) if c < 255 else (0, 0, 0) for c in line}
        assert {tuple(map(int, c)) for c in found[3]} == {tuple(map(int, c)) for c in colours}
