"""Triton kernels of the Encoding Layer; encode_triton.py launches them.

Letters as in encode.py; KP is K rounded up to a power of two, a product needs 16 at least. X is
channels last: X[b, n, c] with strides (sxb, sxn, 1). P is for partial sums, one slice a program.

Fused, forward: a program owns a run of pixels of one image and keeps sum_i a_ik x_i for all K and C
in registers, chunk by chunk. A tile of x is read once and feeds both products; the codewords stay
in shared memory from the first tile to the last. Where KP x C is too much for the registers, two
programs share the channels of the sum and both make the weights.

Fused, backward: the same walk. Weights and their gradients are made again from the tile, the tile's
dx is stored, and sum_i w_ik x_i stays in registers.

Split: for more channels or codewords, and where a fused kernel does not fit. One kernel makes the
weights (and dx) a tile at a time and stores the weights, B N KP entries; another sums over pixels.

Logits are K x pixels, codewords first: products then have few rows, the same instructions serve all
architectures, and the softmax runs along a warp's own registers.

The last kernel of each direction adds the partial sums in a fixed order.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy takes the empty one's type for good.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl


@triton.jit
def _load_rows(base, rows, cols, in_rows, column, stride, C: tl.constexpr, EVEN: tl.constexpr):
    """Rows x BC entries from `column` on; zeros outside."""
    pointers = base + (rows[:, None] * stride + cols[None, :]) + column
    if EVEN:
        return tl.load(pointers, mask=in_rows[:, None], other=0.0)
    return tl.load(pointers, mask=in_rows[:, None] & (cols + column < C)[None, :], other=0.0)


@triton.jit
def _store_rows(
    base, rows, cols, in_rows, column, stride, value, C: tl.constexpr, EVEN: tl.constexpr
):
    pointers = base + (rows[:, None] * stride + cols[None, :]) + column
    if EVEN:
        tl.store(pointers, value, mask=in_rows[:, None])
    else:
        tl.store(pointers, value, mask=in_rows[:, None] & (cols + column < C)[None, :])


@triton.jit
def _column(part, j: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr):
    """First channel of chunk j; a program's own chunks come first."""
    if OWN == CHUNKS:
        return j * BC
    return (part * OWN + j) % CHUNKS * BC


