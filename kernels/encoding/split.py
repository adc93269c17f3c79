"""Triton kernels of the Encoding Layer that store the weights in between; see fused.py.

For more channels or codewords than a fused kernel supports, and where one does not fit. One kernel
makes the weights (and dx) a tile at a time and stores the weights, about B N K entries; another
sums over pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused import (
    center_of,
    distances,
    line_of,
    load_center,
    load_rows,
    prepare,
    run_of,
    softmax,
    squares,
    store_rows,
)


@triton.jit
def weights_kernel(
    X,  # B x N x C, channels innermost
    T,  # forward: the codewords, K x C; BACKWARD: (1 + B) K x C, see tables_kernel
    TQ,  # BACKWARD: (3 + B) K, float32, see tables_kernel
    Center,  # BACKWARD: C, float32, see tables_kernel
    S,  # K, the scale
    R,  # BACKWARD: K, the scale in w
    dX,  # BACKWARD with NEED_X: B x N x C, contiguous
    PW,  # B x N x KP: the weights a, or BACKWARD w, in X's dtype
    PM,  # B x tiles x K, float32: sums of a; BACKWARD: B x tiles x 3 x K, of a, w and dl |x - d|^2
    sxb,  # stride of X from image to image
    sxn,  # and from pixel to pixel
    N,  # pixels of an image
    tiles,  # tiles an image
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    KP: tl.constexpr,  # K padded to a power of two, 16 at least
    BN: tl.constexpr,  # pixels of a tile
    BC: tl.constexpr,  # channels that one product covers
    BACKWARD: tl.constexpr,  # which pass
    NEED_X: tl.constexpr,  # write dX
    PRECISION: tl.constexpr,  # of products: "tf32x3" where X is float32, else "tf32"
):
    """Split form: one tile per program. Forward: PW = a. Backward: PW = w, and dX.

    Forward: T are the codewords. Backward: see tables_kernel.
    """
    EVEN: tl.constexpr = C % BC == 0
    t = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k, in_n = k < K, rows < N - t * BN
    scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)
    tile = X + b * sxb + t * (tl.cast(sxn, tl.int64) * BN)
    G = T + (b + 1) * K * C
    xr = tl.zeros((KP, BN), tl.float32)
    x2 = tl.zeros((BN,), tl.float32)
    d2 = tl.zeros((KP,), tl.float32)
    dr = tl.zeros((KP,), tl.float32)
    cr = tl.zeros((KP,), tl.float32)
    xg = tl.zeros((KP, BN), tl.float32)
    for column in range(0, C, BC):
        x = load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
        r = load_rows(T, k, cols, in_k, column, C, C, EVEN)
        if BACKWARD:
            center = load_center(Center, cols, column, C, EVEN)
            g = load_rows(G, k, cols, in_k, column, C, C, EVEN)
            xg = tl.dot(g, tl.trans(x), xg, input_precision=PRECISION)
        else:
            d = r.to(tl.float32)
            center = center_of(tl.sum(d, 0), tl.sum(d * d, 0), K)
            r, d_d, d_r, c_r = prepare(d, center, in_k, X.dtype.element_ty)
            d2, dr, cr = d2 + d_d, dr + d_r, cr + c_r
        xr = tl.dot(r, tl.trans(x), xr, input_precision=PRECISION)
        x2 += squares(x, center)
    if BACKWARD:
        d2 = tl.load(TQ + k, mask=in_k, other=0.0)
        dr = tl.load(TQ + K + k, mask=in_k, other=0.0)
        cr = tl.load(TQ + 2 * K + k, mask=in_k, other=0.0)
    m, q = line_of(d2, dr, cr)
    distance = distances(x2, xr, m, q)
    a = softmax(distance, scale, in_k, in_n)
    slot = tl.program_id(0).to(tl.int64)
    if BACKWARD:
        factor = 2 * tl.load(R + k, mask=in_k, other=0.0).to(tl.float32)
        dg = tl.load(TQ + (b + 3) * K + k, mask=in_k, other=0.0)
        da = xg - dg[:, None]
        dl = a * (da - tl.sum(a * da, 0)[None, :])
        tl.store(PM + slot * 3 * K + k, tl.sum(a, 1), mask=in_k)
        w = (factor[:, None] * dl).to(X.dtype.element_ty)
        a = a.to(X.dtype.element_ty)
        tl.store(PM + slot * 3 * K + K + k, tl.sum(w.to(tl.float32), 1), mask=in_k)
        tl.store(PM + slot * 3 * K + 2 * K + k, tl.sum(dl * distance, 1), mask=in_k)
        if NEED_X:
            at, wt = tl.trans(a), tl.trans(-w)
            total = tl.sum(w.to(tl.float32), 0)
            for column in range(0, C, BC):
                x = load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
                r = load_rows(T, k, cols, in_k, column, C, C, EVEN)
                g = load_rows(G, k, cols, in_k, column, C, C, EVEN)
                dx = tl.dot(wt, r, input_precision=PRECISION)
                dx = tl.dot(at, g, dx, input_precision=PRECISION)
                center = load_center(Center, cols, column, C, EVEN)
                shifted = x.to(tl.float32) - center[None, :]
                dx = (dx + total[:, None] * shifted).to(X.dtype.element_ty)
                out = dX + (b * N + t * BN) * C
                store_rows(out, rows, cols, in_n, column, C, dx, C, EVEN)
        weights = w
    else:
        weights = a.to(X.dtype.element_ty)
        tl.store(PM + slot * K + k, tl.sum(weights.to(tl.float32), 1), mask=in_k)
    stored = PW + (b * N + t * BN) * KP + (rows[:, None] * KP + k[None, :])
    tl.store(stored, tl.trans(weights), mask=in_n[:, None])


@triton.jit
def aggregate_kernel(
    X,  # B x N x C, channels innermost
    PW,  # B x N x KP, weights in X's dtype
    P,  # B x splits x K x C, float32
    sxb,  # stride of X from image to image
    sxn,  # and from pixel to pixel
    N,  # pixels of an image
    splits,  # runs that an image's pixels are cut into
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    KP: tl.constexpr,  # K padded to a power of two, 16 at least
    BN: tl.constexpr,  # pixels of a tile
    BC: tl.constexpr,  # channels of a program
    PRECISION: tl.constexpr,  # of products: "tf32x3" where X is float32, else "tf32"
):
    """Split form: P[b, split, k, c] = sum over the split's pixels of PW x, for BC channels."""
    EVEN: tl.constexpr = C % BC == 0
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    column = tl.program_id(0) % CHUNKS * BC
    split = tl.program_id(0) // CHUNKS % splits
    b = (tl.program_id(0) // CHUNKS // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    total = tl.zeros((KP, BC), tl.float32)
    step = tl.cast(sxn, tl.int64) * BN
    begin, end = run_of(split, splits, tl.cdiv(N, BN))
    for t in range(begin, end):
        in_n = rows < N - t * BN
        tile = X + b * sxb + t * step
        x = load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
        stored = PW + (b * N + t * BN) * KP + (rows[:, None] * KP + k[None, :])
        w = tl.load(stored, mask=in_n[:, None], other=0.0)
        total = tl.dot(tl.trans(w), x, total, input_precision=PRECISION)
    out = P + (b * splits + split) * K * C
    store_rows(out, k, cols, k < K, column, C, total, C, EVEN)


@triton.jit
def tables_kernel(
    D,  # K x C, the codewords
    G,  # B x K x C, float32: dE
    T,  # (1 + B) K x C, in X's dtype: rows of d - c, called r, then of G
    TQ,  # (3 + B) K, float32: |d - c|^2, (d - c).r, c.r, then what is taken off x.G; see fused.py
    Center,  # C, float32: c of the first codewords
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    CP: tl.constexpr,  # C padded to a power of two
    FEW: tl.constexpr,  # how many codewords are the first
):
    """Tables of the split form backward; one row of C of T a program."""
    row = tl.program_id(0).to(tl.int64)
    k = row % K
    c = tl.arange(0, CP)
    in_c = c < C
    total = tl.zeros((CP,), tl.float32)
    total2 = tl.zeros((CP,), tl.float32)
    for i in tl.static_range(FEW):
        d = tl.load(D + i * C + c, mask=in_c, other=0.0).to(tl.float32)
        total, total2 = total + d, total2 + d * d
    center = center_of(total, total2, FEW)
    d = tl.load(D + k * C + c, mask=in_c, other=0.0).to(tl.float32)
    if row < K:
        r = (d - center).to(T.dtype.element_ty)
        tl.store(T + row * C + c, r, mask=in_c)
        exact = r.to(tl.float32)
        tl.store(TQ + k, tl.sum((d - center) * (d - center), 0))
        tl.store(TQ + K + k, tl.sum((d - center) * exact, 0))
        tl.store(TQ + 2 * K + k, tl.sum(exact * center, 0))
        if row == 0:
            tl.store(Center + c, center, mask=in_c)
    else:
        g = tl.load(G + (row - K) * C + c, mask=in_c, other=0.0)
        h = g.to(T.dtype.element_ty)
        tl.store(T + row * C + c, h, mask=in_c)
        tl.store(TQ + 2 * K + row, tl.sum(g * (d - center) + h.to(tl.float32) * center, 0))
