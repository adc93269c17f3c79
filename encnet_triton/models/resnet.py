"""Dilated residual networks with torchvision's parameter names (paper, section 2.1 and figure 3).

A stage whose stride is taken away to reach the output stride is dilated instead. Its first strided
3x3 convolution still sees the finer grid and so has half the stage's dilation: the dilated network
computes at every pixel what the strided one computes at its coarser grid.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from encnet_triton.models.layers import check_images, conv3x3, init_convolutions, parameters_of
from encnet_triton.nn.arguments import check_choice
from encnet_triton.nn.norm import BatchNormAct2d, hooked
from encnet_triton.nn.recompute import Paths, recomputed


@dataclass(frozen=True)
class BlockPlan:
    """The place of a residual block in its network.

    Attributes:
        in_channels: of its input.
        width: channels of its 3x3 convolutions; the output has ``expansion`` times as many.
        stride: of its first 3x3 convolution.
        first_dilation: of the first 3x3 convolution.
        dilation: of any later one.
        project: a 1x1 convolution in the shortcut. Whether there is one does not depend on the
            output stride, so that weights fit at any.
        average: the shortcut's stride is that of an average pooling before its convolution.
        dilate_second: the second 3x3 convolution of a `BasicBlock` is dilated.
    """

    in_channels: int
    width: int
    stride: int
    first_dilation: int
    dilation: int
    project: bool
    average: bool = False
    dilate_second: bool = True


def _shortcut(plan: BlockPlan, out_channels: int) -> nn.Sequential | None:
    if not plan.project:
        return None
    if plan.average:
        pool = nn.AvgPool2d(plan.stride, plan.stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(
            pool if plan.stride > 1 else nn.Identity(),
            nn.Conv2d(plan.in_channels, out_channels, 1, bias=False),
            BatchNormAct2d(out_channels, activation=None),
        )
    return nn.Sequential(
        nn.Conv2d(plan.in_channels, out_channels, 1, plan.stride, bias=False),
        BatchNormAct2d(out_channels, activation=None),
    )


def _forked(x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the convolutions and what the shortcut of a residual block take.

    A block maps a tensor to a tensor, or a pair of equal ones to such a pair: one for either path,
    so that their gradients meet in the batch norm before (`batch_norm_act_forked`).
    """
    return x if isinstance(x, tuple) else (x, x)


