"""Triton kernel of `upsample_cross_entropy`, backward; plan.py launches it.

A program owns low rows and columns of a chunk of classes, and visits all output pixels that touch
them, including those that its neighbours also visit. It walks down the rows with two sums per
column and class: of the gradient for the low row above the pixels and for the one below. When it
passes a low row, the sums of the row above are complete, and one matrix product sums them over
columns into the gradient of the low pixels. Each is written once, by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .interpolation import (
    LOG2_E,
    between,
    classes_of,
    denominator,
    first_after,
    first_class_of,
    first_gap,
    label_rate,
    mean_weight,
    numerator,
    spacing,
    widen,
)


@triton.jit
def _row_of_classes(
    image, i, h, w, left, right, share, chunk, C: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Low row i of a chunk of classes made wide, columns x VEC G."""
    row = image + tl.maximum(tl.minimum(i, h - 1), 0) * (w * C)
    wide = widen(row, left, right, share, chunk, C, 1, VEC, G)
    return tl.reshape(wide, (wide.shape[0], wide.shape[2]))


@triton.jit
def _transposed(m, left, share, in_x):
    """The transpose of the interpolation along columns, low columns m x output columns."""
    to_left = (left[None, :] == m[:, None]).to(tl.float32)
    to_right = (left[None, :] + 1 == m[:, None]).to(tl.float32)
    transposed = to_left * (1.0 - share)[None, :] + to_right * share[None, :]
    return tl.where(in_x[None, :], transposed, 0.0)


