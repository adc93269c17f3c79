"""The operators as plain PyTorch: what they compute, written to be read.

Every function works in the dtype it is given, so in float64 it is the definition that tests and
benchmarks compare with, and in a narrower dtype it shows the error of PyTorch's own formula.
Gradients are autograd's. Memory and speed do not matter here.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_norm.checks import ResidualNorm


def encode(
    x: Tensor, codewords: Tensor, scale: Tensor, *, backward_scale: Optional[Tensor] = None
) -> Tensor:
    """Encoding Layer (paper eq. 1) with all B x N x K x C residuals.

    x is B x C x H x W or B x N x C, codewords K x C, scale K (minus the paper's s_k); returns
    E, B x K x C. With `backward_scale` the value is the same and the gradient through the weights
    is that of logits scaled by it; `scale` gets none (paper 3.5).
    """
    pixels = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x  # [B, N, C]
    residuals = pixels[:, :, None, :] - codewords  # [B, N, K, C]
    distances = residuals.square().sum(3)
    logits = scale * distances
    if backward_scale is not None:
        carrier = backward_scale.detach() * distances
        logits = logits.detach() + carrier - carrier.detach()
    weights = logits.softmax(2)
    return (weights[..., None] * residuals).sum(1)


def code_statistics(code: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and M2, each B x K, of codes B x K x C over their channels."""
    mean = code.mean(2, keepdim=True)
    return code.sum(2), (code - mean).square().sum(2)


def batch_norm_act(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Optional[Tensor] = None,
    residual_norm: Optional[ResidualNorm] = None,
    activation: Optional[str] = "relu",
) -> Tensor:
    """activation(weight (x - mean) / sqrt(var + eps) + bias + residual), channels in dimension 1.

    Training takes the biased mean and variance of the batch and moves the running ones, if given,
    towards them (the unbiased variance) in place; evaluation uses the running ones. A group of
    processes computes what this does on the batches put together. `residual_norm` does the same to
    the residual before it is added.
    """
    if residual is not None and residual_norm is not None:
        residual = batch_norm_act(
            residual,
            *residual_norm[:4],
            training=training,
            momentum=residual_norm.momentum,
            eps=eps,
            activation=None,
        )
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training:
        axes = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        mean = x.mean(axes)
        var = (x - mean.view(shape)).square().mean(axes)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are needed when training is False.")
    else:
        mean, var = running_mean.to(x.dtype), running_var.to(x.dtype)
    y = (x - mean.view(shape)) / (var + eps).sqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    if residual is not None:
        y = y + residual
    return y.relu() if activation == "relu" else y


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = True,
    weight: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the upsampled logits B x C x H x W with the target B x H x W.

    As torch.nn.functional.cross_entropy of the bilinear interpolation, except that a target without
    a labelled pixel (or with weights that add up to 0) has the mean loss 0.
    """
    classes = logits.shape[1]
    size = (target.shape[1], target.shape[2])
    values = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    surprise = -values.log_softmax(1)  # [B, C, H, W]
    labelled = target.long() != ignore_index
    label = target.long().where(labelled, 0)
    weight = logits.new_ones(classes) if weight is None else weight.to(logits.dtype)
    of_label = weight[label] * surprise.gather(1, label[:, None])[:, 0]
    of_all = (weight[:, None, None] * surprise).sum(1) / classes
    loss = (1 - label_smoothing) * of_label + label_smoothing * of_all
    loss = loss.where(labelled, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = (weight[label] * labelled).sum()
    return loss.sum() / total.where(total > 0, 1.0)


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool = True
) -> tuple[Tensor, Tensor]:
    """Most likely class, int64, and its softmax probability, both B x H x W, at the larger size."""
    values = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    prob, label = values.softmax(1).max(1)
    return label, prob
