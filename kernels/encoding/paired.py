"""Triton kernel of the Encoding Layer's backward pass for many channels; see fused.py.

It differs from the kernel for few channels in the order of products. Each codeword and its row of G
lie next to one another, 2K rows of C in shared memory, and a product of a tile's pixels with them
gives x.r and x.G. The weights go back into pairs, and one more product with the same rows makes dx.
So no warp repeats the work of another, and each reads only its own rows. The sums leave room for
the next tile in registers, because numbers per codeword take few, and because a tile that no
product transposes is stored in shared memory once and then not held.
"""

from __future__ import annotations

# Kernels grow tuples in unrolled loops, and mypy keeps the type of the empty one.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from .fused import (
    line_of,
    load_center,
    load_rows,
    load_tile,
    squares,
    store_center,
    store_rows,
)


@triton.jit
def _paired(first, second, BN: tl.constexpr, KP: tl.constexpr):
    """Columns of the first and of the second in turn.

    Not by `tl.join`, after which Triton reads operands of products from shared memory in a way that
    takes more accesses.
    """
    first = tl.broadcast_to(first[:, :, None], (BN, KP, 2))
    second = tl.broadcast_to(second[:, :, None], (BN, KP, 2))
    is_first = (tl.arange(0, 2) == 0)[None, None, :]
    return tl.reshape(tl.where(is_first, first, second), (BN, 2 * KP))


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _load_pairs(
    X, D, G, own, K: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
    BC: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Chunks of the pairs in X's dtype: a codeword less the center and, below it, its row of G.

    Writes c, and m and q of the pairs, to `own`; G is that of the program's image.
    """
    cols, row = tl.arange(0, BC), tl.arange(0, 2 * KP)
    is_g, in_row = row % 2 == 1, row // 2 < K
    store_center(D, own, K, C, CP)
    pairs = ()
    exact2 = tl.zeros((2 * KP,), tl.float32)
    rounded2 = tl.zeros((2 * KP,), tl.float32)
    off = tl.zeros((2 * KP,), tl.float32)
    for j in tl.static_range(CHUNKS):
        d = load_rows(D, row // 2, cols, in_row, j * BC, C, C, EVEN).to(tl.float32)
        g = load_rows(G, row // 2, cols, in_row & is_g, j * BC, C, C, EVEN)
        center = load_center(own, cols, j * BC, C, EVEN)
        d = tl.where(in_row[:, None], d - center[None, :], 0.0)
        exact = tl.where(is_g[:, None], g, d)
        pair = exact.to(X.dtype.element_ty)
        rounded = pair.to(tl.float32)
        exact2 += tl.sum(exact * d, 1)
        rounded2 += tl.sum(rounded * d, 1)
        off += tl.sum(rounded * center[None, :], 1)
        pairs = pairs + (pair,)
    m, q = line_of(exact2, rounded2, off)
    tl.store(own + C + row, tl.where(is_g, -1.0, m))
    tl.store(own + C + 2 * KP + row, tl.where(is_g, -exact2 - off, q))
    tl.debug_barrier()
    return pairs


@triton.jit
def paired_backward_kernel(
    X,  # B x N x C, channels innermost
    D,  # K x C, the codewords d
    S,  # K, the scale
    R,  # K, the scale in w: S, or another one where that is asked for
    G,  # B x K x C, float32, contiguous: dE
    dX,  # B x N x C, contiguous; or empty, without NEED_X
    P,  # B x splits x K x C, float32: sums of w x
    PM,  # B x splits x 3 x K, float32: sums of a, of w and of dl |x - d|^2
    Own,  # programs x (C + 4 KP), float32: c, and m and q of the pairs
    sxb,  # stride of X from image to image
    sxn,  # and from pixel to pixel
    N,  # pixels of an image
    splits,  # runs that an image's pixels are cut into
    C: tl.constexpr,  # channels
    K: tl.constexpr,  # codewords
    KP: tl.constexpr,  # K padded to a power of two, 16 at least
    CP: tl.constexpr,  # C padded to a power of two
    BN: tl.constexpr,  # pixels of a tile
    BC: tl.constexpr,  # channels of a chunk, which one product covers
    CHUNKS: tl.constexpr,  # chunks of all channels
    AHEAD: tl.constexpr,  # read the following tile while this one is worked on
    NEED_X: tl.constexpr,  # write dX
    PRECISION: tl.constexpr,  # of products: "tf32x3" where X is float32, else "tf32"
):
    """dX; P[b, split, k, c] = sum of w x; PM[b, split, :, k] = sums of a, w and dl |x - d|^2."""
    EVEN: tl.constexpr = C == CHUNKS * BC
    split = tl.program_id(0) % splits
    b = (tl.program_id(0) // splits).to(tl.int64)
    rows, cols, k = tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, KP)
    in_k = k < K

    own = Own + tl.program_id(0).to(tl.int64) * (C + 4 * KP)
    pairs = _load_pairs(X, D, G + b * K * C, own, K, C, KP, CP, BC, CHUNKS, EVEN)
    row = tl.arange(0, 2 * KP)
    is_g = row % 2 == 1
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((KP, BC), tl.float32),)
    mass = tl.zeros((KP,), tl.float32)
    moment = tl.zeros((KP,), tl.float32)
    slope = tl.zeros((KP,), tl.float32)

    step = tl.cast(sxn, tl.int64) * BN
    # As `run_of`, in fewer registers: for the products to overflow, x would take 130 GB.
    tiles = tl.cdiv(N, BN)
    begin, end = split * tiles // splits, (split + 1) * tiles // splits
    base = X + b * sxb
    if AHEAD:
        first = base + begin * step
        x = load_tile(first, rows, cols, rows < N - begin * BN, 0, sxn, C, BC, CHUNKS, CHUNKS)
    for t in range(begin, end):
        in_n = rows < N - t * BN
        tile = base + t * step
        if not AHEAD:
            x = load_tile(tile, rows, cols, in_n, 0, sxn, C, BC, CHUNKS, CHUNKS)
        both = tl.zeros((BN, 2 * KP), tl.float32)
        x2 = tl.zeros((BN,), tl.float32)
        following = ()
        in_after = rows < tl.where(t + 1 < end, N - (t + 1) * BN, 0)
        for j in tl.static_range(CHUNKS):
            both = tl.dot(x[j], tl.trans(pairs[j]), both, input_precision=PRECISION)
            x2 += squares(x[j], load_center(own, cols, j * BC, C, EVEN))
            if AHEAD:
                chunk = load_rows(tile + step, rows, cols, in_after, j * BC, sxn, C, EVEN)
                following = following + (chunk,)
        # Registers are scarce: numbers per codeword are read where they are used.
        m, q = tl.load(own + C + row), tl.load(own + C + 2 * KP + row)
        both = tl.where(is_g[None, :], 0.0, x2[:, None]) - both * m[None, :] + q[None, :]
        distance, da = tl.split(tl.reshape(both, (BN, KP, 2)))
        scale = tl.load(S + k, mask=in_k, other=0.0).to(tl.float32)
        logits = tl.where(in_k[None, :], scale[None, :] * distance, float("-inf"))
        e = tl.exp(logits - tl.max(logits, 1)[:, None])
        whole, mean = tl.reduce((e, e * da), 1, _add_both)
        share = tl.where(in_n, 1 / whole, 0.0)
        a = e * share[:, None]
        dl = a * (da - (mean * share)[:, None])
        factor = 2 * tl.load(R + k, mask=in_k, other=0.0).to(tl.float32)
        w = (factor[None, :] * dl).to(X.dtype.element_ty)
        mass += tl.sum(a, 0)
        moment += tl.sum(w.to(tl.float32), 0)
        slope += tl.sum(dl * distance, 0)
        if NEED_X:
            total = tl.sum(w.to(tl.float32), 1)
            back = _paired(-w, a.to(X.dtype.element_ty), BN, KP)
            for j in tl.static_range(CHUNKS):
                center = load_center(own, cols, j * BC, C, EVEN)
                dx = tl.dot(back, pairs[j], input_precision=PRECISION)
                # Read again, from the cache: the registers hold the following tile.
                again = load_rows(tile, rows, cols, in_n, j * BC, sxn, C, EVEN)
                shifted = again.to(tl.float32) - center[None, :]
                dx = tl.fma(tl.broadcast_to(total[:, None], (BN, BC)), shifted, dx)
                dx = dx.to(X.dtype.element_ty)
                out = dX + (b * N + t * BN) * C
                store_rows(out, rows, cols, in_n, j * BC, C, dx, C, EVEN)
        added = ()
        for j in tl.static_range(CHUNKS):
            product = tl.dot(tl.trans(w), x[j], sums[j], input_precision=PRECISION)
            added = added + (product,)
        sums = added
        if AHEAD:
            x = following

    slot = tl.program_id(0).to(tl.int64)
    tl.store(PM + slot * 3 * K + k, mass, mask=in_k)
    tl.store(PM + slot * 3 * K + K + k, moment, mask=in_k)
    tl.store(PM + slot * 3 * K + 2 * K + k, slope, mask=in_k)
    for j in tl.static_range(CHUNKS):
        store_rows(P + slot * K * C, k, cols, in_k, j * BC, C, sums[j], C, EVEN)
