"""Triton kernels of `upsample_cross_entropy` and `upsample_argmax`.

upsample_triton.py launches them.

Letters as in upsample_loss.py. Logits are channels last: Logits[b, y, x, c], dense. All sums are in
float32 and no product of matrices stands between a logit and its upsampled value, so the values are
those of interpolation in float32, whatever the dtype of the logits.

Bilinear interpolation goes first along the columns and then along the rows. A thread has a column
of output pixels to itself, and some classes. Upsampling by 8, eight rows of output lie between
two low rows; so the columns are interpolated once for many output rows, and a further
row costs a multiplication or two a value. What the loss needs of a value is in registers.

Forward: a program has R rows of output, which lie between at most three low rows, and walks the
classes in chunks with a running maximum and sum of exponentials a pixel. Between threads that share
a pixel these are joined once, at the end.

Backward: a program owns low rows and columns of a chunk of classes, and visits all output pixels
that touch them, also those that its neighbours visit too. It walks down the rows with two sums a
column and class: of the gradient that goes to the low row above the pixels and to that below. When
it passes a low row, the sums of the row above are complete, and one product of matrices sums them
over columns into the gradient of the low pixels. Each is written once, by one program.

Values are kept times log2 e, for exp2 is what the hardware computes.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy takes the empty one's type for good.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Below every logit; finite, because the difference of two infinities is not a number.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _numerator(place, low, high, ALIGN: tl.constexpr):
    """Where an output row or column lies between the low ones, times `_denominator`."""
    if ALIGN:
        number = place * (low - 1)
    else:
        number = tl.minimum(tl.maximum((2 * place + 1) * low - high, 0), (low - 1) * 2 * high)
    return number


@triton.jit
def _denominator(high, ALIGN: tl.constexpr):
    return tl.maximum(high - 1, 1) if ALIGN else 2 * high


@triton.jit
def _between(place, low, high, ALIGN: tl.constexpr):
    """The low row or column before each place, and the share of the next one."""
    number, whole = _numerator(place, low, high, ALIGN), _denominator(high, ALIGN)
    before = number // whole
    return before, (number - before * whole).to(tl.float32) * (1.0 / whole)


@triton.jit
def _spacing(low, high, ALIGN: tl.constexpr):
    """Numerator and denominator of the output rows or columns between two low ones."""
    if ALIGN:
        number, whole = tl.maximum(high - 1, 1), tl.maximum(low - 1, 1)
    else:
        number, whole = 2 * high, 2 * low
    return number, whole


@triton.jit
def _first_after(index, low, high, ALIGN: tl.constexpr):
    """The first output row or column that does not lie before low row or column `index`."""
    number, whole = _spacing(low, high, ALIGN)
    first = (index * number + (low - 2 if ALIGN else high + low - 1)) // whole
    return tl.where(index <= 0, 0, tl.where(index >= low, high, first))


@triton.jit
def _load_classes(
    pixels, words, LIMIT: tl.constexpr, first: tl.constexpr, step: tl.constexpr, G: tl.constexpr,
    EVEN: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Logits of G groups of classes, `step` words apart, in float32: columns x lanes x VEC G.

    One load a group: as many classes side by side as C allows to be read at once. Groups run
    fastest, so that joining them moves nothing between registers. A word is PACK logits.
    """
    if G == 1:
        at = words[None, :, :] + first
        if EVEN:
            values = tl.load(pixels[:, None, None] + at)
        else:
            values = tl.load(pixels[:, None, None] + at, mask=at < LIMIT, other=0)
        if PACK == 2:
            # A bfloat16 is the upper half of a float32: one operation each.
            low = (values << 16).to(tl.float32, bitcast=True)
            values = tl.join(low, (values & -65536).to(tl.float32, bitcast=True))
            values = tl.reshape(values, (values.shape[0], values.shape[1], 2 * values.shape[2]))
        else:
            values = values.to(tl.float32)
    else:
        half: tl.constexpr = G // 2
        even = _load_classes(pixels, words, LIMIT, first, 2 * step, half, EVEN, PACK)
        odd = _load_classes(pixels, words, LIMIT, first + step, 2 * step, half, EVEN, PACK)
        pair = tl.join(even, odd)
        values = tl.reshape(pair, (pair.shape[0], pair.shape[1], 2 * pair.shape[2]))
    return values