@triton.jit
def _gradient(
    value, label, first_class, offset, Weight, Mean, spread, smoothing,
    WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """dL / dv of a row of pixels, columns x classes, before the factor of what follows the loss.

    `value` is log2 of the probabilities of the classes first_class + offset, `spread` what
    smoothing gives to each of them.
    """
    grad = tl.exp2(value)
    own = (label - first_class)[:, None] == offset[None, :]
    if SMOOTH:
        rate = label_rate(Weight, label, label >= 0, WEIGHT)
        spike = (1.0 - smoothing) * rate
        rate = spike + smoothing * mean_weight(Mean, WEIGHT)
        uniform = tl.where(label >= 0, 1.0, 0.0)
        grad = rate[:, None] * grad - tl.where(own, spike[:, None], 0.0)
        grad = grad - uniform[:, None] * spread[None, :]
    else:
        grad = tl.where(own, grad - 1.0, grad)
        if WEIGHT:
            grad *= label_rate(Weight, label, label >= 0, WEIGHT)[:, None]
    return grad


@triton.jit
def backward_kernel(
    Logits,  # B x h x w x C, dense
    Target,  # B x H x W, uint8 or int64
    Weight,  # C, the class weights m; read with WEIGHT
    Mean,  # 1, their mean; read with WEIGHT and SMOOTH
    Lse,  # B x H x W, float32, infinite where ignored
    Grad,  # with MAP B x H x W, of the losses; else a scalar, of their sum or mean
    Rates,  # a scalar, float64, what the mean divides by unless it is 0; read with MEAN
    dLogits,  # B x h x w x C, dense
    h,  # low rows
    w,  # low columns
    H,  # output rows
    W,  # output columns
    own_rows,  # low rows whose gradients a program writes
    own_columns,  # and low columns
    segments,  # programs that share the low rows
    strips,  # programs that share the low columns
    smoothing,  # e, the share of a label that is spread over all classes
    C: tl.constexpr,  # classes
    ALIGN: tl.constexpr,  # corners of both maps coincide
    BX: tl.constexpr,  # output columns of a program: all that touch its low columns
    BM: tl.constexpr,  # low columns of the product that sums over columns, own_columns at least
    VEC: tl.constexpr,  # classes side by side that one load reads
    G: tl.constexpr,  # such loads in a program's VEC G classes
    WEIGHT: tl.constexpr,  # there are class weights
    SMOOTH: tl.constexpr,  # smoothing is above 0
    MAP: tl.constexpr,  # Grad is a map
    MEAN: tl.constexpr,  # Grad is that of the mean
    PRECISION: tl.constexpr,  # of that product: "bf16", "tf32" or "ieee"
):
    """dLogits of a program's own low rows and columns, for one chunk of classes."""
    BC: tl.constexpr = G * VEC
    chunks: tl.constexpr = (C + BC - 1) // BC
    chunk, place = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    strip, segment = place % strips, place // strips % segments
    b = (place // strips // segments).to(tl.int64)
    image, labels = Logits + b * h * w * C, b * H * W
    first_row, first_column = segment * own_rows, strip * own_columns
    end_row = tl.minimum(first_row + own_rows, h)
    end_column = tl.minimum(first_column + own_columns, w)

    x = first_after(first_column - 1, w, W, ALIGN) + tl.arange(0, BX)
    end_x = first_after(end_column, w, W, ALIGN)
    # Columns beyond the last repeat it and are masked. When downsampling, a
    # program may have none, and low rows below the last output row: then it reads what is nearest.
    in_x, x = x < end_x, tl.maximum(tl.minimum(x, end_x - 1), 0)
    left, share = between(x, w, W, ALIGN)
    right = tl.minimum(left + 1, w - 1)
    m = first_column + tl.arange(0, BM)
    transposed = _transposed(m, left, share, in_x)

    classes, counted = classes_of(chunk, C, 1, VEC, G)
    classes, counted = tl.reshape(classes, (BC,)), tl.reshape(counted, (BC,))
    offset = tl.reshape(classes_of(0, C, 1, VEC, G)[0], (BC,))
    first_class = first_class_of(chunk, C, BC)
    spread = counted.to(tl.float32)
    if SMOOTH:
        if WEIGHT:
            spread = tl.load(Weight + classes, mask=counted, other=0.0).to(tl.float32)
        spread = spread * (smoothing / C)
    if not MAP:
        scale = tl.load(Grad)
        if MEAN:
            rates = tl.load(Rates)
            scale = scale.to(tl.float64) / tl.where(rates > 0.0, rates, 1.0)
        scale = scale.to(tl.float32)

    begin = tl.maximum(first_row - 1, first_gap(ALIGN))
    below = _row_of_classes(image, begin, h, w, left, right, share, chunk, C, VEC, G)
    sum_above = tl.zeros((BX, BC), tl.float32)
    sum_below = tl.zeros((BX, BC), tl.float32)
    y = first_after(begin, h, H, ALIGN)
    # Of the next row, read early because memory is far away.
    first = labels + tl.cast(tl.minimum(y, H - 1), tl.int64) * W + x
    lse_at, label_at, grad_at = Lse + first, Target + first, Grad + first
    next_lse, next_label = tl.load(lse_at), tl.load(label_at)
    whole = denominator(H, ALIGN)
    # first_after(i + 1) without a division for each i.
    number, per = spacing(h, H, ALIGN)
    ahead = (begin + 1) * number + (h - 2 if ALIGN else H + h - 1)
    rest = ahead % per
    ahead = ahead // per
    for i in range(begin, end_row):
        following = _row_of_classes(image, i + 1, h, w, left, right, share, chunk, C, VEC, G)
        step = following - below
        below = following
        end = tl.where(i + 1 < h, ahead, H)
        # Not range(y, end): Triton 3.7 drops the assignment to y below and begins at 0 each time.
        for n in range(end - y):
            row = y + n
            lse, label = next_lse, next_label.to(tl.int32)
            if MAP:
                factor = tl.load(grad_at)
                grad_at += W
            onward = tl.where(row + 1 < H, W, 0)
            lse_at += onward
            label_at += onward
            next_lse, next_label = tl.load(lse_at), tl.load(label_at)
            # Ignored pixels have an infinite lse, so their probabilities are 0.
            label = tl.where(lse == float("inf"), -1, label)
            down = numerator(row, h, H, ALIGN) - i * whole
            down = tl.cast(down, tl.float32) * (1.0 / whole)
            value = below + (down - 1.0) * step - (lse * LOG2_E)[:, None]
            grad = _gradient(
                value, label, first_class, offset, Weight, Mean, spread, smoothing, WEIGHT, SMOOTH
            )
            if MAP:
                grad *= factor[:, None]
            sum_above += grad * (1.0 - down)
            sum_below += grad * down
        y = end
        rest += number % per
        carry = rest >= per
        ahead += number // per + tl.where(carry, 1, 0)
        rest -= tl.where(carry, per, 0)
        # Also for the row above the program's own, which is not stored.
        if PRECISION == "bf16":
            product = tl.dot(transposed.to(tl.bfloat16), sum_above.to(tl.bfloat16))
        else:
            product = tl.dot(transposed, sum_above, input_precision=PRECISION)
        if not MAP:
            product *= scale
        to = dLogits + b * h * w * C + ((i * w + m) * C)[:, None] + classes[None, :]
        mask = ((m < end_column) & (i >= first_row))[:, None] & counted[None, :]
        tl.store(to, product.to(dLogits.dtype.element_ty), mask=mask)
        sum_above = sum_below
        sum_below = tl.zeros((BX, BC), tl.float32)
