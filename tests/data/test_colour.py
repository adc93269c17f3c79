"""Random colours, against the four changes one after the other in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from encnet_triton.data.colour import ColourJitter

GREY = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def images(low: int = 60, high: int = 190) -> Tensor:
    """Far enough from 0 and 255 that small changes are not cut off."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (3, 3, 9, 7), dtype=torch.uint8, generator=generator)


def grey_of(x: Tensor) -> Tensor:
    return torch.einsum("c,bchw->bhw", GREY, x)[:, None]


def test_brightness_contrast_and_saturation_follow_each_other() -> None:
    draws = torch.tensor([[0.0, 1.0, 0.25, 0.5], [0.8, 0.1, 1.0, 0.5], [0.5, 0.5, 0.5, 0.5]])
    x = images().double()
    factors = 1 + (2 * draws[:, :3].double() - 1) * torch.tensor([0.2, 0.3, 0.4])
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    x = brightness * x
    mean = grey_of(x).mean((1, 2, 3), keepdim=True)
    x = contrast * x + (1 - contrast) * mean
    x = saturation * x + (1 - saturation) * grey_of(x)
    found = ColourJitter((0.2, 0.3, 0.4), 0.0, "cpu")(images(), draws)
    # The constants of YIQ have four digits, and an image 256 levels.
    torch.testing.assert_close(found.double(), x.clamp(0, 255), rtol=0, atol=2e-3)


def test_a_turn_keeps_grey_and_half_a_turn_mirrors_the_colour() -> None:
    draws = torch.full((3, 4), 0.5)
    draws[:, 3] = 1.0  # the largest turn
    x = images(100, 140).double()
    found = ColourJitter((0, 0, 0), 0.5, "cpu")(images(100, 140), draws).double()
    # Y of YIQ is kept and its I and Q change sign: 2 grey - x.
    torch.testing.assert_close(found, 2 * grey_of(x) - x, rtol=0, atol=2e-2)
    third = ColourJitter((0, 0, 0), 1 / 3, "cpu")
    colours = images(110, 130)
    for _ in range(3):  # three thirds are a whole turn, but for rounding to whole levels
        colours = third(colours, draws).round().to(torch.uint8)
    torch.testing.assert_close(colours.double(), images(110, 130).double(), rtol=0, atol=3)


@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0])
def test_grey_images_have_no_colour_to_change(draw: float) -> None:
    grey = images(0, 256)[:, :1].expand(-1, 3, -1, -1)
    found = ColourJitter((0, 0, 1.0), 0.5, "cpu")(grey, torch.full((3, 4), draw))
    torch.testing.assert_close(found, grey.float(), rtol=0, atol=2e-3)


def test_nothing_is_drawn_where_nothing_is_asked() -> None:
    assert not ColourJitter((0, 0, 0), 0.0, "cpu")
    half = torch.full((3, 4), 0.5)
    found = ColourJitter((0.4, 0.4, 0.4), 0.1, "cpu")(images(0, 256), half)
    torch.testing.assert_close(found, images(0, 256).float(), rtol=0, atol=2e-3)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amounts", [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)])
def test_values_stay_within_those_of_an_image(amounts: tuple[float, float, float]) -> None:
    for draw in (0.0, 1.0):
        found = ColourJitter(amounts, 0.3, "cpu")(images(0, 256), torch.full((3, 4), draw))
        assert found.min() >= 0 and found.max() <= 255
