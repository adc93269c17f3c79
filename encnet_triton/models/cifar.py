"""CIFAR-10 networks of depth 14: ResNet, SE-ResNet and EncNet (paper, section 3.5, table 6).

A 3x3 convolution, three stages of two basic blocks each with w, 2w and 4w channels, global average,
linear layer. In SE-ResNet and EncNet every block weights the channels of its residual by a vector
computed from the whole residual; the identity is unchanged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.models.layers import check_images, conv3x3, parameters_of
from encnet_triton.models.pretrained import Pretrained
from encnet_triton.nn.arguments import check_choice, check_count, check_flags
from encnet_triton.nn.encoding import Encoding, ShakeEncoding
from encnet_triton.nn.norm import BatchNormAct2d

Unit = Literal["none", "se", "encoding"]
Order = Literal["pre", "post"]

SE_REDUCTION = 16
ENCODING_REDUCTION = 4
BLOCKS_PER_STAGE = 2


class SqueezeExcitation(nn.Module):
    """Channel weights from the mean over the image: two linear layers, C / 16 between them.

    Shapes:
        x: B x C x H x W; returns x with its channels weighted.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // SE_REDUCTION)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class EncodingAttention(nn.Module):
    """Channel weights from the encoded semantics of the image.

    1x1 convolution to C / 4 + batch norm + ReLU -> Encoding -> the K codewords' vectors side by
    side, K C / 4 -> L2 normalisation -> linear layer to C -> sigmoid.

    Args:
        channels: C.
        num_codewords: K.
        shake_scale: random smoothing factors in training, see `ShakeEncoding`.

    Shapes:
        x: B x C x H x W; returns x with its channels weighted.
    """

    def __init__(self, channels: int, num_codewords: int, shake_scale: bool) -> None:
        super().__init__()
        reduced = max(1, channels // ENCODING_REDUCTION)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.bn = BatchNormAct2d(reduced)
        layer = ShakeEncoding if shake_scale else Encoding
        self.encoding = layer(reduced, num_codewords)
        self.attention = nn.Linear(num_codewords * reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        e = self.encoding(self.bn(self.reduce(x))).flatten(1)
        gate: Tensor = self.attention(F.normalize(e).to(self.attention.weight.dtype)).sigmoid()
        return x * gate[:, :, None, None]


class CifarBlock(nn.Module):
    """Two 3x3 convolutions, the unit on their output, and the identity.

    Args:
        in_channels, channels, stride: of the first convolution; where they change the shape, a 1x1
            convolution with bias does so to the identity.
        order: "pre": BN-ReLU-conv twice (the paper); "post": conv-BN-ReLU, conv-BN, and a ReLU
            after the addition (the published EncNet).
        unit: on the residual before the addition, or None.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        order: Order,
        unit: nn.Module | None,
    ) -> None:
        super().__init__()
        self.pre = order == "pre"
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.conv2 = conv3x3(channels, channels)
        self.bn1 = BatchNormAct2d(in_channels if self.pre else channels)
        self.bn2 = BatchNormAct2d(channels, activation="relu" if self.pre else None)
        self.unit = unit
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        if self.pre:
            y = self.conv2(self.bn2(self.conv1(self.bn1(x))))
        else:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        if self.unit is not None:
            y = self.unit(y)
        return identity + y if self.pre else F.relu(identity + y)


class CifarNet(Pretrained):
    """ResNet-14, SE-ResNet-14 or EncNet-14.

    Args:
        unit: "none" (ResNet), "se" (SE-ResNet) or "encoding" (EncNet).
        num_classes: n.
        width: channels of stage 1, the "d" of the paper's names.
        num_codewords: K of an EncNet, the "k" of the paper's names.
        block: "pre" or "post" activation, see `CifarBlock`.
        shake_scale: scale regularisation of an EncNet (paper, section 3.5); its smoothing factors
            are then no parameters, 6 K fewer.

    Attributes:
        options: all arguments, as JSON values.

    Shapes:
        x: B x 3 x H x W normalised images, 32 x 32 in the paper; returns B x n logits.
    """

    def __init__(
        self,
        unit: Unit = "encoding",
        num_classes: int = 10,
        *,
        width: int = 64,
        num_codewords: int = 16,
        block: Order = "pre",
        shake_scale: bool = True,
    ) -> None:
        super().__init__()
        check_choice("unit", unit, ("none", "se", "encoding"))
        check_choice("block", block, ("pre", "post"))
        check_count("num_classes", num_classes)
        check_count("width", width)
        check_count("num_codewords", num_codewords)
        check_flags(shake_scale=shake_scale)
        self.options: dict[str, Any] = {
            "unit": unit,
            "num_classes": num_classes,
            "width": width,
            "num_codewords": num_codewords,
            "block": block,
            "shake_scale": shake_scale,
        }

        def make_unit(channels: int) -> nn.Module | None:
            if unit == "none":
                return None
            if unit == "se":
                return SqueezeExcitation(channels)
            return EncodingAttention(channels, num_codewords, shake_scale)

        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = BatchNormAct2d(width)
        blocks: list[nn.Module] = []
        in_channels = width
        for stage in range(3):
            channels = width * 2**stage
            for index in range(BLOCKS_PER_STAGE):
                stride = 2 if stage and not index else 1
                blocks.append(CifarBlock(in_channels, channels, stride, block, make_unit(channels)))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.last_bn = BatchNormAct2d(in_channels)
        self.classifier = nn.Linear(in_channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """MSRA initialisation of the convolutions (paper, section 3.5)."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, as the group that the trainer gives its base rate."""
        return {"backbone": parameters_of(self)}

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, 4)
        y = self.last_bn(self.blocks(self.bn(self.conv(x))))
        logits: Tensor = self.classifier(y.mean((2, 3)))
        return logits
