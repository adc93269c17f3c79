"""The peers of the comparisons, written the way today's frameworks do it."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from encnet_triton.inference import window_starts


def encode_materialised(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Encoding with all B x N x K x C residuals, made twice: for distances and for aggregation."""
    batch, channels = x.shape[:2]
    num = codewords.shape[0]
    pixels = x.flatten(2).transpose(1, 2).contiguous()
    expanded = pixels.unsqueeze(2).expand(batch, pixels.shape[1], num, channels)
    book = codewords.view(1, 1, num, channels)
    logits = scale.view(1, 1, num) * (expanded - book).pow(2).sum(3)
    weights = F.softmax(logits, dim=2)
    return (weights.unsqueeze(3) * (expanded - book)).sum(1)


def encode_matmul(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """The same by matrix products: |x|^2 - 2 x.d + |d|^2, then A^T X - (sum A) d."""
    pixels = x.flatten(2).transpose(1, 2)
    norms = pixels.float().square().sum(2, keepdim=True)
    cross = (pixels @ codewords.to(pixels.dtype).t()).float()
    distances = norms - 2 * cross + codewords.square().sum(1)
    weights = (scale * distances).softmax(2)
    gathered = (weights.to(pixels.dtype).transpose(1, 2) @ pixels).float()
    return gathered - weights.sum(1)[..., None] * codewords


def upsample_then_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Interpolate to full resolution, then cross-entropy."""
    size = (target.shape[1], target.shape[2])
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    return F.cross_entropy(full, target, ignore_index=255)


def window_scores(model: nn.Module, x: Tensor, crop: int, classes: int) -> Tensor:
    """Sums of the class probabilities of an image's windows, a window at a time: 1 x n x H x W."""
    total = x.new_zeros(1, classes, *x.shape[2:])
    for top, left in product(*(window_starts(size, crop) for size in x.shape[2:])):
        place = (..., slice(top, top + crop), slice(left, left + crop))
        logits = model(x[place].contiguous(memory_format=torch.channels_last)).logits
        full = F.interpolate(logits.float(), (crop, crop), mode="bilinear", align_corners=True)
        total[place] += full.softmax(1)
    return total


def batch_norm_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None
) -> Tensor:
    """The end of a residual block as torchvision writes it: batch norm, `+=`, ReLU in place."""
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.1, eps=1e-5)
    if residual is not None:
        y += residual
    return F.relu_(y)


def sequential_crop(
    image: Image.Image,
    label: Image.Image,
    crop: int,
    base: int,
    fill: tuple[int, int, int],
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Resize, flip, rotate, pad, crop, one after the other, as in the published code."""
    bilinear, nearest = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    short = int(rng.integers(base // 2, 2 * base, endpoint=True))
    factor = short / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    image, label = image.convert("RGB").resize(size, bilinear), label.resize(size, nearest)
    if rng.random() < 0.5:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    angle = float(rng.uniform(-10, 10))
    image = image.rotate(angle, bilinear, fillcolor=fill)
    label = label.rotate(angle, nearest, fillcolor=255)
    right, bottom = max(0, crop - size[0]), max(0, crop - size[1])
    if right or bottom:
        image = ImageOps.expand(image, (0, 0, right, bottom), fill=fill)
        label = ImageOps.expand(label, (0, 0, right, bottom), fill=255)
    left = int(rng.integers(0, image.width - crop, endpoint=True))
    top = int(rng.integers(0, image.height - crop, endpoint=True))
    box = (left, top, left + crop, top + crop)
    return np.asarray(image.crop(box)), np.asarray(label.crop(box))
