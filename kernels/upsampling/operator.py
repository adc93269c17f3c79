"""Bilinear upsampling joined with softmax cross-entropy, or with the arg-max over the classes.

B images, C classes; h x w is the low resolution of the logits, H x W that of the target.

With U_h [H, h] and U_w [W, w] the matrices of bilinear interpolation (two entries a row), z the
map of one class and v = U_h z U_w^T its upsampled values, the loss of pixel i with label t is

    lse_i  = log sum_c exp v_ic
    loss_i = (1 - e) m_t (lse_i - v_it) + (e / C) sum_c m_c (lse_i - v_ic)

for class weights m (1 by default) and label smoothing e, as in torch.nn.functional.cross_entropy.
With p_ic = exp(v_ic - lse_i), g_i = dL/dloss_i and r_i = (1 - e) m_t + (e / C) sum_c m_c,

    dL/dv_ic = g_i (r_i p_ic - (1 - e) m_t [c = t] - (e / C) m_c)
    dL/dz    = U_h^T (dL/dv) U_w

v, p and dL/dv have B C H W entries and are never stored. There are three ways:

- On a GPU (plan.py) forward keeps lse, 4 B H W bytes, and backward recomputes v.
  Bytes that must move, logits of e bytes, labels of one: forward reads e B C h w + B H W and writes
  4 B H W; backward reads those and writes e B C h w.
- On a CPU (pytorch.py) v exists for a tile of pixels small enough for a cache. Per-pixel
  losses (reduction "none"): as on a GPU.
- There, sum and mean: the gradient of the sum is made in the pass that makes the loss, while exp v
  is available, and kept in fp32, 4 B C h w bytes; backward only scales it. That takes two thirds
  of the time. Forward reads 4 B C h w + B H W (fp32 logits) and writes 4 B C h w; backward reads
  and writes 4 B C h w.

On a CPU: a softmax does not change when one number is subtracted from all classes of a
low-resolution pixel, so each pixel's largest logit is subtracted first, on the small map.
Interpolated values are then never positive, and unless some are below -RANGE no output pixel needs
a maximum of its own.
"""

from functools import partial
from typing import Optional, Union

import torch
from torch import Tensor

from ..runtime.arguments import check_derivatives, check_flag, check_integer
from ..runtime.eager import quiet, undisturbed
from .checks import check_arguments, check_logits
from .library import (
    Losses,
    apply_reduced,
    direct_losses_of_pixels,
    direct_most_likely,
    direct_reduced,
)


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
    """Cross-entropy of bilinearly upsampled logits, without the upsampled logits ever in memory.

    Equal to `F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear"), target)` with the same
    options, except that a target without any labelled pixel gives loss 0 and gradient 0, not NaN.
    It can be differentiated once, with respect to `logits`. Logits must be finite.

    Args:
        logits: B x C x h x w in any memory format; float32, bfloat16, float16 or float64.
        target: B x H x W, uint8 or int64, class indices 0 to C - 1 or `ignore_index`. H x W is the
            size upsampled to; any size is allowed, h x w and smaller ones included.
        ignore_index: the label of pixels to ignore.
        align_corners: as in `F.interpolate`; the size of the logits must fit it.
        weight: C non-negative numbers, one per class, or None; gets no gradient.
        label_smoothing: share of the label spread over all classes, 0 to 1.
        reduction: "mean" divides the sum by the labelled pixels, each with the weight of its label;
            "sum"; or "none", the losses of all pixels, 0 where ignored.

    Returns:
        float32 (float64 for float64 logits), a scalar, or B x H x W for reduction "none".

    Raises:
        TypeError: an argument is of another type, or has a dtype that is not allowed.
        ValueError: shapes, devices or options that do not fit; on the CPU also a label outside 0 to
            C - 1 that is not `ignore_index`, and a weight that is negative or not finite (on a GPU
            a device-side assertion, as in PyTorch).
        NotImplementedError: forward-mode differentiation, or by torch.func.
    """
    with_grad = torch.is_grad_enabled() and getattr(logits, "requires_grad", False)
    known = type(reduction) is str and reduction in ("mean", "sum")
    mean = known and reduction == "mean"
    options = (weight, ignore_index, align_corners, label_smoothing)
    call = None
    if known and type(label_smoothing) is float and 0.0 <= label_smoothing <= 1.0 and quiet():
        call = direct_reduced.again(logits, target, *options, mean, with_grad)
    if call is None:
        check_arguments(logits, target, *options, reduction)
        options = (weight, ignore_index, align_corners, float(label_smoothing))
        plain = undisturbed(logits, target, weight)
        if reduction == "none":
            losses = Losses.apply if plain and with_grad else direct_losses_of_pixels
            of_pixels: Tensor = losses(logits, target, *options)[0]  # type: ignore[no-untyped-call]
            return of_pixels
        if plain:
            call = partial(direct_reduced.body, logits, target, *options, mean, with_grad)
    inputs = logits, target, *options, mean, with_grad
    if call is None:
        return direct_reduced(*inputs)[0]  # type: ignore[no-any-return]
    return apply_reduced(call, *inputs) if with_grad else call()[0]


def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    return_prob: bool = False,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """The most likely class of each pixel of bilinearly upsampled logits, computed tile by tile.

    Args:
        logits: B x C x h x w in any memory format; float32, bfloat16, float16 or float64. Finite.
        size: H and W, at least 1.
        align_corners: as in `F.interpolate`.
        return_prob: also return the softmax probability of that class.

    Returns:
        Labels, B x H x W, uint8 if C <= 256 and otherwise int64; with `return_prob` the tuple of
        labels and probabilities, B x H x W float32 (float64 for float64 logits). No gradients.

    Raises:
        TypeError: an argument is of another type, or logits of a dtype that is not allowed.
        ValueError: logits are not B x C x h x w, or a size below 1.
    """
    name = "upsample_argmax"
    check_logits(name, logits)
    check_flag(name, "align_corners", align_corners)
    check_flag(name, "return_prob", return_prob)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"{name}: size must be the pair (H, W), got {size!r}.")
    height, width = size
    check_integer(name, "the height of size", height)
    check_integer(name, "the width of size", width)
    if height < 1 or width < 1:
        raise ValueError(f"{name}: size must be at least 1 x 1, got {height} x {width}.")
    if return_prob:
        check_derivatives(name, logits)
    label, prob = direct_most_likely(logits.detach(), height, width, align_corners, return_prob)
    return (label, prob) if return_prob else label