@triton.jit
def _first_class(chunk, C: tl.constexpr, CHUNK: tl.constexpr):
    """The last chunk begins early where it would end late: then no load needs a mask."""
    return tl.minimum(chunk * CHUNK, C - CHUNK) if C >= CHUNK else chunk * CHUNK


@triton.jit
def _classes(chunk, C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr):
    """The classes of a chunk as they lie in registers, L x VEC G, and which are not another's."""
    s = tl.arange(0, VEC * G)
    own = s % G * (L * VEC) + s // G
    classes = (tl.arange(0, L) * VEC)[:, None] + own[None, :]
    classes += _first_class(chunk, C, L * VEC * G)
    return classes, (classes >= chunk * (L * VEC * G)) & (classes < C)


@triton.jit
def _widen(
    row, left, right, share, chunk,
    C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """A chunk of classes of a low row interpolated along its columns, times log2 e.

    Columns x L x VEC G; `_classes` says which.
    """
    CHUNK: tl.constexpr = L * VEC * G
    EVEN: tl.constexpr = C >= CHUNK
    BF16: tl.constexpr = row.dtype.element_ty == tl.bfloat16
    PACK: tl.constexpr = 2 if BF16 and VEC > 1 else 1
    WORDS: tl.constexpr = VEC // PACK
    PIXEL: tl.constexpr = C // PACK
    if PACK == 2:
        row = row.to(tl.pointer_type(tl.int32))
    words = (tl.arange(0, L) * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    words += _first_class(chunk, PIXEL, CHUNK // PACK)
    weight = (share * _LOG2_E)[:, None, None]
    other = ((1.0 - share) * _LOG2_E)[:, None, None]
    step: tl.constexpr = L * WORDS
    wide = other * _load_classes(row + left * PIXEL, words, PIXEL, 0, step, G, EVEN, PACK)
    return wide + weight * _load_classes(row + right * PIXEL, words, PIXEL, 0, step, G, EVEN, PACK)


@triton.jit
def _two_rows(
    image, i, h, w, left, right, share, chunk,
    C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Low row i made wide, and what the next one has more; far below 0 where not to be counted."""
    above = image + i * (w * C)
    above = _widen(above, left, right, share, chunk, C, L, VEC, G)
    step = image + tl.minimum(i + 1, h - 1) * (w * C)
    step = _widen(step, left, right, share, chunk, C, L, VEC, G) - above
    if C % (L * VEC * G) != 0:
        above = tl.where(_classes(chunk, C, L, VEC, G)[1][None, :, :], above, _LOWEST)
    return above, step


@triton.jit
def _down(y, i, h, H, ALIGN: tl.constexpr):
    """How far output row y lies below low row i, as a share of the way to the next."""
    whole = _denominator(H, ALIGN)
    number = _numerator(tl.minimum(y, H - 1), h, H, ALIGN) - i * whole
    return tl.cast(number, tl.float32) * (1.0 / whole)


@triton.jit
def _logits_of_labels(image, label, valid, i, down, left, right, share, w, h, C: tl.constexpr):
    """The upsampled logit of each pixel's label, from its four low pixels."""
    above = image + i * (w * C)
    below = image + tl.minimum(i + 1, h - 1) * (w * C)
    at_left, at_right = left * C + label, right * C + label
    value = (1.0 - down) * tl.load(above + at_left, mask=valid, other=0.0).to(tl.float32)
    value += down * tl.load(below + at_left, mask=valid, other=0.0).to(tl.float32)
    other = (1.0 - down) * tl.load(above + at_right, mask=valid, other=0.0).to(tl.float32)
    other += down * tl.load(below + at_right, mask=valid, other=0.0).to(tl.float32)
    return value + share * (other - value)


@triton.jit
def _rate(Weight, label, valid, WEIGHT: tl.constexpr):
    """m_t, 0 where no label counts."""
    if WEIGHT:
        rate = tl.load(Weight + label, mask=valid, other=0.0).to(tl.float32)
    else:
        rate = valid.to(tl.float32)
    return rate


@triton.jit
def _mean_weight(Mean, WEIGHT: tl.constexpr):
    return tl.load(Mean).to(tl.float32) if WEIGHT else 1.0


@triton.jit
def _exact_lse(
    image, i, h, w, left, right, share, down,
    C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of exponentials of a row of output, about each pixel's own maximum."""
    peak = tl.full((left.shape[0], L), _LOWEST, tl.float32)
    total = tl.zeros((left.shape[0], L), tl.float32)
    for chunk in range(tl.cdiv(C, L * VEC * G)):
        above, step = _two_rows(image, i, h, w, left, right, share, chunk, C, L, VEC, G)
        values = above + down * step
        new_peak = tl.maximum(peak, tl.max(values, 2))
        total = total * tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(values - new_peak[:, :, None]), 2)
        peak = new_peak
    return _join_lanes(peak, total)


@triton.jit
def _join_lanes(peak, total):
    """The sum over the threads of a pixel, of which each has its own reference."""
    highest = tl.max(peak, 1)
    return highest + tl.log2(tl.sum(total * tl.exp2(peak - highest[:, None]), 1))


@triton.jit
def _finish_row(
    image, Target, Weight, Mean, Lse, Loss, lse2, average, at, inside, i, down, left, right, share,
    w, h, ignore, smoothing, C: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    LSE: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Stores lse and loss of a row; the losses, the weights of their labels, and what is wrong."""
    lse = lse2 * _LN_2
    label = tl.load(Target + at, mask=inside, other=0)
    labelled = inside & (label != ignore)
    if LSE:
        # An ignored pixel then has no probabilities and needs no care backward.
        tl.store(Lse + at, tl.where(labelled, lse, float("inf")), mask=inside)
    valid = labelled & (label >= 0) & (label < C)
    wrong = (labelled & (valid == 0)).to(tl.float32)
    label = label.to(tl.int32)
    value = _logits_of_labels(image, label, valid, i, down, left, right, share, w, h, C)
    rate = _rate(Weight, label, valid, WEIGHT)
    loss = tl.where(valid, rate * (lse - value), 0.0)
    if SMOOTH:
        spread = _mean_weight(Mean, WEIGHT) * lse - average * (_LN_2 / C)
        loss = (1.0 - smoothing) * loss + smoothing * tl.where(valid, spread, 0.0)
    if MAP:
        tl.store(Loss + at, loss, mask=inside)
    return loss, rate, wrong


@triton.jit
def forward_kernel(
    Logits, Target, Weight, Mean, Lse, Loss, P, h, w, H, W, parts, strips, ignore, smoothing,
    C: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, BX: tl.constexpr,
    L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr, WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr, LSE: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """lse and loss of each pixel; P: sums of losses, of label weights, and of labels not allowed.

    `smoothing` is e; Mean is that of the class weights m.
    """
    strip, part = tl.program_id(0) % strips, tl.program_id(0) // strips % parts
    i = tl.program_id(0) // strips // parts % h
    b = (tl.program_id(0) // strips // parts // h).to(tl.int64)
    image, labels = Logits + b * h * w * C, b * H * W
    x, y = strip * BX + tl.arange(0, BX), _first_after(i, h, H, ALIGN) + part * R
    rows = tl.minimum(_first_after(i + 1, h, H, ALIGN) - y, R)
    left, share = _between(tl.minimum(x, W - 1), w, W, ALIGN)
    right = tl.minimum(left + 1, w - 1)

    totals = ()
    for _r in tl.static_range(R):
        totals = totals + (tl.zeros((BX, L), tl.float32),)
    peak = tl.full((BX, L), _LOWEST, tl.float32)
    mean = tl.zeros((BX, L), tl.float32)
    mean_step = tl.zeros((BX, L), tl.float32)
    chunks = tl.where(rows > 0, tl.cdiv(C, L * VEC * G), 0)
    for chunk in range(chunks):
        above, step = _two_rows(image, i, h, w, left, right, share, chunk, C, L, VEC, G)
        if SMOOTH:
            classes, counted = _classes(chunk, C, L, VEC, G)
            factor = counted.to(tl.float32)
            if WEIGHT:
                factor = tl.load(Weight + classes, mask=counted, other=0.0).to(tl.float32)
            mean += tl.sum(above * factor[None, :, :], 2)
            mean_step += tl.sum(step * factor[None, :, :], 2)
        # Between two low rows no value is larger than both ends, so one reference does for all.
        new_peak = tl.maximum(peak, tl.max(tl.maximum(above, above + step), 2))
        factor = tl.exp2(peak - new_peak)
        above -= new_peak[:, :, None]
        new_totals = ()
        for r in tl.static_range(R):
            down = _down(y + r, i, h, H, ALIGN)
            total = totals[r] * factor
            # Most programs have all their rows, or all but the last.
            if r < R - 1 or r < rows:
                total += tl.sum(tl.exp2(above + down * step), 2)
            new_totals = new_totals + (total,)
        totals, peak = new_totals, new_peak

    loss_sum = tl.zeros((BX,), tl.float32)
    rate_sum = tl.zeros((BX,), tl.float32)
    wrong_sum = tl.zeros((BX,), tl.float32)
    least = tl.full((BX,), float("inf"), tl.float32)
    highest = tl.max(peak, 1)
    part_of_highest = tl.exp2(peak - highest[:, None])
    joined = ()
    for r in tl.static_range(R):
        total = tl.where(r < rows, tl.sum(totals[r] * part_of_highest, 1), 1.0)
        least = tl.minimum(least, total)
        joined = joined + (total,)
    at = labels + tl.cast(y, tl.int64) * W + x
    if tl.min(least) < 1e-20:
        # So far below the reference sums lose digits, or all of them.
        for row in range(rows):
            down = _down(y + row, i, h, H, ALIGN)
            lse2 = _exact_lse(image, i, h, w, left, right, share, down, C, L, VEC, G)
            loss, rate, wrong = _finish_row(
                image, Target, Weight, Mean, Lse, Loss, lse2, tl.sum(mean + down * mean_step, 1),
                at + row * W, x < W, i, down, left, right, share, w, h, ignore, smoothing, C,
                WEIGHT, SMOOTH, LSE, MAP,
            )  # fmt: skip
            loss_sum += loss
            rate_sum += rate
            wrong_sum += wrong
    else:
        for r in tl.static_range(R):
            down = _down(y + r, i, h, H, ALIGN)
            loss, rate, wrong = _finish_row(
                image, Target, Weight, Mean, Lse, Loss, highest + tl.log2(joined[r]),
                tl.sum(mean + down * mean_step, 1), at + r * W, (x < W) & (r < rows), i, down,
                left, right, share, w, h, ignore, smoothing, C, WEIGHT, SMOOTH, LSE, MAP,
            )  # fmt: skip
            loss_sum += loss
            rate_sum += rate
            wrong_sum += wrong
    programs = tl.num_programs(0)
    tl.store(P + tl.program_id(0), tl.sum(loss_sum, 0))
    tl.store(P + programs + tl.program_id(0), tl.sum(rate_sum, 0))
    tl.store(P + 2 * programs + tl.program_id(0), tl.sum(wrong_sum, 0))


@triton.jit(debug=True)  # for its assertion
def finish_kernel(P, Total, Rates, programs, BN: tl.constexpr):
    """Total and Rates, float64: the sums of P over the programs; fails where a label is wrong."""
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
    tl.store(Total, tl.sum(total, 0))
    tl.store(Rates, tl.sum(rates, 0))


@triton.jit
def argmax_kernel(
    Logits, Labels, Probs, h, w, H, W, parts, strips, C: tl.constexpr, ALIGN: tl.constexpr,
    R: tl.constexpr, BX: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
    PROB: tl.constexpr,
):  # fmt: skip
    """The class of the largest value of each pixel, the first of equals, and its probability."""
    strip, part = tl.program_id(0) % strips, tl.program_id(0) // strips % parts
    i = tl.program_id(0) // strips // parts % h
    b = (tl.program_id(0) // strips // parts // h).to(tl.int64)
    image = Logits + b * h * w * C
    x, y = strip * BX + tl.arange(0, BX), _first_after(i, h, H, ALIGN) + part * R
    rows = tl.minimum(_first_after(i + 1, h, H, ALIGN) - y, R)
    left, share = _between(tl.minimum(x, W - 1), w, W, ALIGN)
    right = tl.minimum(left + 1, w - 1)
    peaks, totals, found = (), (), ()
    for _r in tl.static_range(R):
        peaks = peaks + (tl.full((BX, L), _LOWEST, tl.float32),)
        totals = totals + (tl.zeros((BX, L), tl.float32),)
        found = found + (tl.full((BX, L), C, tl.int32),)
    chunks = tl.where(rows > 0, tl.cdiv(C, L * VEC * G), 0)
    for chunk in range(chunks):
        above, step = _two_rows(image, i, h, w, left, right, share, chunk, C, L, VEC, G)
        classes = _classes(chunk, C, L, VEC, G)[0][None, :, :]
        new_peaks, new_totals, new_found = (), (), ()
        for r in tl.static_range(R):
            values = above + _down(y + r, i, h, H, ALIGN) * step
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


@triton.jit
def _row_of_classes(
    image, i, h, w, left, right, share, chunk, C: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Low row i of a chunk of classes made wide, columns x VEC G."""
    row = image + tl.minimum(i, h - 1) * (w * C)
    wide = _widen(row, left, right, share, chunk, C, 1, VEC, G)
    return tl.reshape(wide, (wide.shape[0], wide.shape[2]))


@triton.jit
def backward_kernel(
    Logits, Target, Weight, Mean, Lse, Grad, dLogits, h, w, H, W, own_rows, own_columns, segments,
    strips, ignore, smoothing, C: tl.constexpr, ALIGN: tl.constexpr,
    BX: tl.constexpr, BM: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr, WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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

    x = _first_after(first_column - 1, w, W, ALIGN) + tl.arange(0, BX)
    end_x = _first_after(end_column, w, W, ALIGN)
    # Columns beyond the last compute what that one does, and count nowhere.
    in_x, x = x < end_x, tl.minimum(x, end_x - 1)
    left, share = _between(x, w, W, ALIGN)
    right = tl.minimum(left + 1, w - 1)
    # The transpose of the interpolation along columns, BM x BX.
    m = first_column + tl.arange(0, BM)
    to_left = (left[None, :] == m[:, None]).to(tl.float32)
    to_right = (left[None, :] + 1 == m[:, None]).to(tl.float32)
    transposed = to_left * (1.0 - share)[None, :] + to_right * share[None, :]
    transposed = tl.where(in_x[None, :], transposed, 0.0)

    classes, counted = _classes(chunk, C, 1, VEC, G)
    classes, counted = tl.reshape(classes, (BC,)), tl.reshape(counted, (BC,))
    offset = tl.reshape(_classes(0, C, 1, VEC, G)[0], (BC,))
    first_class = _first_class(chunk, C, BC)
    if SMOOTH:
        spread = counted.to(tl.float32)
        if WEIGHT:
            spread = tl.load(Weight + classes, mask=counted, other=0.0).to(tl.float32)
        spread = spread * (smoothing / C)
    if not MAP:
        scale = tl.load(Grad).to(tl.float32)

    begin = tl.maximum(first_row - 1, 0)
    below = _row_of_classes(image, begin, h, w, left, right, share, chunk, C, VEC, G)
    sum_above = tl.zeros((BX, BC), tl.float32)
    sum_below = tl.zeros((BX, BC), tl.float32)
    y = _first_after(begin, h, H, ALIGN)
    # Of the next row, one ahead: it comes from far.
    lse_at = Lse + labels + tl.cast(y, tl.int64) * W + x
    label_at = Target + labels + tl.cast(y, tl.int64) * W + x
    grad_at = Grad + labels + tl.cast(y, tl.int64) * W + x
    next_lse, next_label = tl.load(lse_at), tl.load(label_at)
    whole = _denominator(H, ALIGN)
    # _first_after(i + 1) without a division for each i.
    number, per = _spacing(h, H, ALIGN)
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
            # Ignored pixels have an infinite lse, and so no probabilities.
            label = tl.where(lse == float("inf"), -1, label)
            down = _numerator(row, h, H, ALIGN) - i * whole
            down = tl.cast(down, tl.float32) * (1.0 / whole)
            value = below + (down - 1.0) * step - (lse * _LOG2_E)[:, None]
            grad = tl.exp2(value)
            own = (label - first_class)[:, None] == offset[None, :]
            if SMOOTH:
                rate = _rate(Weight, label, label >= 0, WEIGHT)
                spike = (1.0 - smoothing) * rate
                rate = spike + smoothing * _mean_weight(Mean, WEIGHT)
                uniform = tl.where(label >= 0, 1.0, 0.0)
                grad = rate[:, None] * grad - tl.where(own, spike[:, None], 0.0)
                grad = grad - uniform[:, None] * spread[None, :]
            else:
                grad = tl.where(own, grad - 1.0, grad)
                if WEIGHT:
                    grad *= _rate(Weight, label, label >= 0, WEIGHT)[:, None]
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
