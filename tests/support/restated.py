"""The networks of PyTorch-Encoding and mmsegmentation, restated with plain layers and their names.

Only what a conversion has to get right: which layers there are, what they are called, and what the
network computes in evaluation. Logits come upsampled to the input's size, as theirs do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(cin, cout, kernel, stride, padding, dilation, bias=False)


class Bottleneck(nn.Module):
    def __init__(self, cin: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if cin != 4 * width or stride > 1:
            self.downsample = nn.Sequential(
                conv(cin, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class Trunk(nn.Module):
    """ResNet-50 of stride 8. ``stem`` is "plain", "deep" (in conv1, bn1) or "stem" (one list)."""

    def __init__(self, stem: str, widths: tuple[int, int, int] = (64, 64, 128)) -> None:
        super().__init__()
        a, b, c = widths
        if stem == "plain":
            c = 64
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        else:
            layers = [
                conv(3, a, 3, 2), nn.BatchNorm2d(a), nn.ReLU(),
                conv(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(), conv(b, c, 3),
            ]  # fmt: skip
            if stem == "deep":
                self.conv1, self.bn1 = nn.Sequential(*layers), nn.BatchNorm2d(c)
            else:
                self.stem = nn.Sequential(*layers, nn.BatchNorm2d(c), nn.ReLU())
        plan = ((64, 3, 1, 1, 1), (128, 4, 2, 1, 1), (256, 6, 1, 1, 2), (512, 3, 1, 2, 4))
        for number, (width, depth, stride, first, dilation) in enumerate(plan, start=1):
            blocks = [Bottleneck(c, width, stride, first)]
            c = 4 * width
            blocks += [Bottleneck(c, width, 1, dilation) for _ in range(depth - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x) if hasattr(self, "stem") else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        c2 = self.layer2(self.layer1(x))
        c3 = self.layer3(c2)
        return c2, c3, self.layer4(c3)


class Codebook(nn.Module):
    """sum_i softmax_k(s_k |x_i - d_k|^2) (x_i - d_k), everything materialised."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.codewords = nn.Parameter(torch.empty(count, channels).uniform_(-0.1, 0.1))
        self.scale = nn.Parameter(torch.empty(count).uniform_(-0.1, 0))

    def forward(self, x: Tensor) -> Tensor:
        residual = x.flatten(2).transpose(1, 2)[:, :, None] - self.codewords
        weight = (self.scale * residual.square().sum(3)).softmax(2)
        return (weight[..., None] * residual).sum(1)


class MeanOverCodewords(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def conv_bn_relu(cin: int, cout: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, kernel), nn.BatchNorm2d(cout), nn.ReLU())


def upsampled(logits: Tensor, x: Tensor, corners: bool) -> Tensor:
    return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=corners)


