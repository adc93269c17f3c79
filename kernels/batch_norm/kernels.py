"""Triton kernels of batch normalisation; plan.py launches them.

x is B x C x N (images, channels, pixels), dense, in one of two layouts. Channels last (LAST): B N
rows of C values, and a program owns BQ channels of a run of rows. Otherwise: B C planes of N
values, and a program owns one channel in a run of images and pixels. Either way it walks `per`
tiles of BP x BQ values, the inner dimension contiguous in memory, and holds what belongs to its
channels as a vector of BQ (LAST) or 1.

A kernel stores partial sums for each run of tiles, P; a last small kernel adds them in a fixed
order in float64. g is dy where the activation let it pass, u = x - mean, s = 1 / sqrt(var + eps).

The mask of a ReLU that follows a residual: one bit per value, packed along the inner dimension.
Each plane or, channels last, each row of BQ channels starts at a byte of its own. Without a
residual the backward pass recomputes the mask from x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split(program, C, BQ: tl.constexpr, LAST: tl.constexpr):
    """A program's run of tiles, its block of channels (or, not LAST, its channel), and the indices
    of its channels: a vector of BQ or 1.
    """
    blocks = tl.cdiv(C, BQ) if LAST else C
    split, block = program // blocks, program % blocks
    channels = block * BQ + tl.arange(0, BQ) if LAST else block + tl.arange(0, 1)
    return split, block, channels


@triton.jit
def _from_the_end():
    """This program's index, counted from the last program.

    For a pass that reads what the pass before it has read: the last programs' data is still in L2.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _tile(
    t, block, B, C, N, packed,
    BP: tl.constexpr, BQ: tl.constexpr, LAST: tl.constexpr, DENSITY: tl.constexpr,
):  # fmt: skip
    """Offsets of a block's tile t, BP x BQ, in x (DENSITY 1) or in the mask (8), and which exist.

    `packed` is BQ / 8, the bytes of a row of the mask. It is no constant: then the compiler would
    redistribute a tile's bytes over the threads through shared memory.
    """
    p, q = tl.arange(0, BP)[:, None], tl.arange(0, BQ // DENSITY)[None, :]
    if LAST:
        # The mask has one plane for each block of channels: a program's bytes lie side by side.
        first = tl.cast(t, tl.int64) * BP
        rows = tl.cast(N, tl.int64) * B
        width = C if DENSITY == 1 else packed
        start = first * C + block * BQ if DENSITY == 1 else (block * rows + first) * width
        offsets = start + (p * width + q)
        inside = (p < rows - first) & (q < tl.cdiv(C - block * BQ, DENSITY))
    else:
        width = tl.cdiv(N, DENSITY)
        across = tl.cdiv(N, BQ)
        image, column = t // across * BP, t % across * (BQ // DENSITY)
        plane = tl.cast(image, tl.int64) * C + block
        offsets = plane * width + column + (p * (C * width) + q)
        inside = (p < B - image) & (q < width - column)
    return offsets, inside


@triton.jit
def _count(t, B, N, BP: tl.constexpr, BQ: tl.constexpr, LAST: tl.constexpr):
    """How many values of each channel are in tile t."""
    if LAST:
        rows = tl.cast(N, tl.int64) * B - tl.cast(t, tl.int64) * BP
        count = tl.minimum(rows, BP).to(tl.int32)
    else:
        across = tl.cdiv(N, BQ)
        count = tl.minimum(B - t // across * BP, BP) * tl.minimum(N - t % across * BQ, BQ)
    return count


@triton.jit
def _sum(tile, LAST: tl.constexpr):
    """Sums over the values of each channel."""
    total = tl.sum(tile, 0) if LAST else tl.sum(tl.sum(tile, 1)[None, :], 1)
    return total


@triton.jit
def _load(base, channels, in_c, default: tl.constexpr):
    return tl.load(base + channels, mask=in_c, other=default).to(tl.float32)


@triton.jit
def _coefficients(
    Mean, Var, Weight, Bias, channels, in_c, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):
    """mean, 1 / standard deviation, weight over standard deviation, bias; each broadcast over p."""
    mean = _load(Mean, channels, in_c, 0.0)
    inv_std = 1 / tl.sqrt_rn(_load(Var, channels, in_c, 1.0) + eps)
    factor = inv_std
    if WEIGHT:
        factor = inv_std * _load(Weight, channels, in_c, 0.0)
    bias = tl.zeros_like(mean)
    if BIAS:
        bias = _load(Bias, channels, in_c, 0.0)
    return mean[None, :], inv_std[None, :], factor[None, :], bias[None, :]


@triton.jit
def _affine(x, mean, factor, bias, FOLD: tl.constexpr):
    """The normalised value. FOLD: one multiply-add, accurate only where the mean is small."""
    y = x * factor + (bias - mean * factor) if FOLD else (x - mean) * factor + bias
    return y


@triton.jit
def _pack(values, BP: tl.constexpr, BQ: tl.constexpr):
    """Bits of BP x BQ conditions: BP x BQ/8 bytes."""
    bits = tl.reshape(values.to(tl.int32), [BP, BQ // 8, 8])
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def _unpack(packed, BP: tl.constexpr, BQ: tl.constexpr):
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BP, BQ]) != 0


@triton.jit
def statistics_kernel(
    X,  # B x C x N, dense
    P,  # runs x 2 x C, float32: mean and M2
    PN,  # runs, int32: values per channel in the run
    B,  # images
    C,  # channels
    N,  # pixels
    per,  # tiles of a run
    tiles,  # tiles in all, of one block of channels or of one channel
    packed,  # BQ / 8
    BP: tl.constexpr,  # rows of a tile: pixels (LAST), else images
    BQ: tl.constexpr,  # values of a row: channels (LAST), else pixels
    LAST: tl.constexpr,  # channels last
):
    """P[split] = mean and M2, 2 x C; PN[split] = number of values per channel in the run.

    Sums are taken about the mean of the run's first tile. It is at least 1/32 of the run, so its
    distance from the run's mean is at most sqrt(31) standard deviations whatever the data.
    """
    split, block, channels = _split(tl.program_id(0), C, BQ, LAST)
    begin = split * per
    end = tl.minimum(begin + per, tiles)
    offsets, inside = _tile(begin, block, B, C, N, packed, BP, BQ, LAST, 1)
    count = _count(begin, B, N, BP, BQ, LAST)
    x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
    about = (_sum(x, LAST) / count)[None, :]
    deviation = tl.where(inside, x - about, 0.0)
    total, squares = deviation, deviation * deviation
    for t in range(begin + 1, end):
        offsets, inside = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 1)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, x - about, 0.0)
        total += deviation
        squares += deviation * deviation
        count += _count(t, B, N, BP, BQ, LAST)
    rest = (_sum(total, LAST) / count)[None, :]
    m2 = _sum(squares, LAST)[None, :] - rest * rest * count
    slot = P + tl.cast(split, tl.int64) * 2 * C + channels[None, :]
    in_c = (channels < C)[None, :]
    tl.store(slot, about + rest, mask=in_c)
    tl.store(slot + C, tl.maximum(m2, 0.0), mask=in_c)
    if tl.program_id(0) == split * (tl.cdiv(C, BQ) if LAST else C):
        tl.store(PN + split, count)