def _projected(downsample: nn.Module | None, x: Tensor) -> tuple[Tensor, BatchNormAct2d | None]:
    """What the block's last layer adds, and what that layer does to it first."""
    if downsample is None:
        return x, None
    if type(downsample) is not nn.Sequential or hooked(downsample):
        return downsample(x), None
    *layers, norm = downsample
    for layer in layers:
        x = layer(x)
    return (x, norm) if isinstance(norm, BatchNormAct2d) else (norm(x), None)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        self.conv1 = conv3x3(plan.in_channels, plan.width, plan.stride, plan.first_dilation)
        self.bn1 = BatchNormAct2d(plan.width)
        second = plan.dilation if plan.dilate_second else 1
        self.conv2 = conv3x3(plan.width, plan.width, dilation=second)
        self.bn2 = BatchNormAct2d(plan.width)
        self.downsample = _shortcut(plan, plan.width)

    def forward(self, x: Paths) -> Paths:
        main, shortcut = _forked(x)
        shortcut, norm = _projected(self.downsample, shortcut)
        y = self.bn1(self.conv1(main))
        out: Paths = self.bn2(
            self.conv2(y), residual=shortcut, residual_norm=norm, fork=isinstance(x, tuple)
        )
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution; the stride is in the 3x3."""

    expansion = 4

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        out_channels = plan.width * self.expansion
        self.conv1 = nn.Conv2d(plan.in_channels, plan.width, 1, bias=False)
        self.bn1 = BatchNormAct2d(plan.width)
        self.conv2 = conv3x3(plan.width, plan.width, plan.stride, plan.first_dilation)
        self.bn2 = BatchNormAct2d(plan.width)
        self.conv3 = nn.Conv2d(plan.width, out_channels, 1, bias=False)
        self.bn3 = BatchNormAct2d(out_channels)
        self.downsample = _shortcut(plan, out_channels)

    def forward(self, x: Paths) -> Paths:
        main, shortcut = _forked(x)
        shortcut, norm = _projected(self.downsample, shortcut)
        y = self.bn1(self.conv1(main))
        y = self.bn2(self.conv2(y))
        out: Paths = self.bn3(
            self.conv3(y), residual=shortcut, residual_norm=norm, fork=isinstance(x, tuple)
        )
        return out


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a residual network.

    Attributes:
        block: residual block of all stages.
        depths: blocks in stages 1 to 4.
        widths: width of the blocks in stages 1 to 4.
        strides: stride of each stage before any is replaced by dilation.
        stem: output channels of the stem's convolutions, the first with stride 2: one is a single
            convolution of ``stem_kernel``, three are 3x3 (torchvision's plain stem is one 7x7).
        stem_kernel: kernel size of a single-convolution stem.
        max_pool: 3x3 max-pooling of stride 2 after the stem.
        output_stride: pixels of the input per pixel of stages 3 and 4.
        average: see `BlockPlan`; "d" in the names that others use.
        dilate_second: see `BlockPlan`.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    stem: tuple[int, ...] = (64,)
    stem_kernel: int = 7
    max_pool: bool = True
    output_stride: int = 8
    average: bool = False
    dilate_second: bool = True

    @property
    def stem_stride(self) -> int:
        return 4 if self.max_pool else 2

    def output_strides(self) -> list[int]:
        """The output strides this network can have, finest first."""
        reached = [self.stem_stride]
        for stride in self.strides:
            if stride > 1:
                reached.append(reached[-1] * stride)
        # A strided first stage belongs to the stem.
        return [stride for stride in reached if stride >= 4]


def _resnet(depth: int, stem: tuple[int, ...] = (64,), **more: Any) -> ResNetConfig:
    table: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }
    block, depths = table[depth]
    return ResNetConfig(block, depths, stem=stem, **more)


_V1C_STEM = (32, 32, 64)
_DEEP_STEM = (64, 64, 128)

BACKBONES: dict[str, ResNetConfig] = {
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "resnet152": _resnet(152),
    # As mmsegmentation has these two depths: dilated in the first convolution of a block alone.
    "resnet18b": _resnet(18, dilate_second=False),
    "resnet34b": _resnet(34, dilate_second=False),
    "resnet18c": _resnet(18, _V1C_STEM, dilate_second=False),
    "resnet34c": _resnet(34, _V1C_STEM, dilate_second=False),
    "resnet50c": _resnet(50, _V1C_STEM),
    "resnet101c": _resnet(101, _V1C_STEM),
    "resnet152c": _resnet(152, _V1C_STEM),
    "resnet50d": _resnet(50, _V1C_STEM, average=True),
    "resnet101d": _resnet(101, _V1C_STEM, average=True),
    "resnet152d": _resnet(152, _V1C_STEM, average=True),
    "resnet50s": _resnet(50, _DEEP_STEM),
    "resnet101s": _resnet(101, _DEEP_STEM),
    "resnet152s": _resnet(152, _DEEP_STEM),
    # Trains on real images from random weights on a CPU.
    "small": ResNetConfig(
        BasicBlock, depths=(2, 2, 2, 2), widths=(32, 64, 96, 128), stem=(16, 16, 32)
    ),
    # Sees at most 47 pixels, head convolution and upsampling included, so that the embedded data
    # set can place its cues out of sight.
    "demo": ResNetConfig(
        Bottleneck,
        depths=(1, 1, 1, 1),
        widths=(16, 32, 32, 32),
        strides=(2, 1, 1, 1),
        stem=(32,),
        stem_kernel=3,
        max_pool=False,
        output_stride=4,
    ),
}


def _stem(config: ResNetConfig) -> nn.Module:
    if len(config.stem) == 1:
        kernel = config.stem_kernel
        return nn.Conv2d(3, config.stem[0], kernel, 2, padding=kernel // 2, bias=False)
    first, second, last = config.stem
    # Numbered as in published checkpoints, where each ReLU is a layer of its own.
    return nn.Sequential(
        OrderedDict(
            [
                ("0", conv3x3(3, first, stride=2)),
                ("1", BatchNormAct2d(first)),
                ("3", conv3x3(first, second)),
                ("4", BatchNormAct2d(second)),
                ("6", conv3x3(second, last)),
            ]
        )
    )


class ResNet(nn.Module):
    """Backbone that returns the features of stages 2, 3 and 4.

    Args:
        config: shape of the network; ``config.output_stride`` must be one it can have.
        dilate: dilate the stages that lose their stride; False leaves their 3x3 convolutions as
            they are, with a smaller receptive field.

    Attributes:
        channels: of the three outputs.
        output_stride: of the last output.
        activation_checkpointing: in training keep only the inputs of the blocks of stages 3 and 4
            and compute the rest of them again in the backward pass. False at first.

    Shapes:
        x: B x 3 x H x W with H and W of at least ``output_stride``; returns c2, c3, c4, each
        B x channels x H / stride x W / stride, rounded up.

    In training, blocks and stages pass pairs of equal tensors (see `batch_norm_act_forked`), which
    is what forward hooks on them get.
    """

    def __init__(self, config: ResNetConfig, dilate: bool = True) -> None:
        super().__init__()
        check_choice("output_stride", config.output_stride, config.output_strides())
        self.output_stride = config.output_stride
        self.activation_checkpointing = False
        self.conv1 = _stem(config)
        self.bn1 = BatchNormAct2d(config.stem[-1])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if config.max_pool else nn.Identity()

        in_channels, reached, dilation = config.stem[-1], config.stem_stride, 1
        stages = []
        for depth, width, stride in zip(config.depths, config.widths, config.strides, strict=True):
            out_channels = width * config.block.expansion
            project = stride > 1 or in_channels != out_channels
            first_dilation = dilation
            if reached * stride > config.output_stride:
                dilation *= stride if dilate else 1
                stride = 1
            reached *= stride
            plan = BlockPlan(
                in_channels, width, stride, first_dilation, dilation, project,
                config.average, config.dilate_second,
            )  # fmt: skip
            blocks: list[nn.Module] = [config.block(plan)]
            in_channels = out_channels
            later = replace(
                plan, in_channels=in_channels, stride=1, first_dilation=dilation, project=False
            )
            blocks += [config.block(later) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        _, c2, c3, c4 = (width * config.block.expansion for width in config.widths)
        self.channels = (c2, c3, c4)
        init_convolutions(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_images(x, self.output_stride)
        x = self.maxpool(self.bn1(self.conv1(x)))
        # If there will be gradients, each path of the next block gets a tensor of its own.
        if self.training and torch.is_grad_enabled():
            c2, c3, c4 = (paths[0] for paths in self._features((x, x)))
        else:
            c2, c3, c4 = self._features(x)
        return c2, c3, c4

    def _features(self, x: Paths) -> tuple[Paths, Paths, Paths]:
        c2: Paths = self.layer2(self.layer1(x))
        c3 = self._stage(self.layer3, c2)
        return c2, c3, self._stage(self.layer4, c3)

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Those of the stem, then those of each stage."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [parameters_of(self.conv1, self.bn1), *(parameters_of(stage) for stage in stages)]

    def _stage(self, stage: nn.Sequential, x: Paths) -> Paths:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            for block in stage:
                x = recomputed(block, x)
            return x
        y: Paths = stage(x)
        return y
