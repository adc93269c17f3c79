"""`upsample_cross_entropy` and `upsample_argmax` in PyTorch, a tile of output pixels at a time.

Logits are B x C x h x w, targets B x H x W. The maths are in operator.py.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .tiles import RANGE, Strip, TiledUpsampling


class _Pixels(NamedTuple):
    """The parts of the loss of each pixel of a strip; every map is H x X."""

    label: Tensor  # int64, 0 where ignored
    labelled: Tensor  # 1 or 0
    label_rate: Tensor  # (1 - e) m_t, 0 where ignored
    rate: Tensor  # r_i, 0 where ignored
    spike: Tensor  # -label_rate / rate


class _Share(NamedTuple):
    """What a strip adds to the gradient of its image."""

    image: int
    columns: slice
    grad: Tensor  # [h, m, C]


def _pixels(
    target: Tensor, weight: Optional[Tensor], ignore_index: int, smoothing: float, like: Tensor
) -> _Pixels:
    classes = like.shape[-1]
    index = target.to(torch.int64)
    ignored = index == ignore_index
    index = index.masked_fill(ignored, 0)
    _check_labels(index, classes, ignore_index)
    labelled = ignored.logical_not().to(like)
    if weight is None:
        label_rate, rate = labelled * (1 - smoothing), labelled
    else:
        label_rate = weight[index].mul_(labelled).mul_(1 - smoothing)
        rate = label_rate + labelled * (weight.sum() * (smoothing / classes))
    spike = (label_rate / rate).nan_to_num_(0).neg_()
    return _Pixels(index, labelled, label_rate, rate, spike)


def _check_labels(index: Tensor, classes: int, ignore_index: int) -> None:
    # Asking an accelerator would stall it: there a wrong label is a device-side assertion.
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"upsample_cross_entropy: target holds the value {low if low < 0 else high}; for "
            f"{classes} classes it may hold 0 to {classes - 1} and ignore_index = {ignore_index}."
        )


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Loss and lse of each pixel, and, if asked for, the gradient of the sum of the losses."""
    up = TiledUpsampling(logits, target.shape[1], target.shape[2], align_corners)
    losses = up.low.new_empty(target.shape)
    lses = torch.empty_like(losses)
    weight = None if weight is None else weight.detach().to(up.low)

    def work(strip: Strip) -> _Share:
        pixels = _pixels(target[strip.here], weight, ignore_index, smoothing, up.low)
        grad = strip.new_total()
        totals, peaks, label_values = up.low.new_zeros((3, *pixels.label.shape))
        maps = (
            *(m.unsqueeze(2) for m in (pixels.label, pixels.spike, totals, peaks, label_values)),
            *(m.unsqueeze(1) for m in (pixels.rate, totals)),
        )
        for tile, *cut in zip(strip.tiles(), *map(strip.rows, maps)):
            index, spike, total, peak, label_value, rate, total_row = cut
            values = strip.expand(tile)
            torch.gather(values, 2, index, out=label_value)
            if not strip.in_range(tile):
                torch.amax(values, 2, keepdim=True, out=peak)
                values.sub_(peak).clamp_(min=-RANGE)
            values.exp_()
            strip.sum_classes(tile, total)
            if with_grad:
                values.scatter_add_(2, index, torch.mul(spike, total))
                strip.reduce(tile, torch.div(rate, total_row), grad)
        lse = torch.log(totals).add_(peaks)
        lses[strip.here] = lse
        loss = losses[strip.here]
        torch.sub(lse, label_values, out=loss)
        loss.mul_(pixels.label_rate)
        if smoothing:
            mean = strip.expand_map(_class_mean(strip.low, weight))
            loss.add_(lse * (pixels.rate - pixels.label_rate))
            loss.sub_(mean.mul_(pixels.labelled), alpha=smoothing)
            if with_grad:
                _subtract_smoothing(strip, pixels.labelled, weight, smoothing, grad)
        return _Share(strip.image, strip.columns.low, grad.view(strip.low.shape))

    shares = up.each_strip(work)
    if with_grad:
        return losses, lses, _add_up(shares, torch.empty_like(logits, dtype=losses.dtype))
    for _ in shares:
        pass
    return losses, lses, None


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    align_corners: bool,
    smoothing: float,
) -> Tensor:
    up = TiledUpsampling(logits, target.shape[1], target.shape[2], align_corners)
    weight = None if weight is None else weight.detach().to(up.low)

    def work(strip: Strip) -> _Share:
        pixels = _pixels(target[strip.here], weight, ignore_index, smoothing, up.low)
        pixel_grad = grad_loss[strip.here].to(up.low)
        factor = pixel_grad * pixels.rate
        grad = strip.new_total()
        maps = [m.unsqueeze(2) for m in (pixels.label, pixels.spike, lse[strip.here])]
        maps.append(factor.unsqueeze(1))
        for tile, *cut in zip(strip.tiles(), *map(strip.rows, maps)):
            index, spike, tile_lse, tile_factor = cut
            # exp(-RANGE) adds nothing to a gradient, and keeps denormals away.
            values = strip.expand(tile).sub_(tile_lse).clamp_(min=-RANGE).exp_()
            values.scatter_add_(2, index, spike)
            strip.reduce(tile, tile_factor, grad)
        if smoothing:
            _subtract_smoothing(strip, pixel_grad * pixels.labelled, weight, smoothing, grad)
        return _Share(strip.image, strip.columns.low, grad.view(strip.low.shape))

    return _add_up(up.each_strip(work), torch.empty_like(logits))


