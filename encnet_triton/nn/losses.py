"""Segmentation loss: per-pixel cross-entropy, SE loss, auxiliary loss (paper, sections 2, 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encnet_triton.kernels import upsample_cross_entropy
from encnet_triton.nn.arguments import check_count, check_integer, check_number, check_probability
from encnet_triton.nn.output import SegmentationOutput


class LossTerms(NamedTuple):
    """Scalars on the logits' device; ``total`` is the one to differentiate.

    ``segmentation`` is that of the logits, the weighted Dice loss included; ``se`` and ``aux`` are
    the sums of their branches before weighting, 0 if there is none.
    """

    total: Tensor
    segmentation: Tensor
    se: Tensor
    aux: Tensor


def presence_target(target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Which classes each image contains: the ground truth of the SE loss.

    Computed on the target's device without a loop over images or a wait for the device.

    Args:
        target: B x H x W labels, uint8 or int64. ``ignore_index`` and values outside
            [0, num_classes) mark no class.
        num_classes: n.
        ignore_index: label of pixels to leave out.

    Returns:
        B x n float32 of zeros and ones.
    """
    labels = target.flatten(1).long()
    counted = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    present = torch.zeros(len(labels), num_classes + 1, device=target.device)
    # The last column collects the pixels of no class.
    return present.scatter_(1, labels.where(counted, num_classes), 1.0)[:, :num_classes]


class SegmentationLoss(nn.Module):
    """CE(segmentation) + se_weight sum of BCE(SE branches) + aux_weight CE(auxiliary head).

    Cross-entropies are taken on logits upsampled bilinearly to the target, summed over the labelled
    pixels and divided by ``pixels``; the SE loss is the mean over classes of the binary
    cross-entropy with `presence_target`, summed over images and divided by ``images``.

    For N processes whose gradients are averaged, or accumulation steps whose gradients are summed,
    pass as ``pixels`` and ``images`` the totals of the global batch, divided by N: the resulting
    gradient is that of one process with the whole batch.

    With ``ohem`` the cross-entropy is the mean over the pixels of each call that are kept, times
    the call's share of ``pixels``; which pixels are kept depends on how a batch is divided.

    Args:
        num_classes: n.
        ignore_index: label of pixels to ignore.
        se_weight: alpha of the paper's figure 5, for every SE branch.
        aux_weight: weight of the auxiliary head; the released recipes have 0.2.
        align_corners: of the upsampling; take the model's.
        class_weight: n weights of the segmentation and auxiliary cross-entropy.
        label_smoothing: of the same, in [0, 1).
        ohem: online hard example mining: average both cross-entropies only over pixels whose class
            has a probability below this; 0 uses every pixel. With class weights or label smoothing
            these probabilities take a second forward pass of the cross-entropy.
        ohem_least: share of all pixels that is kept at least: those whose class is least probable.
        dice_weight: weight of the Dice loss, see `dice_loss`. Its probabilities take B x n x H x W
            float32 values, and as many again for the gradient: 2.2 GB each for 16 images of
            480 x 480 and 150 classes, which the cross-entropy alone never stores.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        se_weight: float = 0.2,
        aux_weight: float = 0.0,
        align_corners: bool = True,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ohem: float = 0.0,
        ohem_least: float = 0.0625,
        dice_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_probability("label_smoothing", label_smoothing)
        check_probability("ohem", ohem)
        check_number("ohem_least", ohem_least)
        if not 0 < ohem_least <= 1:
            raise ValueError(f"ohem_least is {ohem_least}, but must be in (0, 1]")
        check_integer("ignore_index", ignore_index)
        weights = {"se_weight": se_weight, "aux_weight": aux_weight, "dice_weight": dice_weight}
        for argument, value in weights.items():
            check_number(argument, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{argument} is {value}, but must be finite and not negative")
        if class_weight is not None:
            class_weight = _class_weights(class_weight, num_classes)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.se_weight = se_weight
        self.aux_weight = aux_weight
        self.align_corners = align_corners
        self.label_smoothing = label_smoothing
        self.ohem, self.ohem_least = ohem, ohem_least
        self.dice_weight = dice_weight
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self,
        output: SegmentationOutput,
        target: Tensor,
        *,
        pixels: Tensor | float | None = None,
        images: Tensor | float | None = None,
    ) -> LossTerms:
        """The loss terms of one micro-batch.

        Args:
            output: what the model returned.
            target: B x H x W labels at full resolution, uint8 or int64.
            pixels: divisor of the cross-entropy sums; default `pixels_in` of this target.
            images: divisor of the SE sums; default B.
        """
        if pixels is None:
            pixels = self.pixels_in(target)
        segmentation = self._cross_entropy(output.logits, target, pixels)
        if self.dice_weight:
            dice = dice_loss(
                output.logits,
                target,
                ignore_index=self.ignore_index,
                align_corners=self.align_corners,
            )
            share = _divide(self.pixels_in(target).to(dice.dtype), pixels)
            segmentation = segmentation + self.dice_weight * share * dice
        total = segmentation
        se = segmentation.new_zeros(())
        aux = segmentation.new_zeros(())
        if output.se:
            se = self._se(output.se, target, len(target) if images is None else images)
            total = total + self.se_weight * se
        if output.aux is not None:
            aux = self._cross_entropy(output.aux, target, pixels)
            total = total + self.aux_weight * aux
        return LossTerms(total, segmentation, se, aux)

    def pixels_in(self, target: Tensor) -> Tensor:
        """Labelled pixels of a target, each counted with its class's weight: 0-d float64."""
        return self._each(target).sum(dtype=torch.float64)

    def _each(self, target: Tensor) -> Tensor:
        """What each pixel counts: its class's weight, or 1; 0 if it is ignored."""
        labelled = target != self.ignore_index
        if self.class_weight is None:
            return labelled
        # `upsample_cross_entropy` names a label that is out of range; indexing would not.
        classes = target.long().where(labelled, 0).clamp(0, self.num_classes - 1)
        return self.class_weight.double()[classes] * labelled

    def _cross_entropy(self, logits: Tensor, target: Tensor, pixels: Tensor | float) -> Tensor:
        weight = self.class_weight
        if weight is not None:
            weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
        of_pixels = partial(
            upsample_cross_entropy,
            target=target,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            reduction="none" if self.ohem else "sum",
        )
        loss: Tensor = of_pixels(logits, weight=weight, label_smoothing=self.label_smoothing)
        if self.ohem:
            surprise = loss.detach()  # -ln of the probability of a pixel's class
            if weight is not None or self.label_smoothing:
                surprise = of_pixels(logits.detach())
            loss = self._hard(loss, surprise, target) * self.pixels_in(target).to(loss.dtype)
        return _divide(loss, pixels)

    def _hard(self, losses: Tensor, surprise: Tensor, target: Tensor) -> Tensor:
        """Weighted mean of the losses that are kept; nothing is read back from the device."""
        least = math.ceil(self.ohem_least * losses.numel())
        if not least:
            return losses.sum()
        hardest = surprise.flatten().topk(least, sorted=False).values
        kept = surprise >= hardest.min().clamp(max=-math.log(self.ohem))
        return _divide((losses * kept).sum(), (self._each(target) * kept).sum(dtype=torch.float64))

    def _se(self, branches: Sequence[Tensor], target: Tensor, images: Tensor | float) -> Tensor:
        present = presence_target(target, self.num_classes, self.ignore_index)
        dtype = torch.promote_types(branches[0].dtype, torch.float32)
        logits = torch.stack([branch.to(dtype) for branch in branches])
        present = present.to(dtype).expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, present, reduction="sum")
        return _divide(loss, images) / self.num_classes


