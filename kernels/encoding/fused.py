"""Triton kernels of the Encoding Layer; plan.py launches them.

x is B x C x N (images, channels, pixels); there are K codewords d, and a are the weights that
operator.py defines, w their part in the gradients. X[b, n, c] has strides (sxb, sxn, 1).

Forward: a program owns a run of pixels of one image and keeps sum_i a_ik x_i for all K and C in
registers, chunk by chunk. A tile of x is read once and feeds both products; the codewords stay in
shared memory from the first tile to the last. Where K x C is too much for the registers, two
programs share the channels of the sum and both make the weights.

Backward: the same walk. The weights are recomputed from the tile and their gradients made, the
tile's dx is stored, and sum_i w_ik x_i stays in registers. The kernel here is for up to 128
channels; that for more is in paired.py.

Distances are those between x - c and d - c, where c is roughly the mean codeword (`center_of`), so
an offset that x and d share costs no digits. Products still take x as it is, and d - c rounded to
x's dtype: what c adds to them is the same for all pixels, and is subtracted with the norms.

A separate kernel then adds the programs' sums in a fixed order. WHOLE is for small images: a
program owns all pixels of one, makes its E and, backward, its share of the parameters' gradients,
which the programs that finish last add up. Both are in finish.py; kernels for what does not fit
into these are in split.py.

Logits are K x pixels, codewords first: products then have few rows, the same instructions serve all
architectures, and the softmax runs along a warp's own registers.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy keeps the type of the empty one.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from .finish import add_images, clear_counters


@triton.jit
def run_of(split, splits, tiles):
    """First tile of a program's run and the one after its last; no number exceeds `tiles`."""
    each, more = tiles // splits, tiles % splits
    begin = split * each + tl.minimum(split, more)
    return begin, begin + each + (split < more).to(tl.int32)


@triton.jit
def load_rows(base, rows, cols, in_rows, column, stride, C: tl.constexpr, EVEN: tl.constexpr):
    """Rows x BC entries from `column` on; zeros outside."""
    pointers = base + (rows[:, None] * stride + cols[None, :]) + column
    if EVEN:
        return tl.load(pointers, mask=in_rows[:, None], other=0.0)
    return tl.load(pointers, mask=in_rows[:, None] & (cols + column < C)[None, :], other=0.0)


@triton.jit
def store_rows(
    base, rows, cols, in_rows, column, stride, value, C: tl.constexpr, EVEN: tl.constexpr
):
    pointers = base + (rows[:, None] * stride + cols[None, :]) + column
    if EVEN:
        tl.store(pointers, value, mask=in_rows[:, None])
    else:
        tl.store(pointers, value, mask=in_rows[:, None] & (cols + column < C)[None, :])


@triton.jit
def _column(part, j: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr):
    """First channel of chunk j, of BC channels.

    Where programs share the CHUNKS chunks, `part` is the program's place among them, and the OWN
    chunks whose sums it keeps come first.
    """
    if OWN == CHUNKS:
        return j * BC
    return (part * OWN + j) % CHUNKS * BC