@triton.jit
def normalise_kernel(
    X,  # B x C x N, dense
    R,  # as X: the residual; read with RESIDUAL
    Y,  # as X
    Bits,  # the mask, uint8; written with PACK
    Mean,  # C, float32
    Var,  # C, float32
    Weight,  # C; read with WEIGHT
    Bias,  # C; read with BIAS
    RMean,  # C, float32; this and the next three normalise R with NORM
    RVar,  # C, float32
    RWeight,  # C; read with WEIGHT
    RBias,  # C; read with BIAS
    eps,  # added to Var
    B,  # images
    C,  # channels
    N,  # pixels
    per,  # tiles of a run
    tiles,  # tiles in all, of one block of channels or of one channel
    packed,  # BQ / 8
    BP: tl.constexpr,  # rows of a tile: pixels (LAST), else images
    BQ: tl.constexpr,  # values of a row: channels (LAST), else pixels
    LAST: tl.constexpr,  # channels last
    WEIGHT: tl.constexpr,  # there is a weight
    BIAS: tl.constexpr,  # there is a bias
    RESIDUAL: tl.constexpr,  # add R
    NORM: tl.constexpr,  # normalised
    RELU: tl.constexpr,  # the activation is a ReLU
    PACK: tl.constexpr,  # write the mask of what it let pass
    FOLD: tl.constexpr,  # one multiply-add per value: for frozen statistics
):
    """Y = act(normalised X + R or normalised R), and the packed mask of the activation."""
    split, block, channels = _split(_from_the_end(), C, BQ, LAST)
    mean, inv_std, factor, bias = _coefficients(
        Mean, Var, Weight, Bias, channels, channels < C, eps, WEIGHT, BIAS
    )
    if NORM:
        r_mean, _, r_factor, r_bias = _coefficients(
            RMean, RVar, RWeight, RBias, channels, channels < C, eps, WEIGHT, BIAS
        )
    begin = split * per
    end = tl.minimum(begin + per, tiles)
    # Backwards: what the previous pass read last is still in L2.
    for i in range(begin, end):
        t = begin + end - 1 - i
        offsets, inside = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 1)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        y = _affine(x, mean, factor, bias, FOLD)
        if RESIDUAL:
            r = tl.load(R + offsets, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                r = _affine(r, r_mean, r_factor, r_bias, FOLD)
            y += r
        if PACK:
            at, exists = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 8)
            tl.store(Bits + at, _pack((y > 0) & inside, BP, BQ), mask=exists)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
        tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _masked(
    grad, x, Bits, t, block, mean, factor, bias, B, C, N, packed,
    BP: tl.constexpr, BQ: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    PACKED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The gradient where the activation let it pass."""
    if PACKED:
        at, exists = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 8)
        bits = _unpack(tl.load(Bits + at, mask=exists, other=0), BP, BQ)
        grad = tl.where(bits, grad, 0.0)
    elif RELU:
        grad = tl.where(_affine(x, mean, factor, bias, FOLD) > 0, grad, 0.0)
    return grad


@triton.jit
def backward_sums_kernel(
    dY,  # as X
    Other,  # as X: another gradient of y; read with TWO
    X,  # B x C x N, dense
    R,  # as X: the residual; read with NORM
    Bits,  # the mask of the activation, uint8; read with PACKED
    Mean,  # C, float32
    Var,  # C, float32
    Weight,  # C; read with WEIGHT
    Bias,  # C; read with BIAS
    RMean,  # C, float32: of R; read with NORM
    eps,  # added to Var
    P,  # runs x 2 (with NORM 3) x C, float32: sums of g, of g u, and of g u of R
    dX,  # as X; written with FROZEN
    dR,  # as X: g, the gradient of the residual; written with RESIDUAL
    B,  # images
    C,  # channels
    N,  # pixels
    per,  # tiles of a run
    tiles,  # tiles in all, of one block of channels or of one channel
    packed,  # BQ / 8
    BP: tl.constexpr,  # rows of a tile: pixels (LAST), else images
    BQ: tl.constexpr,  # values of a row: channels (LAST), else pixels
    LAST: tl.constexpr,  # channels last
    WEIGHT: tl.constexpr,  # there is a weight
    BIAS: tl.constexpr,  # there is a bias
    RELU: tl.constexpr,  # the activation is a ReLU
    PACKED: tl.constexpr,  # its mask is read, not recomputed from X
    FROZEN: tl.constexpr,  # statistics are constants: dX needs no sums
    RESIDUAL: tl.constexpr,  # write dR
    TWO: tl.constexpr,  # the gradient of y is the sum of dY and Other
    NORM: tl.constexpr,  # the residual is normalised: sum for R, too
):
    """P[split] = sum g and sums g u, 2 or 3 x C; frozen statistics: dX, and dR, in the same pass.

    With TWO gradients it writes g to dR: their sum is never written before it is masked.
    """
    split, block, channels = _split(tl.program_id(0), C, BQ, LAST)
    in_c = channels < C
    mean, inv_std, factor, bias = _coefficients(
        Mean, Var, Weight, Bias, channels, in_c, eps, WEIGHT, BIAS
    )
    begin = split * per
    end = tl.minimum(begin + per, tiles)
    total = tl.zeros((BP, BQ), tl.float32)
    product = tl.zeros((BP, BQ), tl.float32)
    if NORM:
        r_mean = _load(RMean, channels, in_c, 0.0)[None, :]
        r_product = tl.zeros((BP, BQ), tl.float32)
    for t in range(begin, end):
        offsets, inside = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 1)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dY + offsets, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            grad += tl.load(Other + offsets, mask=inside, other=0.0).to(tl.float32)
            grad = grad.to(dY.dtype.element_ty).to(tl.float32)  # as it is kept
        grad = _masked(
            grad, x, Bits, t, block, mean, factor, bias, B, C, N, packed,
            BP, BQ, LAST, RELU, PACKED, FROZEN,
        )  # fmt: skip
        total += grad
        product += grad * (x - mean)
        if NORM:
            r = tl.load(R + offsets, mask=inside, other=0.0).to(tl.float32)
            r_product += grad * (r - r_mean)
        if FROZEN:
            tl.store(dX + offsets, (grad * factor).to(dX.dtype.element_ty), mask=inside)
        if RESIDUAL:
            tl.store(dR + offsets, grad.to(dR.dtype.element_ty), mask=inside)
    slot = P + tl.cast(split, tl.int64) * (3 if NORM else 2) * C + channels
    tl.store(slot, _sum(total, LAST), mask=in_c)
    tl.store(slot + C, _sum(product, LAST), mask=in_c)
    if NORM:
        tl.store(slot + 2 * C, _sum(r_product, LAST), mask=in_c)


@triton.jit
def _mean(sums, channels, in_c, share):
    """Sums of float64, each times its share, as float32; broadcast over p."""
    return (tl.load(sums + channels, mask=in_c, other=0.0) * share).to(tl.float32)[None, :]


@triton.jit
def backward_input_kernel(
    dY,  # as X
    X,  # B x C x N, dense
    R,  # as X: the residual; read with NORM
    Bits,  # the mask of the activation, uint8; read with PACKED
    Mean,  # C, float32
    Var,  # C, float32
    Weight,  # C; read with WEIGHT
    Bias,  # C; read with BIAS
    RMean,  # C, float32; this and the next two are of R and read with NORM
    RVar,  # C, float32
    RWeight,  # C; read with WEIGHT
    eps,  # added to Var
    Sums,  # 2 (with NORM 3) x C, float64: sums of g, of g u s and of that of R over all processes
    Count,  # 1, float64: values per channel over all processes
    dX,  # as X
    dR,  # as X: the gradient of the residual; written with RESIDUAL
    B,  # images
    C,  # channels
    N,  # pixels
    per,  # tiles of a run
    tiles,  # tiles in all, of one block of channels or of one channel
    packed,  # BQ / 8
    BP: tl.constexpr,  # rows of a tile: pixels (LAST), else images
    BQ: tl.constexpr,  # values of a row: channels (LAST), else pixels
    LAST: tl.constexpr,  # channels last
    WEIGHT: tl.constexpr,  # there is a weight
    BIAS: tl.constexpr,  # there is a bias
    RELU: tl.constexpr,  # the activation is a ReLU
    PACKED: tl.constexpr,  # its mask is read, not recomputed from X
    RESIDUAL: tl.constexpr,  # write dR
    NORM: tl.constexpr,  # the residual is normalised: dR is not g
):
    """dX from the sums over all processes, and dR."""
    split, block, channels = _split(_from_the_end(), C, BQ, LAST)
    in_c = channels < C
    mean, inv_std, factor, bias = _coefficients(
        Mean, Var, Weight, Bias, channels, in_c, eps, WEIGHT, BIAS
    )
    share = 1 / tl.load(Count)  # one division in float64, not one per channel
    constant = _mean(Sums, channels, in_c, share)
    slope = _mean(Sums + C, channels, in_c, share) * inv_std
    if NORM:
        r_mean, r_inv_std, r_factor, _ = _coefficients(
            RMean, RVar, RWeight, RMean, channels, in_c, eps, WEIGHT, False
        )
        r_slope = _mean(Sums + 2 * C, channels, in_c, share) * r_inv_std
    begin = split * per
    end = tl.minimum(begin + per, tiles)
    for i in range(begin, end):
        t = begin + end - 1 - i
        offsets, inside = _tile(t, block, B, C, N, packed, BP, BQ, LAST, 1)
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dY + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = _masked(
            grad, x, Bits, t, block, mean, factor, bias, B, C, N, packed,
            BP, BQ, LAST, RELU, PACKED, False,
        )  # fmt: skip
        if RESIDUAL:
            dr = grad
            if NORM:
                r = tl.load(R + offsets, mask=inside, other=0.0).to(tl.float32)
                dr = r_factor * (grad - constant - (r - r_mean) * r_slope)
            tl.store(dR + offsets, dr.to(dR.dtype.element_ty), mask=inside)
        dx = factor * (grad - constant - (x - mean) * slope)
        tl.store(dX + offsets, dx.to(dX.dtype.element_ty), mask=inside)
