"""Triton kernels of the Encoding Layer that add up the programs' partial sums; see fused.py.

Either a separate kernel does it, or the programs that finish last: the last one of a group of
images adds up the group's rows, and the last one of all groups adds up the groups' sums. Which
program is last varies from run to run; the order of the sums does not. Count[1 + i] is how many
images of group i are done, Count[0] how many groups. All are zero before and after a launch, and
there are enough of them for groups of one image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clear_counters(Count, b):
    """Set image b's part of the counters to zero, as the backward pass expects them."""
    tl.store(Count + 1 + b, 0)
    if b == 0:
        tl.store(Count, 0)


@triton.jit
def _sum_rows(P, first, count, entries, WIDTH: tl.constexpr):
    """Sum of `count` rows of P from `first` on, at these entries; a row has WIDTH of them."""
    total = tl.zeros(entries.shape, tl.float32)
    for begin in range(0, count, 16):
        for s in tl.static_range(16):
            row = (first + begin + s).to(tl.int64) * WIDTH
            mask = (entries < WIDTH) & (begin + s < count)
            # Other programs wrote them, so they are read from the cache that all share.
            total += tl.load(P + row + entries, mask, 0.0, cache_modifier=".cg")
    return total


@triton.jit
def _arrive(Count, of):
    """Note that this program's stores are done; return whether it is the last of `of` programs."""
    # One thread counts, which releases what the whole program stored. So it must wait for the other
    # threads' stores, and Triton puts a barrier here only where they share memory.
    tl.debug_barrier()
    last = tl.atomic_add(Count, 1, sem="acq_rel") == of - 1
    if last:
        tl.store(Count, 0)
    return last


@triton.jit
def add_images(
    P,  # (B + groups) x K (C + 1), float32: a row per image (dD, then dS), then one per group
    dD,  # K x C
    dS,  # K
    Count,  # B + 1, int32, at zero before and after
    b,  # the image of this program
    images,  # B
    group,  # images of a group
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    BE: tl.constexpr,  # entries of a row taken at once
):
    """dD and dS from the rows of P, one per image; the rows after them hold sums of groups."""
    WIDTH: tl.constexpr = K * (C + 1)
    number = b // group
    members = tl.minimum(group, images - number * group)
    if _arrive(Count + 1 + number, members):
        for begin in range(0, WIDTH, BE):
            entries = begin + tl.arange(0, BE)
            total = _sum_rows(P, number * group, members, entries, WIDTH)
            tl.store(P + (images + number) * WIDTH + entries, total, mask=entries < WIDTH)
        groups = tl.cdiv(images, group)
        if _arrive(Count, groups):
            for begin in range(0, WIDTH, BE):
                entries = begin + tl.arange(0, BE)
                total = _sum_rows(P, images, groups, entries, WIDTH)
                to_d, to_s = entries < K * C, (entries >= K * C) & (entries < WIDTH)
                tl.store(dD + entries, total.to(dD.dtype.element_ty), mask=to_d)
                tl.store(dS + entries - K * C, total.to(dS.dtype.element_ty), mask=to_s)


