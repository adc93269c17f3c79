"""Layers of the kernel hub: forward passes for layers of others.

`kernels.kernelize` puts such a forward pass into the layers of a model, which keep parameters,
buffers and options; no class here has any of its own, and none can be built to be used alone.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .batch_norm.operator import batch_norm_act
from .encoding.operator import encode


class Encoding(nn.Module):
    """For the Encoding layers of PyTorch-Encoding and mmsegmentation.

    x is B x C x H x W or B x N x C, the result B x K x C, of the dtype that they give.
    """

    can_torch_compile = True
    codewords: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        codes = encode(x, self.codewords, self.scale)
        return codes.to(torch.promote_types(x.dtype, self.codewords.dtype))


class BatchNorm(nn.Module):
    """For torch.nn.BatchNorm1d, BatchNorm2d and BatchNorm3d; x is B x C x ... ."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x, None)


class BatchNormAct2d(nn.Module):
    """For timm's batch norm with an activation; x is B x C x H x W.

    A ReLU is in the same kernels. Another activation follows, as does a ReLU behind a drop layer.
    """

    can_torch_compile = True
    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act) is nn.ReLU and type(self.drop) is nn.Identity:
            return _batch_norm(self, x, "relu")
        y: Tensor = self.act(self.drop(_batch_norm(self, x, None)))
        return y


def _batch_norm(layer: Any, x: Tensor, activation: Optional[str]) -> Tensor:
    """What a torch.nn.BatchNorm does, whose attributes the layer has."""
    moves = layer.training and layer.track_running_stats
    momentum = layer.momentum
    if moves and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(layer.num_batches_tracked)
    mean, var = layer.running_mean, layer.running_var
    of_batch = layer.training or mean is None
    if layer.training and not moves:
        mean = var = None
    return batch_norm_act(
        x,
        layer.weight,
        layer.bias,
        mean,
        var,
        training=of_batch,
        momentum=momentum,
        eps=layer.eps,
        activation=activation,
    )
