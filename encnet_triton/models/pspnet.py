"""PSPNet: pyramid pooling on the trunk of EncNet (Zhao et al., CVPR 2017), as a baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.models.baseline import Baseline
from encnet_triton.models.fcn import DropoutKind, aux_head_of
from encnet_triton.models.layers import (
    Classifier,
    conv_bn_relu,
    create_dropout,
    init_convolutions,
)
from encnet_triton.nn.arguments import check_count, check_flags

BINS = (1, 2, 3, 6)


class PyramidPoolingHead(nn.Module):
    """Averages over grids of 1, 4, 9 and 36 regions beside the features, 3x3 convolution, classes.

    Args:
        in_channels: C of the features; each grid is reduced to C / 4 channels.
        channels: of the 3x3 convolution.
        num_classes: n.
        dropout: layer before the classifier.
        align_corners: of the resizing of the grids.

    Shapes:
        x: B x C x h x w; returns B x n x h x w logits.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        dropout: nn.Module,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        width = in_channels // len(BINS)
        self.pools = nn.ModuleList(conv_bn_relu(in_channels, width, 1) for _ in BINS)
        self.bottleneck = conv_bn_relu(in_channels + len(BINS) * width, channels, 3)
        self.dropout = dropout
        self.classifier = Classifier(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for bins, reduce in zip(BINS, self.pools, strict=True):
            pooled = reduce(F.adaptive_avg_pool2d(x, bins))
            parts.append(
                F.interpolate(
                    pooled, x.shape[2:], mode="bilinear", align_corners=self.align_corners
                )
            )
        y = self.bottleneck(torch.cat(parts, dim=1))
        logits: Tensor = self.classifier(self.dropout(y))
        return logits


class PSPNet(Baseline):
    """Pyramid Scene Parsing Network on a dilated ResNet.

    Args:
        backbone: name in `encnet_triton.models.BACKBONES`, or ``timm:NAME``.
        num_classes: n.
        output_stride: pixels of the input per pixel of the logits; None for the backbone's default.
        dilate: dilate the stages that lose their stride.
        head_channels: of the 3x3 convolution after pooling.
        aux: auxiliary FCN head on stage 3, used in training only.
        dropout: rate before the classifiers.
        dropout_kind: "element" or "channel".
        align_corners: how logits and pooled grids are upsampled.

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
        aux: bool = True,
        dropout: float = 0.1,
        dropout_kind: DropoutKind = "element",
        align_corners: bool = True,
    ) -> None:
        check_count("head_channels", head_channels)
        check_flags(aux=aux)
        super().__init__(
            {
                "name": "psp",
                "head_channels": head_channels,
                "dropout": dropout,
                "dropout_kind": dropout_kind,
            },
            make_head=lambda channels: PyramidPoolingHead(
                channels,
                head_channels,
                num_classes,
                dropout=create_dropout(dropout, dropout_kind),
                align_corners=align_corners,
            ),
            make_aux=aux_head_of(aux, num_classes, dropout, dropout_kind),
            backbone=backbone,
            num_classes=num_classes,
            output_stride=output_stride,
            dilate=dilate,
            align_corners=align_corners,
        )
