"""Bilinear interpolation of logits, also at labels, in the upsampling Triton kernels.

Logits are B x C x h x w, channels last and dense: Logits[b, y, x, c]. There is no matrix product
between a logit and its upsampled value, so the values are those of interpolation in float32,
whatever the dtype of the logits.

Interpolation goes first along the columns and then along the rows. A thread has a column of output
pixels to itself, and some classes. Upsampling by 8, eight rows of output lie between two low rows;
so the columns are interpolated once for many output rows, and a further row costs a multiplication
or two per value. Everything the loss needs of a value is in registers.

Values are kept times log2 e, because the hardware computes exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every logit; finite, because the difference of two infinities is not a number.
LOWEST = tl.constexpr(-1e30)
# How much a value may change from one low row to the next for exponentials by recurrence. The sum
# of a row is then at least 2^-46 of the reference. A class whose first exponential is lost,
# because it is below 2^-126, is at most 2^-80 in every row, and disappears when float32 rounds
# that sum.
STEEPEST = tl.constexpr(46.0)


@triton.jit
def numerator(place, low, high, ALIGN: tl.constexpr):
    """Where an output row or column lies between the low ones, times `denominator`."""
    if ALIGN:
        number = place * (low - 1)
    else:
        number = tl.minimum(tl.maximum((2 * place + 1) * low - high, 0), (low - 1) * 2 * high)
    return number


@triton.jit
def denominator(high, ALIGN: tl.constexpr):
    return tl.maximum(high - 1, 1) if ALIGN else 2 * high


@triton.jit
def between(place, low, high, ALIGN: tl.constexpr):
    """The low row or column before each place, and the share of the next one."""
    number, whole = numerator(place, low, high, ALIGN), denominator(high, ALIGN)
    before = number // whole
    return before, (number - before * whole).to(tl.float32) * (1.0 / whole)


@triton.jit
def spacing(low, high, ALIGN: tl.constexpr):
    """Numerator and denominator of the output rows or columns between two low ones."""
    if ALIGN:
        number, whole = tl.maximum(high - 1, 1), tl.maximum(low - 1, 1)
    else:
        number, whole = 2 * high, 2 * low
    return number, whole


@triton.jit
def first_after(index, low, high, ALIGN: tl.constexpr):
    """The first output row or column that does not lie before low row or column `index`."""
    number, whole = spacing(low, high, ALIGN)
    first = (index * number + (low - 2 if ALIGN else high + low - 1)) // whole
    return tl.where(index < 0, 0, tl.where(index >= low, high, tl.maximum(first, 0)))


@triton.jit
def first_gap(ALIGN: tl.constexpr):
    """The gap between low rows where output rows begin: -1 where some lie above all low rows."""
    return 0 if ALIGN else -1


@triton.jit
def _load_classes(
    pixels, words, LIMIT: tl.constexpr, first: tl.constexpr, step: tl.constexpr, G: tl.constexpr,
    EVEN: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Logits of G groups of VEC classes, `step` words apart, in float32: columns x lanes x VEC G.

    One load per group: as many neighbouring classes as C allows to be read at once. Groups run
    fastest, so that joining them moves nothing between registers. A word is PACK logits, and a
    pixel has LIMIT of them; EVEN: no load reaches beyond.
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
def first_class_of(chunk, C: tl.constexpr, CHUNK: tl.constexpr):
    """The first class of a chunk of CHUNK classes.

    The last chunk begins early rather than end beyond the last class, so no load needs a mask.
    """
    return tl.minimum(chunk * CHUNK, C - CHUNK) if C >= CHUNK else chunk * CHUNK


@triton.jit
def classes_of(chunk, C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr):
    """The classes of a chunk as registers hold them, L x VEC G, and which of them it owns.

    L threads share a pixel, and each has G groups of VEC classes side by side.
    """
    s = tl.arange(0, VEC * G)
    own = s % G * (L * VEC) + s // G
    classes = (tl.arange(0, L) * VEC)[:, None] + own[None, :]
    classes += first_class_of(chunk, C, L * VEC * G)
    return classes, (classes >= chunk * (L * VEC * G)) & (classes < C)


@triton.jit
def widen(
    row, left, right, share, chunk,
    C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """A chunk of classes of a low row interpolated along its columns, times log2 e.

    Columns x L x VEC G; `classes_of` says which.
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
    words += first_class_of(chunk, PIXEL, CHUNK // PACK)
    weight = (share * LOG2_E)[:, None, None]
    other = ((1.0 - share) * LOG2_E)[:, None, None]
    step: tl.constexpr = L * WORDS
    wide = other * _load_classes(row + left * PIXEL, words, PIXEL, 0, step, G, EVEN, PACK)
    return wide + weight * _load_classes(row + right * PIXEL, words, PIXEL, 0, step, G, EVEN, PACK)


@triton.jit
def two_rows(
    image, i, h, w, left, right, share, chunk,
    C: tl.constexpr, L: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Low row i made wide, and how much the next one differs; far below 0 where it must not count.

    Above the first and below the last low row, that row is repeated.
    """
    above = image + tl.maximum(i, 0) * (w * C)
    above = widen(above, left, right, share, chunk, C, L, VEC, G)
    step = image + tl.minimum(i + 1, h - 1) * (w * C)
    step = widen(step, left, right, share, chunk, C, L, VEC, G) - above
    if C % (L * VEC * G) != 0 and (chunk + 1) * (L * VEC * G) > C:
        above = tl.where(classes_of(chunk, C, L, VEC, G)[1][None, :, :], above, LOWEST)
    return above, step


@triton.jit
def row_share(y, i, h, H, ALIGN: tl.constexpr):
    """How far output row y lies below low row i, as a share of the way to the next."""
    whole = denominator(H, ALIGN)
    number = numerator(tl.minimum(y, H - 1), h, H, ALIGN) - i * whole
    return tl.cast(number, tl.float32) * (1.0 / whole)


@triton.jit
def share_between_rows(h, H, ALIGN: tl.constexpr):
    """What `row_share` grows by from one output row to the next."""
    number, whole = spacing(h, H, ALIGN)
    return tl.cast(whole, tl.float32) / tl.cast(number, tl.float32)


@triton.jit
def logits_of_labels(image, label, i, down, left, right, share, w, h, C: tl.constexpr):
    """The upsampled logit of each pixel's label, from its four low pixels."""
    above = image + tl.maximum(i, 0) * (w * C)
    below = image + tl.minimum(i + 1, h - 1) * (w * C)
    value = (1.0 - down) * tl.load(above + left * C + label).to(tl.float32)
    value += down * tl.load(below + left * C + label).to(tl.float32)
    other = (1.0 - down) * tl.load(above + right * C + label).to(tl.float32)
    other += down * tl.load(below + right * C + label).to(tl.float32)
    return value + share * (other - value)


@triton.jit
def label_rate(Weight, label, valid, WEIGHT: tl.constexpr):
    """m_t, 0 where the label is ignored."""
    if WEIGHT:
        rate = tl.load(Weight + label, mask=valid, other=0.0).to(tl.float32)
    else:
        rate = valid.to(tl.float32)
    return rate


@triton.jit
def mean_weight(Mean, WEIGHT: tl.constexpr):
    return tl.load(Mean).to(tl.float32) if WEIGHT else 1.0
