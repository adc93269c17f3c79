"""Triton kernels of `upsample_cross_entropy`, forward, and `upsample_argmax`.

plan.py launches them; how they interpolate is in interpolation.py, and the backward pass in
backward.py. All sums are in float32.

A program has R rows of output, which lie between two low rows, and walks the classes in chunks with
a running maximum and the sums of exponentials of its rows. For `upsample_argmax`, threads that
share a pixel combine their results once, at the end.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy keeps the type of the empty one.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from .interpolation import (
    LN_2,
    LOWEST,
    STEEPEST,
    between,
    classes_of,
    first_after,
    first_gap,
    label_rate,
    logits_of_labels,
    mean_weight,
    row_share,
    share_between_rows,
    two_rows,
)


@triton.jit
def _chunk(
    image, i, h, w, left, right, share, chunk,
    C: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """`two_rows` of one thread per pixel, columns x classes."""
    above, step = two_rows(image, i, h, w, left, right, share, chunk, C, 1, VEC, G)
    shape: tl.constexpr = (above.shape[0], above.shape[2])
    return tl.reshape(above, shape), tl.reshape(step, shape)


@triton.jit
def _exact_lse(
    image, i, h, w, left, right, share, down, C: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr
):
    """log2 of the sum of exponentials of a row of output, about each pixel's own maximum.

    The row lies `down` below low row i, and each pixel `share` right of low column `left`.
    """
    peak = tl.full(left.shape, LOWEST, tl.float32)
    total = tl.zeros(left.shape, tl.float32)
    for chunk in range(tl.cdiv(C, VEC * G)):
        above, step = _chunk(image, i, h, w, left, right, share, chunk, C, VEC, G)
        values = above + down * step
        new_peak = tl.maximum(peak, tl.max(values, 1))
        total = total * tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(values - new_peak[:, None]), 1)
        peak = new_peak
    return peak + tl.log2(total)


@triton.jit
def _finish_row(
    image, Target, Weight, Mean, Lse, Loss, lse2, average, at, inside, i, down, left, right, share,
    w, h, ignore, smoothing, C: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    LSE: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Store lse and loss of a row; return losses, label weights, and labels not allowed.

    lse2 is lse times log2 e, and average the sum of all logits (with class weights, if any) times
    log2 e, for the label smoothing.
    """
    lse = lse2 * LN_2
    label = tl.load(Target + at, mask=inside, other=0)
    labelled = inside & (label != ignore)
    if LSE:
        # An ignored pixel then has no probabilities and needs no care backward.
        tl.store(Lse + at, tl.where(labelled, lse, float("inf")), mask=inside)
    valid = labelled & (label >= 0) & (label < C)
    wrong = tl.where(labelled & (valid == 0), 1.0, 0.0)
    label = tl.where(valid, label.to(tl.int32), 0)
    value = logits_of_labels(image, label, i, down, left, right, share, w, h, C)
    rate = label_rate(Weight, label, valid, WEIGHT)
    loss = tl.where(valid, rate * (lse - value), 0.0)
    if SMOOTH:
        spread = mean_weight(Mean, WEIGHT) * lse - average * (LN_2 / C)
        loss = (1.0 - smoothing) * loss + smoothing * tl.where(valid, spread, 0.0)
    if MAP:
        tl.store(Loss + at, loss, mask=inside)
    return loss, rate, wrong


