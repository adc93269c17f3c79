"""Fully convolutional network: the baseline, and the auxiliary head of EncNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from encnet_triton.models.baseline import Baseline
from encnet_triton.models.layers import (
    Classifier,
    conv_bn_relu,
    create_dropout,
    init_convolutions,
)
from encnet_triton.nn.arguments import check_choice, check_count, check_flags

DropoutKind = Literal["element", "channel"]


class FCNHead(nn.Module):
    """3x3 convolutions with batch norm and ReLU, dropout, 1x1 convolution to the classes.

    Args:
        in_channels: of the features.
        channels: of the 3x3 convolutions.
        num_classes: n.
        num_convs: how many 3x3 convolutions, 1 or 2.
        concat_input: a further 3x3 convolution on the features beside the result.
        dropout: rate before the classifier.
        dropout_kind: single elements or whole channels.

    Shapes:
        x: B x in_channels x h x w; returns B x n x h x w logits.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
        dropout_kind: DropoutKind = "element",
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_choice("num_convs", num_convs, (1, 2))
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(conv_bn_relu(widths[i], widths[i + 1], 3) for i in range(num_convs))
        )
        self.concat = conv_bn_relu(in_channels + channels, channels, 3) if concat_input else None
        self.dropout = create_dropout(dropout, dropout_kind)
        self.classifier = Classifier(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        if self.concat is not None:
            y = self.concat(torch.cat([x, y], dim=1))
        logits: Tensor = self.classifier(self.dropout(y))
        return logits


def aux_head(in_channels: int, num_classes: int, dropout: float, kind: DropoutKind) -> FCNHead:
    """The auxiliary head on stage 3: an FCN head with a quarter of the channels."""
    channels = max(1, in_channels // 4)
    return FCNHead(in_channels, channels, num_classes, dropout=dropout, dropout_kind=kind)


def aux_head_of(
    aux: bool, num_classes: int, dropout: float, kind: DropoutKind
) -> Callable[[int], FCNHead] | None:
    """A function that builds the auxiliary head, for `Baseline`; None without one."""
    if not aux:
        return None
    return lambda channels: aux_head(channels, num_classes, dropout, kind)


class FCN(Baseline):
    """Dilated FCN, the paper's baseline (section 3.1).

    Args:
        backbone: name in `encnet_triton.models.BACKBONES`, or ``timm:NAME``.
        num_classes: n.
        output_stride: pixels of the input per pixel of the logits; None for the backbone's default.
        dilate: dilate the stages that lose their stride.
        head_channels: of the head's 3x3 convolutions.
        num_convs: 1 or 2 of them.
        concat_input: a further one on the backbone's features beside the result.
        aux: auxiliary head on stage 3, used in training only.
        dropout: rate before the classifiers.
        dropout_kind: "element" or "channel".
        align_corners: how logits are to be upsampled.

    Shapes:
        x: B x 3 x H x W; returns a `SegmentationOutput` without SE logits.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        output_stride: int | None = None,
        dilate: bool = True,
        head_channels: int = 512,
        num_convs: int = 1,
        concat_input: bool = False,
        aux: bool = False,
        dropout: float = 0.1,
        dropout_kind: DropoutKind = "element",
        align_corners: bool = True,
    ) -> None:
        check_count("head_channels", head_channels)
        check_flags(concat_input=concat_input, aux=aux)
        super().__init__(
            {
                "name": "fcn",
                "head_channels": head_channels,
                "num_convs": num_convs,
                "concat_input": concat_input,
                "dropout": dropout,
                "dropout_kind": dropout_kind,
            },
            make_head=lambda channels: FCNHead(
                channels,
                head_channels,
                num_classes,
                num_convs=num_convs,
                concat_input=concat_input,
                dropout=dropout,
                dropout_kind=dropout_kind,
            ),
            make_aux=aux_head_of(aux, num_classes, dropout, dropout_kind),
            backbone=backbone,
            num_classes=num_classes,
            output_stride=output_stride,
            dilate=dilate,
            align_corners=align_corners,
        )