@triton.jit
def load_tile(
    base, rows, cols, in_rows, part, stride,
    C: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A tile of rows as a tuple of CHUNKS chunks, rows x BC each; see `_column`."""
    chunks = ()
    for j in tl.static_range(CHUNKS):
        column = _column(part, j, OWN, CHUNKS, BC)
        chunk = load_rows(base, rows, cols, in_rows, column, stride, C, C == CHUNKS * BC)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def center_of(total, total2, count: tl.constexpr):
    """c of some channels, from the sums of that many codewords and of their squares.

    That is their mean, or 0 where the mean is within four times what chance gives for codewords
    around 0: x is around 0 there too, and the error of c with a rounded G would not average out.
    """
    mean = total / count
    chance = tl.maximum(total2 / count - mean * mean, 0.0) / count
    return tl.where(mean * mean > 16 * chance, mean, 0.0)


@triton.jit
def prepare(d, center, in_k, dtype: tl.constexpr):
    """r, d - c in the dtype of products, with |d - c|^2, (d - c).r and c.r; d is rows x BC, fp32.

    d is zero outside, center too.
    """
    u = tl.where(in_k[:, None], d - center[None, :], 0.0)
    r = u.to(dtype)
    exact = r.to(tl.float32)
    return r, tl.sum(u * u, 1), tl.sum(u * exact, 1), tl.sum(exact * center[None, :], 1)


@triton.jit
def line_of(d2, dr, cr):
    """(m, q), K each, for |x - d|^2 = |x - c|^2 - m x.r + q, of the sums of what `prepare` gives.

    m scales r to the right length along d - c: an error there would be the same for all pixels near
    d, and would not average out as the error across it does.
    """
    m = tl.where(dr == 0, 2.0, 2 * d2 / tl.where(dr == 0, 1.0, dr))
    return m, d2 + m * cr


@triton.jit
def distances(x2, xr, m, q):
    """|x - d|^2, K x pixels, of x.r, K x pixels, and |x - c|^2, a pixel."""
    return x2[None, :] - m[:, None] * xr + q[:, None]


@triton.jit
def offsets(d, g, h, center):
    """What is taken off x.h for (x - d).G: (d - c).G + c.h, where h is G in the dtype of products.

    x and c are multiplied by the same h, so that what they share cancels; d, which is the same for
    all pixels, is multiplied by G before rounding.
    """
    return tl.sum(g * (d - center[None, :]) + h.to(tl.float32) * center[None, :], 1)


@triton.jit
def squares(x, center):
    """|x - c|^2 of rows x BC entries."""
    shifted = x.to(tl.float32) - center[None, :]
    return tl.sum(shifted * shifted, 1)


@triton.jit
def squares_of_columns(xt, center):
    """The same of rows that are given as columns."""
    shifted = xt.to(tl.float32) - center[:, None]
    return tl.sum(shifted * shifted, 0)


@triton.jit
def load_center(Center, cols, column, C: tl.constexpr, EVEN: tl.constexpr):
    """BC entries of c from `column` on; zeros outside."""
    if EVEN:
        return tl.load(Center + column + cols)
    return tl.load(Center + column + cols, mask=cols + column < C, other=0.0)


@triton.jit
def store_center(D, own, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """Write c of all codewords to `own`, where the whole program can read it.

    A thread adds up its own channels: sums over the rows of a chunk of codewords would go through
    shared memory, with up to tenfold bank conflicts.
    """
    c = tl.arange(0, CP)
    total = tl.zeros((CP,), tl.float32)
    total2 = tl.zeros((CP,), tl.float32)
    for i in range(K):
        d = tl.load(D + i * C + c, mask=c < C, other=0.0).to(tl.float32)
        total, total2 = total + d, total2 + d * d
    tl.store(own + c, center_of(total, total2, K), mask=c < C)
    tl.debug_barrier()


@triton.jit
def softmax(distance, scale, in_k, in_n):
    """Weights K x pixels; 0 for codewords and pixels that are only padding."""
    logits = tl.where(in_k[:, None], scale[:, None] * distance, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    return weights * tl.where(in_n, 1 / tl.sum(weights, 0), 0.0)[None, :]


@triton.jit
def _store_code(
    E, ESUM, EM2, D, sums, mass, b,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """E[b] from the sums over all its pixels and the mass of each codeword; its sum and M2.

    `sums` are CHUNKS chunks of sum_i a_ik x_i, KP x BC each, mass is sum_i a_ik, KP; the other
    arguments are those of forward_kernel.
    """
    EVEN: tl.constexpr = C == CHUNKS * BC
    cols, k = tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K
    code_sum = tl.zeros((KP,), tl.float32)
    codes = ()
    for j in tl.static_range(CHUNKS):
        d = load_rows(D, k, cols, in_k, j * BC, C, C, EVEN).to(tl.float32)
        code = sums[j] - mass[:, None] * d
        store_rows(E + b * K * C, k, cols, in_k, j * BC, C, code, C, EVEN)
        code_sum += tl.sum(code, 1)
        codes = codes + (code,)
    if STATS:
        m2 = tl.zeros((KP,), tl.float32)
        for j in tl.static_range(CHUNKS):
            centred = codes[j] - (code_sum / C)[:, None]
            centred = tl.where((cols + j * BC < C)[None, :], centred, 0.0)
            m2 += tl.sum(centred * centred, 1)
        tl.store(ESUM + b * K + k, code_sum, mask=in_k)
        tl.store(EM2 + b * K + k, m2, mask=in_k)


@triton.jit
def forward_kernel(
    X,  # B x N x C, channels innermost
    D,  # K x C, the codewords d
    S,  # K, the scale
    P,  # B x splits x K x C, float32: sums of a x; not written if WHOLE
    PM,  # B x splits x K, float32: sums of a, the mass of each codeword; not written if WHOLE
    E,  # B x K x C, float32; this and the next three are written if WHOLE
    ESUM,  # B x K, float32: sum of E over its channels; only with STATS
    EM2,  # B x K, float32: sum of its squares about their mean; only with STATS
    Own,  # programs x C, float32: c, unless it stays in registers (HELD)
    Count,  # B + 1, int32: the counters of the backward pass
    sxb,  # stride of X from image to image
    sxn,  # and from pixel to pixel
    N,  # pixels of an image
    splits,  # runs that an image's pixels are cut into
    Boxes,  # None, or what reads X (CHUNKS is 1): a tensor descriptor, boxes of 1 x BN x BC
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    KP: tl.constexpr,  # K padded to a power of two, 16 at least
    CP: tl.constexpr,  # C padded to a power of two
    BN: tl.constexpr,  # pixels of a tile
    BC: tl.constexpr,  # channels of a chunk, which one product covers
    OWN: tl.constexpr,  # chunks whose sums this program keeps; all of them unless programs share
    CHUNKS: tl.constexpr,  # chunks of all channels, a multiple of OWN
    HELD: tl.constexpr,  # c stays in registers
    AHEAD: tl.constexpr,  # read the following tile while this one is worked on
    WHOLE: tl.constexpr,  # a program has all pixels of an image (splits is 1) and makes its E
    STATS: tl.constexpr,  # write ESUM and EM2
    PRECISION: tl.constexpr,  # of products: "tf32x3" where X is float32, else "tf32"
):
    """P[b, split, k, c] = sum of a x over the split's pixels, PM[b, split, k] = sum of a.

    WHOLE, with one split and all channels in one program: E[b, k, c], and its statistics.
    """
    EVEN: tl.constexpr = C == CHUNKS * BC
    part = tl.program_id(0) % (CHUNKS // OWN)
    split = tl.program_id(0) // (CHUNKS // OWN) % splits
    b = (tl.program_id(0) // (CHUNKS // OWN) // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K
    scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)

    codewords, centers, sums = (), (), ()
    d2 = tl.zeros((KP,), tl.float32)
    dr = tl.zeros((KP,), tl.float32)
    cr = tl.zeros((KP,), tl.float32)
    own = Own + tl.program_id(0).to(tl.int64) * C
    if not HELD:
        store_center(D, own, K, C, CP)
    for j in tl.static_range(CHUNKS):
        column = _column(part, j, OWN, CHUNKS, BC)
        d = load_rows(D, k, cols, in_k, column, C, C, EVEN).to(tl.float32)
        if HELD:
            center = center_of(tl.sum(d, 0), tl.sum(d * d, 0), K)
            centers = centers + (center,)
        else:
            center = load_center(own, cols, column, C, EVEN)
        r, d_d, d_r, c_r = prepare(d, center, in_k, X.dtype.element_ty)
        d2, dr, cr = d2 + d_d, dr + d_r, cr + c_r
        codewords = codewords + (r,)
    m, q = line_of(d2, dr, cr)
    for _ in tl.static_range(OWN):
        sums = sums + (tl.zeros((KP, BC), tl.float32),)
    mass = tl.zeros((KP, BN), tl.float32)

    begin, end = run_of(split, splits, tl.cdiv(N, BN))
    base, step = X + b * sxb, tl.cast(sxn, tl.int64) * BN
    if AHEAD:
        first = base + begin * step
        x = load_tile(first, rows, cols, rows < N - begin * BN, part, sxn, C, BC, OWN, CHUNKS)
    for t in range(begin, end):
        in_n = rows < N - t * BN
        if Boxes is not None:
            # One box, not one a chunk: Triton waits for each box apart, and after a wait keeps in
            # registers what the second product needs of it. Zeros outside the image.
            x = (Boxes.load([b.to(tl.int32), t * BN, 0]).reshape(BN, BC),)
        elif not AHEAD:
            tile = base + t * step
            x = load_tile(tile, rows, cols, in_n, part, sxn, C, BC, OWN, CHUNKS)
        xr = tl.zeros((KP, BN), tl.float32)
        x2 = tl.zeros((BN,), tl.float32)
        for j in tl.static_range(CHUNKS):
            xt = tl.trans(x[j])
            xr = tl.dot(codewords[j], xt, xr, input_precision=PRECISION)
            if HELD:
                center = centers[j]
            else:
                column = _column(part, j, OWN, CHUNKS, BC)
                # t is never below 0. If the address were the same for all tiles, the compiler
                # would keep the values in registers throughout.
                here = own + tl.minimum(t, 0) * C
                center = load_center(here, cols, column, C, EVEN)
            if Boxes is not None:
                # Of rows, the compiler reads half of the entries one by one from shared memory.
                x2 += squares_of_columns(xt, center)
            else:
                x2 += squares(x[j], center)
        if AHEAD:
            # The tile is in shared memory now, so its registers are free for the next one while
            # the softmax and the second product run.
            after = base + (t + 1) * step
            in_after = rows < tl.where(t + 1 < end, N - (t + 1) * BN, 0)
            following = load_tile(after, rows, cols, in_after, part, sxn, C, BC, OWN, CHUNKS)
        a = softmax(distances(x2, xr, m, q), scale, in_k, in_n)
        a = a.to(X.dtype.element_ty)
        mass += a.to(tl.float32)
        added = ()
        for j in tl.static_range(OWN):
            added = added + (tl.dot(a, x[j], sums[j], input_precision=PRECISION),)
        sums = added
        if AHEAD:
            x = following

    if WHOLE:
        _store_code(E, ESUM, EM2, D, sums, tl.sum(mass, 1), b, C, K, KP, BC, CHUNKS, STATS)
        clear_counters(Count, b)
    else:
        slot = b * splits + split
        if part == 0:
            tl.store(PM + slot * K + k, tl.sum(mass, 1), mask=in_k)
        for j in tl.static_range(OWN):
            column = _column(part, j, OWN, CHUNKS, BC)
            store_rows(P + slot * K * C, k, cols, in_k, column, C, sums[j], C, EVEN)


@triton.jit
def _store_share(
    P, D, G, sums, mass, moment, slope, b,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Image b's row of P: its share of dD and dS from the sums over all its pixels.

    `sums` are CHUNKS chunks of sum_i w_ik x_i, KP x BC each; mass, moment and slope, KP, are the
    sums of a, of w and of dl |x - d|^2. The other arguments are those of backward_kernel.
    """
    EVEN: tl.constexpr = C == CHUNKS * BC
    cols, k = tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K
    share = P + b * (K * (C + 1))
    for j in tl.static_range(CHUNKS):
        d = load_rows(D, k, cols, in_k, j * BC, C, C, EVEN).to(tl.float32)
        g = load_rows(G + b * K * C, k, cols, in_k, j * BC, C, C, EVEN)
        grad_d = moment[:, None] * d - mass[:, None] * g - sums[j]
        store_rows(share, k, cols, in_k, j * BC, C, grad_d, C, EVEN)
    tl.store(share + K * C + k, slope, mask=in_k)


@triton.jit
def backward_kernel(
    X,  # B x N x C, channels innermost
    D,  # K x C, the codewords d
    S,  # K, the scale
    R,  # K, the scale in w: S, or another one where that is asked for
    G,  # B x K x C, float32, contiguous: dE
    dX,  # B x N x C, contiguous; or empty, without NEED_X
    P,  # B x splits x K x C, float32: sums of w x; WHOLE: rows of K (C + 1), see add_images
    PM,  # B x splits x 3 x K, float32: sums of a, of w and of dl |x - d|^2; not if WHOLE
    dD,  # K x C; this and the next two are written if WHOLE
    dS,  # K
    Count,  # B + 1, int32, at zero: how many images, and groups of images, are done
    sxb,  # stride of X from image to image
    sxn,  # and from pixel to pixel
    N,  # pixels of an image
    splits,  # runs that an image's pixels are cut into
    images,  # B
    group,  # images whose rows one program adds up, if WHOLE
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    KP: tl.constexpr,  # K padded to a power of two, 16 at least
    BN: tl.constexpr,  # pixels of a tile
    BC: tl.constexpr,  # channels of a chunk, which one product covers
    CHUNKS: tl.constexpr,  # chunks of all channels
    BE: tl.constexpr,  # entries of a row of P that add_images takes at once
    NEED_X: tl.constexpr,  # write dX
    WHOLE: tl.constexpr,  # a program has all pixels of an image (splits is 1)
    PRECISION: tl.constexpr,  # of products: "tf32x3" where X is float32, else "tf32"
):
    """dX; P[b, split, k, c] = sum of w x; PM[b, split, :, k] = sums of a, w and dl |x - d|^2.

    WHOLE, with one split: dX, dD and dS; see add_images.
    """
    EVEN: tl.constexpr = C == CHUNKS * BC
    split = tl.program_id(0) % splits
    b = (tl.program_id(0) // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K

    codewords, grads, centers, sums = (), (), (), ()
    d2 = tl.zeros((KP,), tl.float32)
    dr = tl.zeros((KP,), tl.float32)
    cr = tl.zeros((KP,), tl.float32)
    dg = tl.zeros((KP,), tl.float32)
    for j in tl.static_range(CHUNKS):
        d = load_rows(D, k, cols, in_k, j * BC, C, C, EVEN).to(tl.float32)
        g = load_rows(G + b * K * C, k, cols, in_k, j * BC, C, C, EVEN)
        center = center_of(tl.sum(d, 0), tl.sum(d * d, 0), K)
        r, d_d, d_r, c_r = prepare(d, center, in_k, X.dtype.element_ty)
        d2, dr, cr = d2 + d_d, dr + d_r, cr + c_r
        h = g.to(X.dtype.element_ty)
        dg += offsets(d, g, h, center)
        codewords = codewords + (r,)
        grads = grads + (h,)
        sums = sums + (tl.zeros((KP, BC), tl.float32),)
        centers = centers + (center,)
    m, q = line_of(d2, dr, cr)
    mass = tl.zeros((KP,), tl.float32)
    moment = tl.zeros((KP,), tl.float32)
    slope = tl.zeros((KP,), tl.float32)

    step = tl.cast(sxn, tl.int64) * BN
    begin, end = run_of(split, splits, tl.cdiv(N, BN))
    for t in range(begin, end):
        in_n = rows < N - t * BN
        tile = X + b * sxb + t * step
        x = load_tile(tile, rows, cols, in_n, 0, sxn, C, BC, CHUNKS, CHUNKS)
        xr = tl.zeros((KP, BN), tl.float32)
        xg = tl.zeros((KP, BN), tl.float32)
        x2 = tl.zeros((BN,), tl.float32)
        for j in tl.static_range(CHUNKS):
            xt = tl.trans(x[j])
            xr = tl.dot(codewords[j], xt, xr, input_precision=PRECISION)
            xg = tl.dot(grads[j], xt, xg, input_precision=PRECISION)
            x2 += squares(x[j], centers[j])
        distance = distances(x2, xr, m, q)
        scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)
        a = softmax(distance, scale, in_k, in_n)
        da = xg - dg[:, None]
        dl = a * (da - tl.sum(a * da, 0)[None, :])
        mass += tl.sum(a, 1)
        factor = 2 * tl.load(R + k, mask=in_k, other=0.0).to(tl.float32)
        w = (factor[:, None] * dl).to(X.dtype.element_ty)
        a = a.to(X.dtype.element_ty)
        moment += tl.sum(w.to(tl.float32), 1)
        slope += tl.sum(dl * distance, 1)
        # dx before the sums: the other order needs more registers than there are.
        if NEED_X:
            at, wt = tl.trans(a), tl.trans(-w)
            total = tl.sum(w.to(tl.float32), 0)
            for j in tl.static_range(CHUNKS):
                dx = -total[:, None] * centers[j][None, :]
                dx = tl.dot(wt, codewords[j], dx, input_precision=PRECISION)
                dx = tl.dot(at, grads[j], dx, input_precision=PRECISION)
                dx = (dx + total[:, None] * x[j].to(tl.float32)).to(X.dtype.element_ty)
                out = dX + (b * N + t * BN) * C
                store_rows(out, rows, cols, in_n, j * BC, C, dx, C, EVEN)
        added = ()
        for j in tl.static_range(CHUNKS):
            added = added + (tl.dot(w, x[j], sums[j], input_precision=PRECISION),)
        sums = added

    if WHOLE:
        _store_share(P, D, G, sums, mass, moment, slope, b, C, K, KP, BC, CHUNKS)
        add_images(P, dD, dS, Count, b, images, group, C, K, BE)
    else:
        slot = b * splits + split
        tl.store(PM + slot * 3 * K + k, mass, mask=in_k)
        tl.store(PM + slot * 3 * K + K + k, moment, mask=in_k)
        tl.store(PM + slot * 3 * K + 2 * K + k, slope, mask=in_k)
        for j in tl.static_range(CHUNKS):
            store_rows(P + slot * K * C, k, cols, in_k, j * BC, C, sums[j], C, EVEN)
