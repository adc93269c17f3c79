"""Images come out as the definition says, and the mean colour as zero."""

from __future__ import annotations

import torch

from encnet_triton.data.normalisation import Normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_every_value_of_a_byte_is_normalised() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = Normalise(MEAN, STD, "cpu")(images)
    assert x.dtype == torch.float32 and x.shape == images.shape
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    wanted = (images.double() / 255 - mean) / std
    # Three roundings, of the scale, the shift and their sum, of terms that are below 5.
    assert (x - wanted).abs().max() <= 3 * torch.finfo(torch.float32).eps * 5


def test_the_mean_colour_is_zero() -> None:
    colour = torch.tensor([51, 102, 204], dtype=torch.uint8).view(1, 3, 1, 1)
    x = Normalise((0.2, 0.4, 0.8), STD, "cpu")(colour)
    assert x.abs().max() <= 3 * torch.finfo(torch.float32).eps * 5