def _add_up(shares: Iterable[_Share], grad: Tensor) -> Tensor:
    """Fill grad, B x C x h x w, image by image; neighbouring strips share low columns."""
    _, classes, height, width = grad.shape
    for image, group in itertools.groupby(shares, lambda share: share.image):
        first = next(group)
        total = first.grad.new_zeros(height, width, classes)
        for share in itertools.chain((first,), group):
            total[:, share.columns] += share.grad
        result = grad[image]
        if result.stride(1) == width * result.stride(2):
            # As matrices, the copy reaches PyTorch's blocked transposition.
            result.view(classes, -1).copy_(total.flatten(0, 1).t())
        else:
            result.copy_(total.permute(2, 0, 1))
    return grad


def _class_mean(low: Tensor, weight: Optional[Tensor]) -> Tensor:
    return low.mean(2) if weight is None else (low * weight).mean(2)


def _subtract_smoothing(
    strip: Strip,
    pixel_grad: Tensor,
    weight: Optional[Tensor],
    smoothing: float,
    grad: Tensor,
) -> None:
    grad = grad.view(strip.low.shape)
    low = strip.reduce_map(pixel_grad).mul_(smoothing / grad.shape[2]).unsqueeze(2)
    grad.sub_(low if weight is None else low * weight)


def argmax(
    logits: Tensor, height: int, width: int, align_corners: bool, with_prob: bool
) -> tuple[Tensor, Tensor]:
    up = TiledUpsampling(logits, height, width, align_corners)
    shape = (len(logits), height, width)
    labels = up.low.new_empty(shape, dtype=label_dtype(logits.shape[1]))
    probs = up.low.new_empty(shape if with_prob else (0,))

    def work(strip: Strip) -> None:
        tiles = strip.tiles()
        label = strip.rows(labels[strip.here])
        prob = strip.rows(probs[strip.here]) if with_prob else label
        for tile, tile_label, tile_prob in zip(tiles, label, prob):
            values = strip.expand(tile)
            peak, index = values.max(2, keepdim=True)
            tile_label.copy_(index.squeeze(2))
            if with_prob:
                values.sub_(peak).clamp_(min=-RANGE).exp_()
                torch.reciprocal(values.sum(2), out=tile_prob)

    for _ in up.each_strip(work):
        pass
    return labels, probs


def label_dtype(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int64