class PyTorchEncodingEncNet(nn.Module):
    def __init__(self, classes: int, stem: str, lateral: bool) -> None:
        super().__init__()
        self.pretrained = Trunk(stem)
        head = nn.Module()
        head.conv5 = conv_bn_relu(2048, 512, 3)
        if lateral:
            head.connect = nn.ModuleList([conv_bn_relu(512, 512, 1), conv_bn_relu(1024, 512, 1)])
            head.fusion = conv_bn_relu(1536, 512, 3)
        head.encmodule = nn.Module()
        head.encmodule.encoding = nn.Sequential(
            conv(512, 512, 1), nn.BatchNorm2d(512), nn.ReLU(), Codebook(512, 32),
            nn.BatchNorm1d(32), nn.ReLU(), MeanOverCodewords(),
        )  # fmt: skip
        head.encmodule.fc = nn.Sequential(nn.Linear(512, 512), nn.Sigmoid())
        head.encmodule.selayer = nn.Linear(512, classes)
        head.conv6 = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(512, classes, 1))
        self.head = head
        self.auxlayer = nn.Module()
        self.auxlayer.conv5 = nn.Sequential(
            *conv_bn_relu(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, classes, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c2, c3, c4 = self.pretrained(x)
        head = self.head
        y = head.conv5(c4)
        if hasattr(head, "connect"):
            y = head.fusion(torch.cat([y, head.connect[0](c2), head.connect[1](c3)], 1))
        e = head.encmodule.encoding(y)
        gate = head.encmodule.fc(e)[:, :, None, None]
        logits = head.conv6(F.relu(y + y * gate))
        return upsampled(logits, x, True), head.encmodule.selayer(e)


class PyTorchEncodingFCN(nn.Module):
    def __init__(self, classes: int, stem: str, aux: bool) -> None:
        super().__init__()
        self.pretrained = Trunk(stem)
        self.head = nn.Module()
        self.head.conv5 = nn.Sequential(
            *conv_bn_relu(2048, 512, 3), nn.Dropout(0.1), nn.Conv2d(512, classes, 1)
        )
        if aux:
            self.auxlayer = nn.Module()
            self.auxlayer.conv5 = nn.Sequential(
                *conv_bn_relu(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, classes, 1)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return upsampled(self.head.conv5(self.pretrained(x)[2]), x, True), None


class ConvModule(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(cin, cout, kernel), nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mmseg_aux(classes: int) -> nn.Module:
    aux = nn.Module()
    aux.convs = nn.Sequential(ConvModule(1024, 256, 3))
    aux.conv_seg = nn.Conv2d(256, classes, 1)
    return aux


class MMSegEncNet(nn.Module):
    def __init__(self, classes: int, stem: str) -> None:
        super().__init__()
        widths = (32, 32, 64) if stem == "v1c" else (64, 64, 128)
        self.backbone = Trunk("plain" if stem == "plain" else "stem", widths)
        head = nn.Module()
        head.conv_seg = nn.Conv2d(512, classes, 1)
        head.bottleneck = ConvModule(2048, 512, 3)
        head.enc_module = nn.Module()
        head.enc_module.encoding_project = ConvModule(512, 512, 1)
        head.enc_module.encoding = nn.Sequential(Codebook(512, 32), nn.BatchNorm1d(32), nn.ReLU())
        head.enc_module.fc = nn.Sequential(nn.Linear(512, 512), nn.Sigmoid())
        head.se_layer = nn.Linear(512, classes)
        self.decode_head = head
        self.auxiliary_head = mmseg_aux(classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head = self.decode_head
        y = head.bottleneck(self.backbone(x)[2])
        e = head.enc_module.encoding(head.enc_module.encoding_project(y)).mean(1)
        gate = head.enc_module.fc(e)[:, :, None, None]
        logits = head.conv_seg(F.relu(y + y * gate))
        return upsampled(logits, x, False), head.se_layer(e)


class MMSegFCN(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Trunk("stem", (32, 32, 64))
        head = nn.Module()
        head.conv_seg = nn.Conv2d(512, classes, 1)
        head.convs = nn.Sequential(ConvModule(2048, 512, 3), ConvModule(512, 512, 3))
        head.conv_cat = ConvModule(2048 + 512, 512, 3)
        self.decode_head = head
        self.auxiliary_head = mmseg_aux(classes)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        head = self.decode_head
        c4 = self.backbone(x)[2]
        y = head.conv_cat(torch.cat([c4, head.convs(c4)], 1))
        return upsampled(head.conv_seg(y), x, False), None


def settled(model: nn.Module) -> nn.Module:
    """Batch norms as training would leave them: statistics and parameters that are not 0 and 1."""
    generator = torch.Generator().manual_seed(11)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.0), (layer.bias, -0.2, 0.2),
                (layer.running_mean, -0.1, 0.1), (layer.running_var, 0.5, 1.5),
            ):  # fmt: skip
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


# Small networks: a quarter of the channels of a ResNet-18, and heads on the last of them.
WIDTH = 16
LAST, PART = 8 * WIDTH, 2 * WIDTH
# Strides and dilations of the stages by output stride.
LAYOUTS = {8: ((1, 2, 1, 1), (1, 1, 2, 4)), 16: ((1, 2, 2, 1), (1, 1, 1, 2))}


class Basic(nn.Module):
    """``second``: the dilation of the second convolution, which mmsegmentation leaves at 1."""

    def __init__(self, cin: int, width: int, stride: int, first: int, second: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, width, 3, stride, first), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, second), nn.BatchNorm2d(width)
        self.downsample = None
        if cin != width or stride > 1:
            self.downsample = nn.Sequential(conv(cin, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class Trunk18(nn.Module):
    """ResNet-18, of mmsegmentation where ``openmmlab``, with the stem "plain" or "stem".

    Its stages have WIDTH channels and more, where the published one begins with 64.
    """

    def __init__(self, openmmlab: bool, stem: str = "plain", stride: int = 8) -> None:
        super().__init__()
        if stem == "plain":
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        else:
            self.stem = nn.Sequential(
                conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(),
                conv(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
                conv(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
            )  # fmt: skip
        strides, dilations = LAYOUTS[stride]
        cin = 64
        for i, (step, dilation) in enumerate(zip(strides, dilations, strict=True)):
            width, second = WIDTH * 2**i, 1 if openmmlab else dilation
            first = Basic(cin, width, step, max(1, dilation // 2), second)
            blocks = nn.Sequential(first, Basic(width, width, 1, dilation, second))
            setattr(self, f"layer{i + 1}", blocks)
            cin = width

    forward = Trunk.forward


def grids(x: Tensor, pools: list[nn.Module], corners: bool) -> Tensor:
    """The features and their averages over 1, 4, 9 and 36 regions, side by side."""
    parts = [pool(F.adaptive_avg_pool2d(x, n)) for n, pool in zip((1, 2, 3, 6), pools, strict=True)]
    return torch.cat([x, *(upsampled(part, x, corners) for part in parts)], 1)


class PyTorchEncodingPSP(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pretrained = Trunk18(openmmlab=False)
        pools = nn.Module()
        for i in range(4):
            setattr(pools, f"conv{i + 1}", conv_bn_relu(LAST, PART, 1))
        last = nn.Conv2d(PART, classes, 1)
        self.head = nn.Module()
        self.head.conv5 = nn.Sequential(
            pools, *conv_bn_relu(2 * LAST, PART, 3), nn.Dropout(0.1), last
        )

    def forward(self, x: Tensor) -> Tensor:
        pools, *rest = self.head.conv5
        c4 = self.pretrained(x)[2]
        y = grids(c4, [getattr(pools, f"conv{i + 1}") for i in range(4)], True)
        return upsampled(nn.Sequential(*rest)(y), x, True)


class PyTorchEncodingDeepLab(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pretrained = Trunk18(openmmlab=False)
        aspp = nn.Module()
        aspp.b0 = conv_bn_relu(LAST, PART, 1)
        for i, rate in enumerate((12, 24, 36), start=1):
            part = nn.Sequential(conv(LAST, PART, 3, 1, rate), nn.BatchNorm2d(PART), nn.ReLU())
            setattr(aspp, f"b{i}", part)
        aspp.b4 = nn.Module()
        aspp.b4.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(LAST, PART, 1))
        aspp.project = conv_bn_relu(5 * PART, PART, 1)
        self.head = nn.Module()
        self.head.aspp = aspp
        self.head.block = nn.Sequential(
            *conv_bn_relu(PART, PART, 3), nn.Dropout(0.1), nn.Conv2d(PART, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        c4, aspp = self.pretrained(x)[2], self.head.aspp
        parts = [aspp.b0(c4), aspp.b1(c4), aspp.b2(c4), aspp.b3(c4)]
        parts.append(aspp.b4.gap(c4).expand_as(parts[0]))
        return upsampled(self.head.block(aspp.project(torch.cat(parts, 1))), x, True)


class TorchvisionDeepLab(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Trunk18(openmmlab=False)
        aspp = nn.Module()
        atrous = [
            nn.Sequential(conv(LAST, PART, 3, 1, rate), nn.BatchNorm2d(PART), nn.ReLU())
            for rate in (12, 24, 36)
        ]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(LAST, PART, 1))
        aspp.convs = nn.ModuleList([conv_bn_relu(LAST, PART, 1), *atrous, pool])
        aspp.project = conv_bn_relu(5 * PART, PART, 1)
        self.classifier = nn.Sequential(
            aspp, *conv_bn_relu(PART, PART, 3), nn.Conv2d(PART, classes, 1)
        )
        self.aux_classifier = nn.Sequential(
            *conv_bn_relu(LAST // 2, LAST // 8, 3),
            nn.Dropout(0.1),
            nn.Conv2d(LAST // 8, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        c4 = self.backbone(x)[2]
        aspp, *rest = self.classifier
        parts = [part(c4) for part in aspp.convs]
        parts[4] = parts[4].expand_as(parts[0])
        return upsampled(nn.Sequential(*rest)(aspp.project(torch.cat(parts, 1))), x, False)


class TorchvisionFCN(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Trunk18(openmmlab=False)
        self.classifier = nn.Sequential(
            *conv_bn_relu(LAST, PART, 3), nn.Dropout(0.1), nn.Conv2d(PART, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return upsampled(self.classifier(self.backbone(x)[2]), x, False)


class MMSegPSP(nn.Module):
    def __init__(self, classes: int, stride: int = 8, corners: bool = False) -> None:
        super().__init__()
        self.corners = corners
        self.backbone = Trunk18(openmmlab=True, stem="stem", stride=stride)
        head = nn.Module()
        head.psp_modules = nn.ModuleList(
            nn.Sequential(nn.Identity(), ConvModule(LAST, PART, 1)) for _ in range(4)
        )
        head.bottleneck = ConvModule(2 * LAST, PART, 3)
        head.conv_seg = nn.Conv2d(PART, classes, 1)
        self.decode_head = head

    def forward(self, x: Tensor) -> Tensor:
        head = self.decode_head
        y = grids(self.backbone(x)[2], list(head.psp_modules), self.corners)
        return upsampled(head.conv_seg(head.bottleneck(y)), x, self.corners)


class MMSegDeepLab(nn.Module):
    def __init__(self, classes: int, stride: int = 8, corners: bool = False) -> None:
        super().__init__()
        self.corners = corners
        self.backbone = Trunk18(openmmlab=True, stride=stride)
        head = nn.Module()
        rates = (1, 12, 24, 36) if stride == 8 else (1, 6, 12, 18)
        head.aspp_modules = nn.ModuleList(ConvModule(LAST, PART, 1 if r == 1 else 3) for r in rates)
        for part, rate in zip(head.aspp_modules, rates, strict=True):
            part.conv.dilation = (rate, rate)
            part.conv.padding = (0, 0) if rate == 1 else (rate, rate)
        head.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(LAST, PART, 1))
        head.bottleneck = ConvModule(5 * PART, PART, 3)
        head.conv_seg = nn.Conv2d(PART, classes, 1)
        self.decode_head = head

    def forward(self, x: Tensor) -> Tensor:
        c4, head = self.backbone(x)[2], self.decode_head
        parts = [part(c4) for part in head.aspp_modules]
        y = torch.cat([head.image_pool(c4).expand_as(parts[0]), *parts], 1)
        return upsampled(head.conv_seg(head.bottleneck(y)), x, self.corners)