def dice_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = True
) -> Tensor:
    """1 - the mean over the target's classes of 2 sum(p t) / (sum(p) + sum(t)).

    p are the softmax probabilities of the logits, upsampled bilinearly to the target, t is 1 where
    the target has the class, and the sums are over the labelled pixels of the batch.

    Args:
        logits: B x n x h x w.
        target: B x H x W labels, uint8 or int64; values outside [0, n) other than ``ignore_index``
            are no class.
        ignore_index: label of pixels to ignore.
        align_corners: of the upsampling.

    Returns:
        0-d float32 (float64 for float64 logits); 0 for a target without a class.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    upsampled = F.interpolate(
        logits.to(dtype), target.shape[1:], mode="bilinear", align_corners=align_corners
    )
    labelled = target != ignore_index
    probability = upsampled.softmax(1) * labelled[:, None]
    n = logits.shape[1]
    labels = target.long()
    counted = labelled & (labels >= 0) & (labels < n)
    picked = probability.gather(1, labels.where(counted, 0)[:, None])[:, 0] * counted
    # A sum for each row first: adding millions of probabilities to one float32 would round most of
    # them away.
    where, rows = labels.where(counted, n).flatten(0, 1), picked.flatten(0, 1)
    zeros = rows.new_zeros(len(rows), n + 1)
    both = zeros.scatter_add(1, where, rows).sum(0)[:n]
    count = zeros.scatter_add(1, where, torch.ones_like(rows)).sum(0)[:n]
    score = 2 * both / (probability.sum((0, 2, 3)) + count).clamp(min=1e-7)
    present = count > 0
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


def _class_weights(given: Sequence[float] | Tensor, num_classes: int) -> Tensor:
    try:
        weights = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_weight is {given!r}, but must be numbers, one per class") from error
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weight has shape {tuple(weights.shape)}, but {num_classes} "
            f"classes need {num_classes} weights"
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            f"class_weight is {weights.tolist()}, but must be finite numbers of at least 0"
        )
    return weights


def _divide(total: Tensor, count: Tensor | float) -> Tensor:
    """total / count in total's dtype, and total (which is then 0) where count is 0."""
    # A 0-d float64 count would otherwise turn the loss into float64.
    if isinstance(count, Tensor):
        count = count.to(total.device, total.dtype)
    else:
        count = torch.full((), count, dtype=total.dtype, device=total.device)
    return total / count.where(count > 0, 1)