@triton.jit
def finish_forward_kernel(
    P,  # B x splits x K x C, float32: sums of a x
    PM,  # B x mass_splits x K, float32: sums of a
    D,  # K x C, the codewords
    E,  # B x K x C, float32
    ESUM,  # B x K, float32: sum of E over its channels; only with STATS
    EM2,  # B x K, float32: sum of its squares about their mean; only with STATS
    Count,  # B + 1, int32: cleared for the backward pass
    splits,  # partial sums per image in P
    mass_splits,  # and in PM, where a split form has one per tile
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    CP: tl.constexpr,  # C padded to a power of two
    BS: tl.constexpr,  # partial sums read at once
    STATS: tl.constexpr,  # write ESUM and EM2
):
    """E[b, k] = sum of partial sums - mass d_k, and its sum and M2 over the channels."""
    b = (tl.program_id(0) // K).to(tl.int64)
    k = tl.program_id(0) % K
    c, s = tl.arange(0, CP), tl.arange(0, BS)
    in_c = c < C
    total = tl.zeros((CP,), tl.float32)
    for begin in range(0, splits, BS):
        slots = b * splits + begin + s
        mask = (begin + s < splits)[:, None] & in_c[None, :]
        total += tl.sum(tl.load(P + ((slots * K + k) * C)[:, None] + c[None, :], mask, 0.0), 0)
    masses = tl.zeros((BS,), tl.float32)
    for begin in range(0, mass_splits, BS):
        slots = b * mass_splits + begin + s
        masses += tl.load(PM + slots * K + k, mask=begin + s < mass_splits, other=0.0)
    d = tl.load(D + k * C + c, mask=in_c, other=0.0).to(tl.float32)
    code = total - tl.sum(masses, 0) * d
    row = b * K + k
    tl.store(E + row * C + c, code, mask=in_c)
    if STATS:
        code_sum = tl.sum(code, 0)
        centred = tl.where(in_c, code - code_sum / C, 0.0)
        tl.store(ESUM + row, code_sum)
        tl.store(EM2 + row, tl.sum(centred * centred, 0))
    if k == 0:
        clear_counters(Count, b)


@triton.jit
def finish_backward_kernel(
    P,  # B x splits x K x C, float32: sums of w x
    PM,  # B x mass_splits x 3 x K, float32: sums of a, of w and of dl |x - d|^2
    G,  # B x K x C, float32: dE
    D,  # K x C, the codewords
    dD,  # K x C
    dS,  # K
    images,  # B
    splits,  # partial sums per image in P
    mass_splits,  # and in PM
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    BC: tl.constexpr,  # channels of a program
    BS: tl.constexpr,  # partial sums, and images, read at once
    BM: tl.constexpr,  # entries of PM read at once
):
    """dD_k = -sum_b mass_bk G_bk - sum of w x + (sum of w) d_k, and dS_k."""
    k = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(C, BC) * BC
    c, s = column + tl.arange(0, BC), tl.arange(0, BS)
    in_c = c < C
    total = tl.zeros((BC,), tl.float32)
    for begin in range(0, images * splits, BS):
        slots = (begin + s).to(tl.int64)
        mask = (slots < images * splits)[:, None] & in_c[None, :]
        total += tl.sum(tl.load(P + ((slots * K + k) * C)[:, None] + c[None, :], mask, 0.0), 0)
    m = tl.arange(0, BM)
    moment = tl.zeros((BM,), tl.float32)
    slope = tl.zeros((BM,), tl.float32)
    for begin in range(0, images * mass_splits, BM):
        slots = (begin + m).to(tl.int64)
        moment += tl.load(PM + (slots * 3 + 1) * K + k, slots < images * mass_splits, 0.0)
        slope += tl.load(PM + (slots * 3 + 2) * K + k, slots < images * mass_splits, 0.0)
    for first in range(0, images, BS):
        b = (first + s).to(tl.int64)
        mass = tl.zeros((BS,), tl.float32)
        for begin in range(0, mass_splits, BS):
            slots = b[:, None] * mass_splits + (begin + s)[None, :]
            mask = (b < images)[:, None] & (begin + s < mass_splits)[None, :]
            mass += tl.sum(tl.load(PM + slots * 3 * K + k, mask, 0.0), 1)
        mask = (b < images)[:, None] & in_c[None, :]
        g = tl.load(G + ((b * K + k) * C)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(mass[:, None] * g, 0)
    d = tl.load(D + k * C + c, mask=in_c, other=0.0).to(tl.float32)
    gradient = tl.sum(moment, 0) * d - total
    tl.store(dD + k * C + c, gradient.to(dD.dtype.element_ty), mask=in_c)
    if column == 0:
        tl.store(dS + k, tl.sum(slope, 0).to(dS.dtype.element_ty))
