"""Scores that no network was asked for."""

from __future__ import annotations

import torch

from encnet_triton.scoring.metrics import Scores


def scores_of(miou: float) -> Scores:
    """Of three classes that are absent and three images without labels."""
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    return Scores(0.5, miou, (None, None, None), (0, 1, 2), 0, nothing, torch.full((3,), torch.nan))