@triton.jit
def _load_tile(
    base, rows, cols, in_rows, part, stride,
    C: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A tile of rows as a tuple of chunks."""
    chunks = ()
    for j in tl.static_range(CHUNKS):
        column = _column(part, j, OWN, CHUNKS, BC)
        chunk = _load_rows(base, rows, cols, in_rows, column, stride, C, C == CHUNKS * BC)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def _softmax(distance, scale, in_k, in_n):
    """Weights K x pixels; 0 for codewords and pixels that are only padding."""
    logits = tl.where(in_k[:, None], scale[:, None] * distance, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    return tl.where(in_n[None, :], weights / tl.sum(weights, 0)[None, :], 0.0)


@triton.jit
def forward_kernel(
    X, D, S, P, PM, sxb, sxn, N, splits,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    OWN: tl.constexpr, CHUNKS: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P[b, split, k, c] = sum of a x over the split's pixels, PM[b, split, k] = sum of a."""
    EVEN: tl.constexpr = C == CHUNKS * BC
    part = tl.program_id(0) % (CHUNKS // OWN)
    split = tl.program_id(0) // (CHUNKS // OWN) % splits
    b = (tl.program_id(0) // (CHUNKS // OWN) // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K
    scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)

    codewords, sums = (), ()
    d2 = tl.zeros((KP,), tl.float32)
    for j in tl.static_range(CHUNKS):
        column = _column(part, j, OWN, CHUNKS, BC)
        # The norm is that of the codeword before rounding: rounding it would shift every distance
        # by the same amount, and that does not average out as the error of the product does.
        d = _load_rows(D, k, cols, in_k, column, C, C, EVEN).to(tl.float32)
        d2 += tl.sum(d * d, 1)
        codewords = codewords + (d.to(X.dtype.element_ty),)
    for _ in tl.static_range(OWN):
        sums = sums + (tl.zeros((KP, BC), tl.float32),)
    mass = tl.zeros((KP, BN), tl.float32)

    tiles = tl.cdiv(N, BN)
    begin, end = split * tiles // splits, (split + 1) * tiles // splits
    base, step = X + b * sxb, tl.cast(sxn, tl.int64) * BN
    if PREFETCH:
        first = base + begin * step
        x = _load_tile(first, rows, cols, rows < N - begin * BN, part, sxn, C, BC, OWN, CHUNKS)
    for t in range(begin, end):
        in_n = rows < N - t * BN
        if not PREFETCH:
            tile = base + t * step
            x = _load_tile(tile, rows, cols, in_n, part, sxn, C, BC, OWN, CHUNKS)
        xd = tl.zeros((KP, BN), tl.float32)
        x2 = tl.zeros((BN,), tl.float32)
        for j in tl.static_range(CHUNKS):
            xd = tl.dot(codewords[j], tl.trans(x[j]), xd, input_precision=PRECISION)
            x2 += tl.sum(x[j].to(tl.float32) * x[j].to(tl.float32), 1)
        if PREFETCH:
            # The tile is in shared memory now: its registers take the next one while the softmax
            # and the second product run.
            after = base + (t + 1) * step
            in_after = rows < tl.where(t + 1 < end, N - (t + 1) * BN, 0)
            following = _load_tile(after, rows, cols, in_after, part, sxn, C, BC, OWN, CHUNKS)
        a = _softmax(x2[None, :] - 2 * xd + d2[:, None], scale, in_k, in_n)
        a = a.to(X.dtype.element_ty)
        mass += a.to(tl.float32)
        added = ()
        for j in tl.static_range(OWN):
            added = added + (tl.dot(a, x[j], sums[j], input_precision=PRECISION),)
        sums = added
        if PREFETCH:
            x = following

    slot = b * splits + split
    if part == 0:
        tl.store(PM + slot * K + k, tl.sum(mass, 1), mask=in_k)
    for j in tl.static_range(OWN):
        column = _column(part, j, OWN, CHUNKS, BC)
        _store_rows(P + slot * K * C, k, cols, in_k, column, C, sums[j], C, EVEN)


@triton.jit
def backward_kernel(
    X, D, S, R, G, dX, P, PM, sxb, sxn, N, splits,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    CHUNKS: tl.constexpr, NEED_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX; P[b, split, k, c] = sum of w x; PM[b, split, :, k] = sums of a, w and dl |x - d|^2."""
    EVEN: tl.constexpr = C == CHUNKS * BC
    split = tl.program_id(0) % splits
    b = (tl.program_id(0) // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K
    scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)
    factor = 2 * tl.load(R + k, mask=in_k, other=0.0).to(tl.float32)

    codewords, grads, sums = (), (), ()
    d2 = tl.zeros((KP,), tl.float32)
    dg = tl.zeros((KP,), tl.float32)
    for j in tl.static_range(CHUNKS):
        d = _load_rows(D, k, cols, in_k, j * BC, C, C, EVEN).to(tl.float32)
        g = _load_rows(G + b * K * C, k, cols, in_k, j * BC, C, C, EVEN)
        d2 += tl.sum(d * d, 1)
        dg += tl.sum(d * g, 1)
        codewords = codewords + (d.to(X.dtype.element_ty),)
        grads = grads + (g.to(X.dtype.element_ty),)
        sums = sums + (tl.zeros((KP, BC), tl.float32),)
    mass = tl.zeros((KP,), tl.float32)
    moment = tl.zeros((KP,), tl.float32)
    slope = tl.zeros((KP,), tl.float32)

    step = tl.cast(sxn, tl.int64) * BN
    tiles = tl.cdiv(N, BN)
    for t in range(split * tiles // splits, (split + 1) * tiles // splits):
        in_n = rows < N - t * BN
        tile = X + b * sxb + t * step
        x = _load_tile(tile, rows, cols, in_n, 0, sxn, C, BC, CHUNKS, CHUNKS)
        xd = tl.zeros((KP, BN), tl.float32)
        xg = tl.zeros((KP, BN), tl.float32)
        x2 = tl.zeros((BN,), tl.float32)
        for j in tl.static_range(CHUNKS):
            xt = tl.trans(x[j])
            xd = tl.dot(codewords[j], xt, xd, input_precision=PRECISION)
            xg = tl.dot(grads[j], xt, xg, input_precision=PRECISION)
            x2 += tl.sum(x[j].to(tl.float32) * x[j].to(tl.float32), 1)
        distance = x2[None, :] - 2 * xd + d2[:, None]
        a = _softmax(distance, scale, in_k, in_n)
        da = xg - dg[:, None]
        dl = a * (da - tl.sum(a * da, 0)[None, :])
        mass += tl.sum(a, 1)
        w = (factor[:, None] * dl).to(X.dtype.element_ty)
        a = a.to(X.dtype.element_ty)
        moment += tl.sum(w.to(tl.float32), 1)
        slope += tl.sum(dl * distance, 1)
        # dx before the sums: the other order needs more registers than there are.
        if NEED_X:
            at, wt = tl.trans(a), tl.trans(-w)
            total = tl.sum(w.to(tl.float32), 0)
            for j in tl.static_range(CHUNKS):
                dx = tl.dot(wt, codewords[j], input_precision=PRECISION)
                dx = tl.dot(at, grads[j], dx, input_precision=PRECISION)
                dx = (dx + total[:, None] * x[j].to(tl.float32)).to(X.dtype.element_ty)
                out = dX + (b * N + t * BN) * C
                _store_rows(out, rows, cols, in_n, j * BC, C, dx, C, EVEN)
        added = ()
        for j in tl.static_range(CHUNKS):
            added = added + (tl.dot(w, x[j], sums[j], input_precision=PRECISION),)
        sums = added

    slot = b * splits + split
    tl.store(PM + slot * 3 * K + k, mass, mask=in_k)
    tl.store(PM + slot * 3 * K + K + k, moment, mask=in_k)
    tl.store(PM + slot * 3 * K + 2 * K + k, slope, mask=in_k)
    for j in tl.static_range(CHUNKS):
        _store_rows(P + slot * K * C, k, cols, in_k, j * BC, C, sums[j], C, EVEN)


@triton.jit
def weights_kernel(
    X, T, TQ, S, R, dX, PW, PM, sxb, sxn, N, tiles,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BACKWARD: tl.constexpr, NEED_X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Split form: one tile a program. Forward: PW = a. Backward: PW = w, and dX.

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
    xd = tl.zeros((KP, BN), tl.float32)
    x2 = tl.zeros((BN,), tl.float32)
    d2 = tl.zeros((KP,), tl.float32)
    xg = tl.zeros((KP, BN), tl.float32)
    for column in range(0, C, BC):
        x = _load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
        d = _load_rows(T, k, cols, in_k, column, C, C, EVEN)
        xd = tl.dot(d.to(X.dtype.element_ty), tl.trans(x), xd, input_precision=PRECISION)
        x2 += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        if BACKWARD:
            g = _load_rows(G, k, cols, in_k, column, C, C, EVEN)
            xg = tl.dot(g, tl.trans(x), xg, input_precision=PRECISION)
        else:
            d2 += tl.sum(d.to(tl.float32) * d.to(tl.float32), 1)
    if BACKWARD:
        d2 = tl.load(TQ + k, mask=in_k, other=0.0)
    distance = x2[None, :] - 2 * xd + d2[:, None]
    a = _softmax(distance, scale, in_k, in_n)
    slot = tl.program_id(0).to(tl.int64)
    if BACKWARD:
        factor = 2 * tl.load(R + k, mask=in_k, other=0.0).to(tl.float32)
        dg = tl.load(TQ + (b + 1) * K + k, mask=in_k, other=0.0)
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
                x = _load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
                d = _load_rows(T, k, cols, in_k, column, C, C, EVEN)
                g = _load_rows(G, k, cols, in_k, column, C, C, EVEN)
                dx = tl.dot(wt, d, input_precision=PRECISION)
                dx = tl.dot(at, g, dx, input_precision=PRECISION)
                dx = (dx + total[:, None] * x.to(tl.float32)).to(X.dtype.element_ty)
                out = dX + (b * N + t * BN) * C
                _store_rows(out, rows, cols, in_n, column, C, dx, C, EVEN)
        weights = w
    else:
        weights = a.to(X.dtype.element_ty)
        tl.store(PM + slot * K + k, tl.sum(weights.to(tl.float32), 1), mask=in_k)
    stored = PW + (b * N + t * BN) * KP + (rows[:, None] * KP + k[None, :])
    tl.store(stored, tl.trans(weights), mask=in_n[:, None])


@triton.jit
def aggregate_kernel(
    X, PW, P, sxb, sxn, N, splits,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Split form: P[b, split, k, c] = sum over the split's pixels of PW x, for BC channels."""
    EVEN: tl.constexpr = C % BC == 0
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    column = tl.program_id(0) % CHUNKS * BC
    split = tl.program_id(0) // CHUNKS % splits
    b = (tl.program_id(0) // CHUNKS // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    total = tl.zeros((KP, BC), tl.float32)
    step = tl.cast(sxn, tl.int64) * BN
    tiles = tl.cdiv(N, BN)
    for t in range(split * tiles // splits, (split + 1) * tiles // splits):
        in_n = rows < N - t * BN
        tile = X + b * sxb + t * step
        x = _load_rows(tile, rows, cols, in_n, column, sxn, C, EVEN)
        stored = PW + (b * N + t * BN) * KP + (rows[:, None] * KP + k[None, :])
        w = tl.load(stored, mask=in_n[:, None], other=0.0)
        total = tl.dot(tl.trans(w), x, total, input_precision=PRECISION)
    out = P + (b * splits + split) * K * C
    _store_rows(out, k, cols, k < K, column, C, total, C, EVEN)


@triton.jit
def tables_kernel(D, G, T, TQ, C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr):
    """T = codewords, then G, in X's dtype; TQ = |d|^2, then d.G; one row of C a program."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    d = tl.load(D + row % K * C + c, mask=c < C, other=0.0).to(tl.float32)
    value = d
    if row >= K:
        value = tl.load(G + (row - K) * C + c, mask=c < C, other=0.0)
    tl.store(T + row * C + c, value.to(T.dtype.element_ty), mask=c < C)
    tl.store(TQ + row, tl.sum(value * d, 0))


@triton.jit
def finish_forward_kernel(
    P, PM, D, E, ESUM, EM2, splits, mass_splits,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def finish_backward_kernel(
    P, PM, G, D, dD, dS, images, splits, mass_splits,
    C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
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