@triton.jit
def _own_pixels(
    h, w, H, W, parts, strips, R: tl.constexpr, BX: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """A program's image and low row, its columns, its first row and how many rows it has.

    Then, of each column, the low columns on both sides and the share of the right one.
    """
    strip, part = tl.program_id(0) % strips, tl.program_id(0) // strips % parts
    gaps = h - first_gap(ALIGN)
    i = tl.program_id(0) // strips // parts % gaps + first_gap(ALIGN)
    b = (tl.program_id(0) // strips // parts // gaps).to(tl.int64)
    x, y = strip * BX + tl.arange(0, BX), first_after(i, h, H, ALIGN) + part * R
    rows = tl.minimum(first_after(i + 1, h, H, ALIGN) - y, R)
    left, share = between(tl.minimum(x, W - 1), w, W, ALIGN)
    right = tl.minimum(left + 1, w - 1)
    return b, i, x, y, rows, left, right, share


@triton.jit
def _means(
    above, step, Weight, chunk, C: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """Sums of both over a chunk of classes, weighted, for the label smoothing."""
    classes, counted = classes_of(chunk, C, 1, VEC, G)
    factor = counted.to(tl.float32)
    if WEIGHT:
        factor = tl.load(Weight + classes, mask=counted, other=0.0).to(tl.float32)
    return tl.sum(above * factor, 1), tl.sum(step * factor, 1)


@triton.jit
def forward_kernel(
    Logits,  # B x h x w x C, dense
    Target,  # B x H x W, uint8 or int64
    Weight,  # C, the class weights m; read with WEIGHT
    Mean,  # 1, their mean; read with WEIGHT and SMOOTH
    Lse,  # B x H x W, float32; written with LSE
    Loss,  # B x H x W, float32; written with MAP
    P,  # 3 x programs, float32: sums of losses, of label weights, and of labels not allowed
    h,  # low rows
    w,  # low columns
    H,  # output rows
    W,  # output columns
    parts,  # programs that share the output rows behind one low row
    strips,  # programs that share a row of output
    ignore,  # the label of ignored pixels
    smoothing,  # e, the share of a label that is spread over all classes
    C: tl.constexpr,  # classes
    ALIGN: tl.constexpr,  # corners of both maps coincide
    R: tl.constexpr,  # output rows of a program
    BX: tl.constexpr,  # output columns of a program
    VEC: tl.constexpr,  # classes side by side that one load reads
    G: tl.constexpr,  # such loads in a chunk of VEC G classes
    WEIGHT: tl.constexpr,  # there are class weights
    SMOOTH: tl.constexpr,  # smoothing is above 0
    LSE: tl.constexpr,  # write Lse
    MAP: tl.constexpr,  # write Loss
):
    """lse and loss of each pixel; P: sums of losses, of label weights, and of labels not allowed.

    `smoothing` is e; Mean is that of the class weights m.
    """
    b, i, x, y, rows, left, right, share = _own_pixels(h, w, H, W, parts, strips, R, BX, ALIGN)
    image, labels = Logits + b * h * w * C, b * H * W

    totals = ()
    for _r in tl.static_range(R):
        totals = totals + (tl.zeros((BX,), tl.float32),)
    peak = tl.full((BX,), LOWEST, tl.float32)
    steepest = tl.zeros((BX,), tl.float32)
    mean = tl.zeros((BX,), tl.float32)
    mean_step = tl.zeros((BX,), tl.float32)
    first, onward = row_share(y, i, h, H, ALIGN), share_between_rows(h, H, ALIGN)
    chunks = tl.where(rows > 0, tl.cdiv(C, VEC * G), 0)
    for chunk in range(chunks):
        above, step = _chunk(image, i, h, w, left, right, share, chunk, C, VEC, G)
        if SMOOTH:
            added, added_step = _means(above, step, Weight, chunk, C, VEC, G, WEIGHT)
            mean += added
            mean_step += added_step
        steepest = tl.maximum(steepest, tl.max(tl.abs(step), 1))
        # That of the upper low row: the largest value of any row is at most STEEPEST away from it.
        new_peak = tl.maximum(peak, tl.max(above, 1))
        factor = tl.exp2(peak - new_peak)
        # Rows are evenly spaced, so the exponential of a class grows by one factor from row to row.
        power = tl.exp2(above - new_peak[:, None] + first * step)
        ratio = tl.exp2(onward * step) if R > 1 else power
        new_totals = ()
        for r in tl.static_range(R):
            total = totals[r] * factor
            # Most programs have all their rows, or all but the last.
            if r < R - 1 or r < rows:
                if r > 0:
                    power *= ratio
                total += tl.sum(power, 1)
            new_totals = new_totals + (total,)
        totals, peak = new_totals, new_peak

    loss_sum = tl.zeros((BX,), tl.float32)
    rate_sum = tl.zeros((BX,), tl.float32)
    wrong_sum = tl.zeros((BX,), tl.float32)
    at = labels + tl.cast(y, tl.int64) * W + x
    if tl.max(steepest) > STEEPEST:
        # One exponential per value, about a maximum for each pixel.
        for row in range(rows):
            down = row_share(y + row, i, h, H, ALIGN)
            lse2 = _exact_lse(image, i, h, w, left, right, share, down, C, VEC, G)
            loss, rate, wrong = _finish_row(
                image, Target, Weight, Mean, Lse, Loss, lse2, mean + down * mean_step,
                at + row * W, x < W, i, down, left, right, share, w, h, ignore, smoothing, C,
                WEIGHT, SMOOTH, LSE, MAP,
            )  # fmt: skip
            loss_sum += loss
            rate_sum += rate
            wrong_sum += wrong
    else:
        for r in tl.static_range(R):
            if r < rows:
                down = row_share(y + r, i, h, H, ALIGN)
                loss, rate, wrong = _finish_row(
                    image, Target, Weight, Mean, Lse, Loss, peak + tl.log2(totals[r]),
                    mean + down * mean_step, at + r * W, x < W, i, down, left, right, share, w, h,
                    ignore, smoothing, C, WEIGHT, SMOOTH, LSE, MAP,
                )  # fmt: skip
                loss_sum += loss
                rate_sum += rate
                wrong_sum += wrong
    programs = tl.num_programs(0)
    tl.store(P + tl.program_id(0), tl.sum(loss_sum, 0))
    tl.store(P + programs + tl.program_id(0), tl.sum(rate_sum, 0))
    tl.store(P + 2 * programs + tl.program_id(0), tl.sum(wrong_sum, 0))


@triton.jit(debug=True)  # for its assertion
def finish_kernel(
    P,  # 3 x programs, float32: see forward_kernel
    Total,  # a scalar, float32: the sum of the losses, or with MEAN their mean
    Rates,  # a scalar, float64: the sum of the label weights
    programs,  # of forward_kernel
    BN: tl.constexpr,  # entries read at once
    MEAN: tl.constexpr,  # divide the sum by Rates, unless that is 0
):
    """Total and Rates: the sums of P over the programs; fails where a label is wrong."""
    n = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float64)
    rates = tl.zeros((BN,), tl.float64)
    wrong = tl.zeros((BN,), tl.float32)
    for begin in range(0, programs, BN):
        at = P + begin + n
        mask = begin + n < programs
        total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        rates += tl.load(at + programs, mask=mask, other=0.0).to(tl.float64)
        wrong += tl.load(at + 2 * programs, mask=mask, other=0.0)
    tl.device_assert(
        tl.sum(wrong, 0) == 0.0,
        "upsample_cross_entropy: target holds a label that is neither a class nor ignore_index",
    )
    loss, rate = tl.sum(total, 0), tl.sum(rates, 0)
    if MEAN:
        loss = loss / tl.where(rate > 0.0, rate, 1.0)
    tl.store(Total, loss.to(tl.float32))
    tl.store(Rates, rate)


@triton.jit
def argmax_kernel(
    Logits,  # B x h x w x C, dense
    Labels,  # B x H x W, uint8 or int64
    Probs,  # B x H x W, float32; written with PROB
    h,  # low rows
    w,  # low columns
    H,  # output rows
    W,  # output columns
    parts,  # programs that share the output rows behind one low row
    strips,  # programs that share a row of output
    C: tl.constexpr,  # classes
    ALIGN: tl.constexpr,  # corners of both maps coincide
    R: tl.constexpr,  # output rows of a program
    BX: tl.constexpr,  # output columns of a program
    L: tl.constexpr,  # threads (lanes) that share a pixel
    VEC: tl.constexpr,  # classes side by side that one load reads
    G: tl.constexpr,  # such loads of a thread in a chunk of L VEC G classes
    PROB: tl.constexpr,  # write Probs
):
    """The class of the largest value of each pixel, the first of equals, and its probability."""
    b, i, x, y, rows, left, right, share = _own_pixels(h, w, H, W, parts, strips, R, BX, ALIGN)
    image = Logits + b * h * w * C
    peaks, totals, found = (), (), ()
    for _r in tl.static_range(R):
        peaks = peaks + (tl.full((BX, L), LOWEST, tl.float32),)
        totals = totals + (tl.zeros((BX, L), tl.float32),)
        found = found + (tl.full((BX, L), C, tl.int32),)
    chunks = tl.where(rows > 0, tl.cdiv(C, L * VEC * G), 0)
    for chunk in range(chunks):
        above, step = two_rows(image, i, h, w, left, right, share, chunk, C, L, VEC, G)
        classes = classes_of(chunk, C, L, VEC, G)[0][None, :, :]
        new_peaks, new_totals, new_found = (), (), ()
        for r in tl.static_range(R):
            values = above + row_share(y + r, i, h, H, ALIGN) * step
            best = tl.max(values, 2)
            number = tl.min(tl.where(values == best[:, :, None], classes, C), 2)
            new_found = new_found + (tl.where(best > peaks[r], number, found[r]),)
            peak = tl.maximum(peaks[r], best)
            if PROB:
                scaled = totals[r] * tl.exp2(peaks[r] - peak)
                scaled += tl.sum(tl.exp2(values - peak[:, :, None]), 2)
                new_totals = new_totals + (scaled,)
            new_peaks = new_peaks + (peak,)
        peaks, found = new_peaks, new_found
        if PROB:
            totals = new_totals
    for r in tl.static_range(R):
        at, inside = b * H * W + tl.cast(y + r, tl.int64) * W + x, (x < W) & (r < rows)
        peak = tl.max(peaks[r], 1)
        label = tl.min(tl.where(peaks[r] == peak[:, None], found[r], C), 1)
        tl.store(Labels + at, label.to(Labels.dtype.element_ty), mask=inside)
        if PROB:
            total = tl.sum(totals[r] * tl.exp2(peaks[r] - peak[:, None]), 1)
            tl.store(Probs + at, 1.0 / total, mask=inside)
