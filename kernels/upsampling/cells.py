"""Triton kernel of `upsample_cross_entropy`, backward, for logits of 16 bits; plan.py launches it.

A cell is what lies between two low rows and two low columns. A warp has one, and a thread of it one
class in 32. In a cell a logit is bilinear, so its exponential grows by one factor from row to row,
which itself grows by one factor from column to column. The sums over rows and columns that the four
low pixels need are polynomials in these factors, with coefficients that all classes share, one for
each pixel.

A program walks down the rows with a strip of cells. What a cell adds to its lower low pixels waits
in registers for the next cell; what it adds to the right ones moves to the next warp. There are no
atomics: each program writes the gradients of its own low pixels, and visits all cells around them.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy keeps the type of the empty one.
# mypy: disable-error-code="assignment, misc"
import triton
import triton.language as tl

from .interpolation import (
    LOG2_E,
    STEEPEST,
    denominator,
    first_after,
    first_gap,
    numerator,
    row_share,
    share_between_rows,
    spacing,
)

LANES = tl.constexpr(32)  # classes side by side
# Labels of a column of pixels are counted in fields of 6 bits, those of a cell in 12.
FIELD = tl.constexpr(6)
FIELDS = tl.constexpr(0x3F03F03F)


@triton.jit
def _of_place(tile, place):
    """What lane `place` holds, in all lanes."""
    return tl.gather(tile, tl.zeros(tile.shape, tl.int32) + place, 1)


@triton.jit
def _corners(image, i, h, w, left, right, classes, C: tl.constexpr, PARTS: tl.constexpr):
    """Logits of low row i left and right of each cell; a tuple of the classes of each part."""
    row = image + tl.maximum(tl.minimum(i, h - 1), 0) * (w * C)
    on_left, on_right = row + (left * C + classes), row + (right * C + classes)
    lefts, rights = (), ()
    for k in tl.static_range(PARTS):
        mask = classes + k * LANES < C
        lefts = lefts + (tl.load(on_left + k * LANES, mask=mask, other=0.0),)
        rights = rights + (tl.load(on_right + k * LANES, mask=mask, other=0.0),)
    return lefts, rights


@triton.jit
def _pixels(Lse, Target, at, W, rows, columns, lane, R: tl.constexpr, Q: tl.constexpr):
    """Log-sum-exps and labels of a cell's pixels, infinite where there is none.

    A lane has a pixel of each tile of 32 // Q rows of Q columns; the last lanes repeat others.
    """
    STEP: tl.constexpr = LANES // Q
    at += lane // Q * W + lane % Q
    lses, labels = (), ()
    for t in tl.static_range((R + STEP - 1) // STEP):
        mask = (t * STEP + lane // Q < rows) & (lane % Q < columns)
        lses = lses + (tl.load(Lse + (at + t * STEP * W), mask=mask, other=float("inf")),)
        label = tl.load(Target + (at + t * STEP * W), mask=mask, other=0)
        labels = labels + (label.to(tl.int32),)
    return lses, labels


@triton.jit
def _labels(pixels, first_class, PARTS: tl.constexpr):
    """Of the labels of `_pixels`: lanes of their classes, and 1 in the field of the part.

    0 in place of the 1 where a pixel does not count, or not for a class of this program.
    """
    lanes, ones = (), ()
    for t in tl.static_range(len(pixels[0])):
        label = pixels[1][t] - first_class
        counts = (pixels[0][t] != float("inf")) & (label.to(tl.uint32) < PARTS * LANES)
        lanes = lanes + (label & (LANES - 1),)
        ones = ones + (tl.where(counts, 1 << (label >> 5) * FIELD, 0),)
    return lanes, ones


@triton.jit
def _over_columns(
    weights, lanes, ones, alongs, downs, twists, bases,
    R: tl.constexpr, Q: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums over a cell's pixels, of four for each class, and the counts of labels.

    Alone, times the column, times the row, times both, counted from 1.
    """
    lane = tl.arange(0, LANES)[None, :]
    STEP: tl.constexpr = LANES // Q
    zero = tl.zeros_like(weights[0])
    none = tl.zeros_like(lanes[0])
    sums = ()
    for _k in tl.static_range(len(bases)):
        sums = sums + (zero, zero, zero, zero)
    counts = (none, none, none, none, none, none, none, none)
    for n in range(Q):
        q = Q - 1 - n
        shares = ()
        for r in tl.static_range(R):
            shares = shares + (_of_place(weights[r // STEP], (r - r // STEP * STEP) * Q + q),)
        number, place = none, none
        for r in tl.static_range(R - 1, -1, -1):
            at = (r - r // STEP * STEP) * Q + q
            own = _of_place(lanes[r // STEP], at) == lane
            number += tl.where(own, _of_place(ones[r // STEP], at), 0)
            place += number
        new_sums, new_downs = (), ()
        for k in tl.static_range(len(bases)):
            if EXACT:
                plain, lowered = zero, zero
                value, growth = bases[k] + q * alongs[k], downs[k] + q * twists[k]
                for r in tl.static_range(R):
                    power = tl.exp2(value + r * growth - shares[r])
                    plain += power
                    lowered += (r + 1) * power
                factor = 1.0
            else:
                plain, lowered = shares[R - 1], shares[R - 1]
                for r in tl.static_range(R - 2, -1, -1):
                    plain = plain * downs[k] + shares[r]
                    lowered = lowered * downs[k] + plain
                factor = alongs[k]
            alone = sums[4 * k] * factor + plain
            lower = sums[4 * k + 2] * factor + lowered
            new_sums = new_sums + (
                alone, sums[4 * k + 1] * factor + alone,
                lower, sums[4 * k + 3] * factor + lower,
            )  # fmt: skip
            new_downs = new_downs + (downs[k] if EXACT else downs[k] * twists[k],)
        sums, downs = new_sums, new_downs
        parts = (number & FIELDS, (number >> FIELD) & FIELDS)
        parts = parts + (place & FIELDS, (place >> FIELD) & FIELDS)
        new_counts = ()
        for k in tl.static_range(4):
            count = counts[2 * k] + parts[k]
            new_counts = new_counts + (count, counts[2 * k + 1] + count)
        counts = new_counts
    return sums, counts


@triton.jit
def _cell(
    above, below, pixels, rows, first, onward, across, between, first_class,
    PARTS: tl.constexpr, R: tl.constexpr, MOSTLY: tl.constexpr, Q: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """`_over_columns` of a cell, factors of each class's sums, and the largest difference.

    Rows and columns, counted from 1, lie at first + (row - 1) onward and across +
    (column - 1) between of the way to the next low ones.
    """
    least = pixels[0][0]
    for t in tl.static_range(1, len(pixels[0])):
        least = tl.minimum(least, pixels[0][t])
    # Finite where all pixels are ignored.
    least = (tl.minimum(tl.min(least, 1), 1e30) * LOG2_E)[:, None]
    weights = ()
    for t in tl.static_range(len(pixels[0])):
        weight = pixels[0][t] * LOG2_E
        weights = weights + (weight if EXACT else tl.exp2(least - weight),)

    steepest = tl.zeros_like(weights[0])
    bases, alongs, downs, twists = (), (), (), ()
    for k in tl.static_range(PARTS):
        top, top_right = above[0][k].to(tl.float32), above[1][k].to(tl.float32)
        low, low_right = below[0][k].to(tl.float32), below[1][k].to(tl.float32)
        along, down, down_right = top_right - top, low - top, low_right - top_right
        steepest = tl.maximum(steepest, tl.abs(along))
        steepest = tl.maximum(tl.maximum(steepest, tl.abs(down)), tl.abs(down_right))
        twist = down_right - down
        along += first * twist
        base = top + first * down + across * along
        down = (down + across * twist) * (onward * LOG2_E)
        along *= between * LOG2_E
        twist *= onward * between * LOG2_E
        if EXACT:
            base = base * LOG2_E
        else:
            base = tl.exp2(base * LOG2_E - least)
            down = tl.exp2(down + (Q - 1) * twist)
            twist = tl.exp2(-twist)
            along = tl.exp2(along)
        bases, alongs = bases + (base,), alongs + (along,)
        downs, twists = downs + (down,), twists + (twist,)

    lanes, ones = _labels(pixels, first_class, PARTS)
    factors = bases
    if EXACT:
        factors = ()
        for _k in tl.static_range(PARTS):
            factors = factors + (tl.full(steepest.shape, 1.0, tl.float32),)
    if MOSTLY < R and not EXACT:
        if rows > MOSTLY:
            sums, counts = _over_columns(
                weights, lanes, ones, alongs, downs, twists, bases, R, Q, EXACT
            )
        else:
            sums, counts = _over_columns(
                weights, lanes, ones, alongs, downs, twists, bases, MOSTLY, Q, EXACT
            )
    else:
        sums, counts = _over_columns(
            weights, lanes, ones, alongs, downs, twists, bases, R, Q, EXACT
        )
    return sums, counts, factors, steepest


@triton.jit
def _shared_out(
    sums, counts, bases, kept, across, between, first, onward, scale, PARTS: tl.constexpr
):
    """A cell's sums, less the labels, as gradients of its four low pixels.

    A tuple of those of the upper left and upper right ones, complete with what was `kept` from the
    cell above, by parts; and of the lower two, to be kept.
    """
    by_row = onward * scale
    down = first * scale - by_row
    up = scale - down
    uppers, lowers = (), ()
    for k in tl.static_range(PARTS):
        shares = ()
        for s in tl.static_range(4):
            # Alone, times the column, the row, both; of even parts, and of odd ones.
            word = counts[s // 2 * 4 + k % 2 * 2 + s % 2].to(tl.uint32)
            count = ((word >> (k // 2 * 2 * FIELD)) & 4095).to(tl.float32)
            shares = shares + (sums[4 * k + s] * bases[k] - count,)
        # From sums over columns to shares of the low columns, then the same for the rows.
        on_right = (across - between) * shares[0] + between * shares[1]
        on_left = shares[0] - on_right
        low_right = (across - between) * shares[2] + between * shares[3]
        low_left = shares[2] - low_right
        upper_left = kept[2 * k] + up * on_left - by_row * low_left
        upper_right = kept[2 * k + 1] + up * on_right - by_row * low_right
        low_left = down * on_left + by_row * low_left
        low_right = down * on_right + by_row * low_right
        uppers = uppers + (upper_left, upper_right)
        lowers = lowers + (low_left, low_right)
    return uppers, lowers


@triton.jit
def _patch(
    image, Lse, Target, dImage, Moved, scale, h, w, H, W, first_row, end_row, j, end_column,
    lane, first_class, exact, C: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    R: tl.constexpr, MOSTLY: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The gradients of a program's low pixels; returns the largest difference in a cell.

    `exact`: with an exponential for each value.
    """
    CELLS: tl.constexpr = j.shape[0]
    classes = first_class + lane
    left = tl.maximum(tl.minimum(j, w - 1), 0)[:, None]
    right = tl.maximum(tl.minimum(j + 1, w - 1), 0)[:, None]
    x = first_after(j, w, W, ALIGN)
    columns = (first_after(j + 1, w, W, ALIGN) - x)[:, None]
    across = numerator(tl.minimum(x, W - 1), w, W, ALIGN) - j * denominator(W, ALIGN)
    across = (across.to(tl.float32) * (1.0 / denominator(W, ALIGN)))[:, None]
    between = tl.where((j >= 0) & (j + 1 < w), share_between_rows(w, W, ALIGN), 0.0)[:, None]
    cell = tl.arange(0, CELLS)[:, None]
    stored = (cell > 0) & (j < end_column)[:, None]
    moved_at = cell * (PARTS * LANES) + lane
    x = x[:, None]

    begin = tl.maximum(first_row - 1, first_gap(ALIGN))
    y = first_after(begin, h, H, ALIGN)
    end = first_after(begin + 1, h, H, ALIGN)
    # first_after(i + 2) without a division for each i.
    number, per = spacing(h, H, ALIGN)
    ahead = (begin + 2) * number + (h - 2 if ALIGN else H + h - 1)
    rest = ahead % per
    ahead = ahead // per
    steepest = tl.zeros((CELLS, LANES), tl.float32)
    kept = ()
    for _k in tl.static_range(2 * PARTS):
        kept = kept + (tl.zeros((CELLS, LANES), tl.float32),)
    above = _corners(image, begin, h, w, left, right, classes, C, PARTS)
    below = _corners(image, begin + 1, h, w, left, right, classes, C, PARTS)
    pixels = _pixels(Lse, Target, y * W + x, W, end - y, columns, lane, R, Q)
    for i in range(begin, end_row):
        first = row_share(y, i, h, H, ALIGN)
        onward = tl.where((i >= 0) & (i + 1 < h), share_between_rows(h, H, ALIGN), 0.0)
        if exact:
            sums, counts, bases, steep = _cell(
                above, below, pixels, end - y, first, onward, across, between, first_class,
                PARTS, R, MOSTLY, Q, True,
            )  # fmt: skip
        else:
            sums, counts, bases, steep = _cell(
                above, below, pixels, end - y, first, onward, across, between, first_class,
                PARTS, R, MOSTLY, Q, False,
            )  # fmt: skip
        steepest = tl.maximum(steepest, steep)
        # Those of the next cell, read early because memory is far away.
        y = end
        end = tl.where(i + 2 < h, ahead, H)
        rest += number % per
        carry = rest >= per
        ahead += number // per + tl.where(carry, 1, 0)
        rest -= tl.where(carry, per, 0)
        # Both rows again: kept until here, the upper one would need registers that are not there.
        above = _corners(image, i + 1, h, w, left, right, classes, C, PARTS)
        below = _corners(image, i + 2, h, w, left, right, classes, C, PARTS)
        pixels = _pixels(Lse, Target, y * W + x, W, end - y, columns, lane, R, Q)

        uppers, kept = _shared_out(
            sums, counts, bases, kept, across, between, first, onward, scale, PARTS
        )
        # The other half, because a warp may still read what this one wrote the last time.
        moved = Moved + (i & 1) * (CELLS * PARTS * LANES) + moved_at
        for k in tl.static_range(PARTS):
            tl.store(moved + k * LANES, uppers[2 * k + 1])
        tl.debug_barrier()
        to = dImage + i * (w * C) + (left * C + classes)
        for k in tl.static_range(PARTS):
            before = tl.load(moved + (k - PARTS) * LANES, mask=cell > 0, other=0.0)
            total = uppers[2 * k] + before
            mask = stored & (i >= first_row) & (classes + k * LANES < C)
            tl.store(to + k * LANES, total.to(dImage.dtype.element_ty), mask=mask)
    return tl.max(steepest)


@triton.jit
def cells_kernel(
    Logits,  # B x h x w x C, dense
    Target,  # B x H x W, uint8 or int64
    Lse,  # B x H x W, float32, infinite where ignored
    Grad,  # a scalar, of the sum of the losses or their mean
    Rates,  # a scalar, float64, what the mean divides by unless it is 0; read with MEAN
    dLogits,  # B x h x w x C, dense
    Moved,  # programs x 2 x CELLS x 32 PARTS, float32, memory in which warps meet
    h,  # low rows
    w,  # low columns
    H,  # output rows
    W,  # output columns
    own_rows,  # low rows whose gradients a program writes
    segments,  # programs that share the low rows
    strips,  # programs that share the low columns
    C: tl.constexpr,  # classes
    ALIGN: tl.constexpr,  # corners of both maps coincide
    CELLS: tl.constexpr,  # cells side by side, one more than the low columns of a program
    PARTS: tl.constexpr,  # a program has 32 PARTS classes
    R: tl.constexpr,  # most rows of output between two low rows
    MOSTLY: tl.constexpr,  # R, or R - 1 where most have fewer
    Q: tl.constexpr,  # and columns between two low columns
    MEAN: tl.constexpr,  # Grad is that of the mean
):
    """dLogits of a program's own low rows and columns, for one chunk of classes."""
    chunks: tl.constexpr = (C + PARTS * 32 - 1) // (PARTS * 32)
    steepest, again = 0.0, True
    while again:
        # 0, but the compiler does not know it. Else it computes what both attempts begin with once,
        # and keeps it in registers that are not there.
        nothing = tl.where(steepest < 0.0, 1, 0)
        program = tl.program_id(0) + nothing
        exact = steepest > 0.0
        chunk, place = program % chunks, program // chunks
        strip, segment = place % strips, place // strips % segments
        b = (place // strips // segments).to(tl.int64)
        moved = Moved + program.to(tl.int64) * (2 * CELLS * PARTS * 32)
        first_row = segment * own_rows
        scale = tl.load(Grad)
        if MEAN:
            rates = tl.load(Rates)
            scale /= tl.where(rates > 0.0, rates, 1.0).to(tl.float32)
        steepest = _patch(
            Logits + b * h * w * C, Lse + b * H * W, Target + b * H * W, dLogits + b * h * w * C,
            moved, scale.to(tl.float32), h + nothing, w + nothing, H + nothing, W + nothing,
            first_row, tl.minimum(first_row + own_rows, h),
            strip * (CELLS - 1) - 1 + tl.arange(0, CELLS), tl.minimum((strip + 1) * (CELLS - 1), w),
            nothing + tl.arange(0, LANES)[None, :], chunk * PARTS * 32, exact,
            C, ALIGN, PARTS, R, MOSTLY, Q,
        )  # fmt: skip
        # Three sides of each cell are compared. Corners then differ by at most 2^92, and what is
        # lost because an exponential or a weight is below 2^-126 is at most 2^-34 of a pixel.
        again = (steepest * LOG2_E * 1.5 > STEEPEST) & (exact == 0)
