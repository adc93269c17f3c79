"""Backbones by name."""

from __future__ import annotations

from dataclasses import replace

from encnet_triton.models.resnet import BACKBONES, ResNet
from encnet_triton.models.trunk import PREFIX, Statistics, TimmTrunk, own_statistics


def create_backbone(
    name: str, output_stride: int | None = None, dilate: bool = True
) -> ResNet | TimmTrunk:
    """Build a backbone with random weights.

    Args:
        name: key of `BACKBONES`, or ``timm:NAME`` for a network of timm (the extra ``timm``).
        output_stride: 4, 8, 16 or 32, as far as the backbone allows; None for its own default,
            8 for timm's.
        dilate: see `ResNet`; networks of timm are always dilated.

    Raises:
        ValueError: unknown name, or an output stride the backbone cannot have.
    """
    if isinstance(name, str) and name.startswith(PREFIX):
        if not dilate:
            raise ValueError(f"dilate=False is for {', '.join(BACKBONES)}; {name} is dilated")
        return TimmTrunk(name.removeprefix(PREFIX), 8 if output_stride is None else output_stride)
    if name not in tuple(BACKBONES):
        names = ", ".join(map(repr, BACKBONES))
        raise ValueError(f"backbone is {name!r}, but must be one of {names}, or {PREFIX}NAME")
    config = BACKBONES[name]
    if output_stride is not None:
        config = replace(config, output_stride=output_stride)
    return ResNet(config, dilate)


def statistics_of(backbone: str) -> Statistics | None:
    """Mean and standard deviation that a backbone's images are normalised by; None: any."""
    if backbone.startswith(PREFIX):
        return own_statistics(backbone.removeprefix(PREFIX))
    return None
