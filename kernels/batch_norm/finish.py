"""Triton kernels that add the partial sums of batch normalisation; plan.py launches them.

They add in float64, in a fixed order, and make the moments, the running statistics and the
parameters' gradients from the sums. Letters as in kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _write_moments(
    Mean, Var, Count, RunningMean, RunningVar, momentum, total, squares, count, channels, in_c,
    MEAN: tl.constexpr, VAR: tl.constexpr,
):  # fmt: skip
    """Mean and variance from sum x and sum x^2, float64; moves the running statistics."""
    count = tl.maximum(count, 1.0)
    mean = total / count
    m2 = tl.maximum(squares - mean * total, 0.0)
    tl.store(Mean + channels, mean.to(tl.float32), mask=in_c)
    tl.store(Var + channels, (m2 / count).to(tl.float32), mask=in_c)
    if MEAN:
        at = RunningMean + channels
        old = tl.load(at, mask=in_c, other=0.0).to(tl.float64)
        tl.store(at, (old + momentum * (mean - old)).to(RunningMean.dtype.element_ty), mask=in_c)
    if VAR:
        at = RunningVar + channels
        old = tl.load(at, mask=in_c, other=0.0).to(tl.float64)
        new = m2 / tl.maximum(count - 1, 1.0)
        tl.store(at, (old + momentum * (new - old)).to(RunningVar.dtype.element_ty), mask=in_c)
    if tl.program_id(0) == 0:
        tl.store(Count, count)


@triton.jit
def finish_statistics_kernel(
    P,  # splits x 2 x C, float32: mean and M2 of each run
    PN,  # splits, int32: values per channel in each run
    Packed,  # 2 C + 1, float64; written unless ALONE
    Mean,  # C, float32
    Var,  # C, float32
    Count,  # 1, float64: values per channel
    RunningMean,  # C; moved with MEAN
    RunningVar,  # C; moved with VAR
    momentum,  # weight of the new value in the running statistics
    C,  # channels
    splits,  # runs
    BC: tl.constexpr,  # channels of a program
    BS: tl.constexpr,  # runs read at once
    MEAN: tl.constexpr,  # move RunningMean
    VAR: tl.constexpr,  # move RunningVar
    ALONE: tl.constexpr,  # no other process: write Mean, Var and Count
):
    """Packed = sum x, sum x^2, count: 2 C + 1 values in float64 (paper, appendix A, eq. 2).

    A process that is ALONE writes what moments_kernel would make of them instead.
    """
    channels, s = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BS)
    in_c = channels < C
    total = tl.zeros((BS, BC), tl.float64)
    squares = tl.zeros((BS, BC), tl.float64)
    counts = tl.zeros((BS,), tl.float64)
    for begin in range(0, splits, BS):
        slots = begin + s
        n = tl.load(PN + slots, mask=slots < splits, other=0).to(tl.float64)
        at = P + (slots.to(tl.int64) * 2 * C)[:, None] + channels[None, :]
        mask = (slots < splits)[:, None] & in_c[None, :]
        mean = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        m2 = tl.load(at + C, mask=mask, other=0.0).to(tl.float64)
        of_run = mean * n[:, None]
        total += of_run
        squares += m2 + mean * of_run
        counts += n
    total, squares = tl.sum(total, 0), tl.sum(squares, 0)
    count = tl.sum(counts, 0)
    if ALONE:
        _write_moments(
            Mean, Var, Count, RunningMean, RunningVar, momentum, total, squares, count,
            channels, in_c, MEAN, VAR,
        )  # fmt: skip
    else:
        tl.store(Packed + channels, total, mask=in_c)
        tl.store(Packed + C + channels, squares, mask=in_c)
        if tl.program_id(0) == 0:
            tl.store(Packed + 2 * C, count)


@triton.jit
def moments_kernel(
    Packed,  # 2 C + 1, float64: sums of x and of x^2, and the count
    Mean,  # C, float32
    Var,  # C, float32
    Count,  # 1, float64: values per channel
    RunningMean,  # C; moved with MEAN
    RunningVar,  # C; moved with VAR
    momentum,  # weight of the new value in the running statistics
    C,  # channels
    BC: tl.constexpr,  # channels of a program
    MEAN: tl.constexpr,  # move RunningMean
    VAR: tl.constexpr,  # move RunningVar
):
    """Mean and variance over all processes, from the sums over all processes."""
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = channels < C
    total = tl.load(Packed + channels, mask=in_c, other=0.0)
    squares = tl.load(Packed + C + channels, mask=in_c, other=0.0)
    _write_moments(
        Mean, Var, Count, RunningMean, RunningVar, momentum, total, squares,
        tl.load(Packed + 2 * C), channels, in_c, MEAN, VAR,
    )  # fmt: skip


@triton.jit
def _write_product(product, Var, eps, Sum, dWeight, channels, in_c, WEIGHT: tl.constexpr):
    """Sum g u s from sum g u; it is the gradient of the weight."""
    var = tl.load(Var + channels, mask=in_c, other=1.0).to(tl.float32)
    product = product / tl.sqrt_rn(var + eps)
    tl.store(Sum + channels, product, mask=in_c)
    if WEIGHT:
        tl.store(dWeight + channels, product.to(dWeight.dtype.element_ty), mask=in_c)


@triton.jit
def finish_backward_kernel(
    P,  # splits x 2 (with NORM 3) x C, float32: sums of g, of g u, of g u of R, of each run
    Var,  # C, float32
    RVar,  # C, float32: of R; read with NORM
    eps,  # added to Var
    Sums,  # 2 (with NORM 3) x C, float64
    dWeight,  # C; written with WEIGHT
    dRWeight,  # C; written with WEIGHT and NORM
    dBias,  # C; written with BIAS
    C,  # channels
    splits,  # runs
    BC: tl.constexpr,  # channels of a program
    BS: tl.constexpr,  # runs read at once
    WEIGHT: tl.constexpr,  # there is a weight
    BIAS: tl.constexpr,  # there is a bias
    NORM: tl.constexpr,  # sums for R, too
):
    """Sums = sum g and sums g u s of this process in float64; the parameters' gradients."""
    channels, s = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BS)
    in_c = channels < C
    total = tl.zeros((BS, BC), tl.float64)
    product = tl.zeros((BS, BC), tl.float64)
    r_product = tl.zeros((BS, BC), tl.float64)
    rows: tl.constexpr = 3 if NORM else 2
    for begin in range(0, splits, BS):
        slots = begin + s
        at = P + (slots.to(tl.int64) * rows * C)[:, None] + channels[None, :]
        mask = (slots < splits)[:, None] & in_c[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        product += tl.load(at + C, mask=mask, other=0.0).to(tl.float64)
        if NORM:
            r_product += tl.load(at + 2 * C, mask=mask, other=0.0).to(tl.float64)
    total = tl.sum(total, 0)
    tl.store(Sums + channels, total, mask=in_c)
    if BIAS:
        tl.store(dBias + channels, total.to(dBias.dtype.element_ty), mask=in_c)
    _write_product(tl.sum(product, 0), Var, eps, Sums + C, dWeight, channels, in_c, WEIGHT)
    if NORM:
        r_product = tl.sum(r_product, 0)
        _write_product(r_product, RVar, eps, Sums + 2 * C, dRWeight, channels, in_c, WEIGHT)
