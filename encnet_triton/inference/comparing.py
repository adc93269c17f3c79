"""One picture of the predictions of several checkpoints for the same images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from encnet_triton.data.base import Dataset
from encnet_triton.inference.predictor import Predictor
from encnet_triton.pictures import comparison
from encnet_triton.weights.checkpoint import load_model

__all__ = ["compare_checkpoints"]


def compare_checkpoints(
    checkpoints: Mapping[str, Path],
    data: Dataset,
    device: torch.device,
    rows: int = 4,
) -> Image.Image:
    """Columns image, each checkpoint's prediction, label, for images spread over the data set.

    Args:
        checkpoints: heading and file of each column.
        data: images with labels, and the names and colours of their classes.
        rows: how many images, where the data set has as many.
    """
    indices = np.linspace(0, len(data) - 1, min(rows, len(data))).round().astype(int).tolist()
    samples = [data[index] for index in indices]
    columns = []
    for file in checkpoints.values():
        model, info = load_model(file, device)
        predictor = Predictor(model, info, device=device)
        columns.append([predictor(np.asarray(s.image)).cpu().numpy() for s in samples])
    pictures = [
        (np.asarray(s.image), *predictions, s.label)
        for s, *predictions in zip(samples, *columns, strict=True)
    ]
    return comparison(pictures, ("image", *checkpoints, "label"), data.classes, data.palette)
