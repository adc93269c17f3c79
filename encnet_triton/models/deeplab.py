"""DeepLabV3: atrous spatial pyramid pooling on the trunk of EncNet (Chen et al., 2017)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from encnet_triton.models.baseline import Baseline
from encnet_triton.models.fcn import DropoutKind, aux_head_of
from encnet_triton.models.layers import (
    Classifier,
    conv3x3,
    conv_bn_relu,
    create_dropout,
    init_convolutions,
)
from encnet_triton.nn.arguments import check_count, check_flags
from encnet_triton.nn.norm import BatchNormAct2d

# For output stride 8, where the paper doubles its rates of stride 16.
RATES = (12, 24, 36)
_PYRAMID_DROPOUT = 0.5


def _atrous(in_channels: int, channels: int, rate: int) -> nn.Sequential:
    conv = conv3x3(in_channels, channels, dilation=rate)
    return nn.Sequential(OrderedDict(conv=conv, bn=BatchNormAct2d(channels)))


class AtrousPyramidHead(nn.Module):
    """A 1x1, atrous 3x3 convolutions and the image's mean side by side, then classes.

    Args:
        in_channels: of the features.
        channels: of every convolution.
        num_classes: n.
        rates: dilations of the atrous convolutions.
        project: a 1x1 convolution joins the pyramid before the last 3x3 convolution, which
            otherwise takes all of it.
        dropout: layer before the classifier.

    Shapes:
        x: B x in_channels x h x w; returns B x n x h x w logits.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        rates: Sequence[int],
        project: bool,
        dropout: nn.Module,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, channels, 1)])
        self.branches.extend(_atrous(in_channels, channels, rate) for rate in rates)
        self.image_pool = conv_bn_relu(in_channels, channels, 1)
        joined = (len(rates) + 2) * channels
        self.project: nn.Sequential | None = None
        if project:
            self.project = conv_bn_relu(joined, channels, 1)
            self.project_dropout = nn.Dropout(_PYRAMID_DROPOUT)
        self.bottleneck = conv_bn_relu(channels if project else joined, channels, 3)
        self.dropout = dropout
        self.classifier = Classifier(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        pooled = self.image_pool(x.mean((2, 3), keepdim=True))
        parts.append(pooled.expand(-1, -1, *x.shape[2:]))
        y = torch.cat(parts, dim=1)
        if self.project is not None:
            y = self.project_dropout(self.project(y))
        logits: Tensor = self.classifier(self.dropout(self.bottleneck(y)))
        return logits


class DeepLabV3(Baseline):
    """DeepLabV3 on a dilated ResNet.

    Args:
        backbone: name in `encnet_triton.models.BACKBONES`, or ``timm:NAME``.
        num_classes: n.
        output_stride: pixels of the input per pixel of the logits; None for the backbone's default.
        dilate: dilate the stages that lose their stride.
        head_channels: of the pyramid's convolutions.
        rates: dilations of its atrous convolutions; the default is for output stride 8.
        project: join it by a 1x1 convolution before the last one; mmsegmentation does not.
        aux: auxiliary FCN head on stage 3, used in training only.
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
        head_channels: int = 256,
        rates: Sequence[int] = RATES,
        project: bool = True,
        aux: bool = True,
        dropout: float = 0.1,
        dropout_kind: DropoutKind = "element",
        align_corners: bool = True,
    ) -> None:
        check_count("head_channels", head_channels)
        check_flags(aux=aux, project=project)
        for rate in rates:
            check_count("rates", rate)
        super().__init__(
            {
                "name": "deeplab",
                "head_channels": head_channels,
                "rates": list(rates),
                "project": project,
                "dropout": dropout,
                "dropout_kind": dropout_kind,
            },
            make_head=lambda channels: AtrousPyramidHead(
                channels,
                head_channels,
                num_classes,
                rates=rates,
                project=project,
                dropout=create_dropout(dropout, dropout_kind),
            ),
            make_aux=aux_head_of(aux, num_classes, dropout, dropout_kind),
            backbone=backbone,
            num_classes=num_classes,
            output_stride=output_stride,
            dilate=dilate,
            align_corners=align_corners,
        )
