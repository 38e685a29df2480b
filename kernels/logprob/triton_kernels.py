"""linear_logprob in Triton: the product and the softmax's statistics in one kernel.

A program computes one tile of logits, [M tokens, N vocabulary entries], and reduces it to a maximum
and two sums of every row; a second kernel merges the tiles of a row in the vocabulary's order.
Tiles have one size for any number of tokens, so a row's statistics and the gradient of its logits
are the same bits in any batch. (The two products with that gradient are cuBLAS's, see `gpu.py`:
they repeat bit for bit, but a row of grad_hidden may differ in its last ones in another batch.)

Where the operands allow it, Hopper's copy engine fetches the tiles (tensor descriptors).
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf: finite, so that 0 times it is 0


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    return x.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def _stripes(x, M: tl.constexpr, N: tl.constexpr, STRIPE: tl.constexpr):
    """The columns in stripes: one after the other they need fewer registers than all at once."""
    if N == STRIPE:
        return (x,)
    elif N == 2 * STRIPE:
        return _halves(x, M, N)
    else:
        tl.static_assert(N == 4 * STRIPE)
        left, right = _halves(x, M, N)
        a, b = _halves(left, M, N // 2)
        c, d = _halves(right, M, N // 2)
        return a, b, c, d


@triton.jit
def _merge(top, s, w, other_top, other_s, other_w):
    """Statistics of two sets of logits: the maximum, and from it sums of exp z and of z exp z."""
    new = tl.maximum(top, other_top)
    down = top - new
    other_down = other_top - new
    factor = tl.exp(down)
    other_factor = tl.exp(other_down)
    w = (w + down * s) * factor + (other_w + other_down * other_s) * other_factor
    return new, s * factor + other_s * other_factor, w


@triton.jit
def _place(rows, tiles, M: tl.constexpr, GROUP: tl.constexpr):
    """A program's block of tokens and tile of the vocabulary: tokens first, group by group."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, M)
    first = pid // (GROUP * tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    rest = pid % (GROUP * tiles)
    return first + rest % size, rest // size


@triton.jit
def _product(
    hidden,
    weight,
    row,
    column,
    rows,
    vocab,
    width,
    weight_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Otherwise the way around the loop counts as a use of the sums, and wgmma waits every time.
    tl.assume(width > 0)
    total = tl.zeros((M, N), tl.float32)
    if DESCRIBED:
        for k in range(0, width, K):
            x = hidden.load([row, k])
            w = weight.load([column, k])
            if WIDE:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            total = tl.dot(x, w.T, total, input_precision="ieee")
    else:
        # Beyond the end the last row is read again; nobody looks at what comes of it.
        i = tl.minimum(row + tl.arange(0, M), rows - 1).to(tl.int64)
        j = tl.minimum(column + tl.arange(0, N), vocab - 1).to(tl.int64)
        step = tl.arange(0, K)
        xs = hidden + i[:, None] * width + step[None, :]
        ws = weight + j[None, :] * weight_stride + step[:, None]
        for k in range(0, width, K):
            if WHOLE:
                x = tl.load(xs)
                w = tl.load(ws)
            else:
                x = tl.load(xs, mask=(step < width - k)[None, :], other=0.0)
                w = tl.load(ws, mask=(step < width - k)[:, None], other=0.0)
            if WIDE:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")
            xs += K
            ws += K
    return total


@triton.jit
def _cap(product, bias, j, vocab, logit_scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits of entries j before the temperature."""
    z = product
    if BIAS:
        b = tl.load(bias + j, mask=j < vocab, other=0.0)
        z += tl.where(b < LOWEST, LOWEST, b)[None, :]
    z *= logit_scale
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["rows", "vocab", "tiles", "kept_tiles", "kept_rows"])
def _fwd_kernel(
    hidden,
    weight,
    bias,
    inv_temperature,
    target,
    highest,
    total,
    weighted,
    at_target,
    kept_exps,
    kept_highest,
    rows,
    vocab,
    width,
    weight_stride,
    tiles,
    kept_tiles,
    kept_rows,
    kept_stride,
    logit_scale,
    softcap,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIPE: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
):
    block, tile = _place(rows, tiles, M, GROUP)
    row, column = block * M, tile * N
    product = _product(
        *(hidden, weight, row, column, rows, vocab, width, weight_stride),
        *(M, N, K, DESCRIBED, WHOLE, WIDE),
    )
    stripes = _stripes(product, M, N, STRIPE)
    i = row + tl.arange(0, M)
    inside = i < rows
    inverse = tl.load(inv_temperature + i, mask=inside, other=0.0)
    wanted = tl.load(target + i, mask=inside, other=-1)
    here = (wanted >= column) & (wanted < column + N)
    any_here = tl.max(here.to(tl.int32), 0) > 0
    found = tl.zeros((M,), tl.float32)
    top = tl.full((M,), LOWEST, tl.float32)
    s = tl.zeros((M,), tl.float32)
    w = tl.zeros((M,), tl.float32)
    for q in tl.static_range(N // STRIPE):
        j = column + q * STRIPE + tl.arange(0, STRIPE)
        z = _cap(stripes[q], bias, j, vocab, logit_scale, softcap, BIAS, SOFTCAP) * inverse[:, None]
        z = tl.where((j < vocab)[None, :], z, LOWEST)
        if any_here:
            found += tl.sum(tl.where(wanted[:, None] == j[None, :], z, 0.0), 1)
        of_stripe = tl.max(z, 1)
        z -= of_stripe[:, None]
        exps = tl.exp(z)
        if KEEP:  # noqa: SIM102 - known when it is compiled, the other one is not
            if tile < kept_tiles:
                places = kept_exps + i.to(tl.int64)[:, None] * kept_stride + j[None, :]
                kept = (exps * KEEP).to(kept_exps.dtype.element_ty)
                tl.store(places, kept, mask=inside[:, None])
                at = (tile * (N // STRIPE) + q).to(tl.int64) * kept_rows + i
                tl.store(kept_highest + at, of_stripe, mask=inside)
        top, s, w = _merge(top, s, w, of_stripe, tl.sum(exps, 1), tl.sum(exps * z, 1))
    tl.store(at_target + i, found, mask=here)
    at = tile.to(tl.int64) * rows + i
    tl.store(highest + at, top, mask=inside)
    tl.store(total + at, s, mask=inside)
    tl.store(weighted + at, w, mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _merge_kernel(
    highest,
    total,
    weighted,
    at_target,
    logprob,
    lse,
    entropy,
    rows,
    tiles,
    T: tl.constexpr,
    M: tl.constexpr,
):
    i = tl.program_id(0) * M + tl.arange(0, M)
    inside = i < rows
    top = tl.full((M,), LOWEST, tl.float32)
    s = tl.zeros((M,), tl.float32)
    w = tl.zeros((M,), tl.float32)
    for first in range(0, tiles, T):
        tile = first + tl.arange(0, T)
        at = tile.to(tl.int64)[:, None] * rows + i[None, :]
        there = (tile < tiles)[:, None] & inside[None, :]
        tops = tl.load(highest + at, mask=there, other=LOWEST)
        new = tl.maximum(top, tl.max(tops, 0))
        down = tops - new[None, :]
        factor = tl.exp(down)
        sums = tl.load(total + at, mask=there, other=0.0)
        # Sums count from their own maximum: from the new one every logit is `down` further.
        spread = tl.load(weighted + at, mask=there, other=0.0) + down * sums
        before = top - new
        w = (w + before * s) * tl.exp(before) + tl.sum(spread * factor, 0)
        s = s * tl.exp(before) + tl.sum(sums * factor, 0)
        top = new
    log_sum = tl.log(s)
    tl.store(lse + i, top + log_sum, mask=inside)
    found = tl.load(at_target + i, mask=inside, other=0.0)
    tl.store(logprob + i, found - top - log_sum, mask=inside)
    tl.store(entropy + i, log_sum - w / s, mask=inside)


@triton.jit(do_not_specialize=["rows", "vocab", "tiles", "first_tile"])
def _bwd_kernel(
    hidden,
    weight,
    bias,
    inv_temperature,
    target,
    logprob,  # of the target; the workspace needs it
    lse,
    entropy,
    of_p,
    of_spread,
    of_target,
    gradient,
    sums,
    rows,
    vocab,
    width,
    weight_stride,
    tiles,
    first_tile,
    gradient_stride,
    logit_scale,
    softcap,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIPE: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
):
    block, tile = _place(rows, tiles, M, GROUP)
    row, column = block * M, (first_tile + tile) * N
    product = _product(
        *(hidden, weight, row, column, rows, vocab, width, weight_stride),
        *(M, N, K, DESCRIBED, WHOLE, WIDE),
    )
    stripes = _stripes(product, M, N, STRIPE)
    i = row + tl.arange(0, M)
    inside = i < rows
    inverse = tl.load(inv_temperature + i, mask=inside, other=1.0)
    wanted = tl.load(target + i, mask=inside, other=-1)
    slope = tl.load(of_target + i, mask=inside, other=0.0)
    lse_of = tl.load(lse + i, mask=inside, other=0.0)
    # of_p - of_spread (log p + entropy), the row's part first
    spread = tl.load(of_spread + i, mask=inside, other=0.0)
    of_row = tl.load(of_p + i, mask=inside, other=0.0)
    of_row += spread * (lse_of - tl.load(entropy + i, mask=inside, other=0.0))
    for q in tl.static_range(N // STRIPE):
        j = column + q * STRIPE + tl.arange(0, STRIPE)
        z = _cap(stripes[q], bias, j, vocab, logit_scale, softcap, BIAS, SOFTCAP)
        warm = z * inverse[:, None]
        g = tl.exp(warm - lse_of[:, None]) * (of_row[:, None] - spread[:, None] * warm)
        g += tl.where(wanted[:, None] == j[None, :], slope[:, None], 0.0)
        if SOFTCAP:
            g *= 1 - (z / softcap) * (z / softcap)
        valid = inside[:, None] & (j < vocab)[None, :]
        columns = j - first_tile * N
        if SUMS:
            at = block.to(tl.int64) * gradient_stride + columns
            tl.store(sums + at, tl.sum(tl.where(valid, g, 0.0), 0), mask=j < vocab)
        places = gradient + i.to(tl.int64)[:, None] * gradient_stride + columns[None, :]
        tl.store(places, g.to(gradient.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "vocab", "tiles", "first"])
def _bwd_kept_kernel(
    kept_exps,
    kept_highest,
    inv_temperature,
    target,
    logprob,
    lse,
    entropy,
    of_p,
    of_spread,
    of_target,
    gradient,
    sums,
    rows,
    vocab,
    tiles,
    first,
    gradient_stride,
    kept_stride,
    softcap,
    M: tl.constexpr,
    STRIPE: tl.constexpr,
    KEPT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
):
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i = block * M + tl.arange(0, M)
    j = first + tile * STRIPE + tl.arange(0, STRIPE)
    inside = i < rows
    valid = inside[:, None] & (j < vocab)[None, :]
    far = i.to(tl.int64)
    exps = tl.load(kept_exps + far[:, None] * kept_stride + j[None, :], mask=valid, other=0.0)
    exps = exps.to(tl.float32) * (1 / KEPT)
    at = (first // STRIPE + tile).to(tl.int64) * rows + i
    lse_of = tl.load(lse + i, mask=inside, other=0.0)
    top = tl.load(kept_highest + at, mask=inside, other=0.0) - lse_of
    log_p = tl.where(exps > 0, tl.log(exps), LOWEST) + top[:, None]
    wanted = tl.load(target + i, mask=inside, other=-1)
    here = wanted[:, None] == j[None, :]
    # The target's probability is not rounded: 1 - p has to be right where p is nearly 1.
    log_p = tl.where(here, tl.load(logprob + i, mask=inside, other=0.0)[:, None], log_p)
    spread = tl.load(of_spread + i, mask=inside, other=0.0)
    of_row = tl.load(of_p + i, mask=inside, other=0.0)
    of_row -= spread * tl.load(entropy + i, mask=inside, other=0.0)
    g = tl.exp(log_p) * (of_row[:, None] - spread[:, None] * log_p)
    slope = tl.load(of_target + i, mask=inside, other=0.0)
    g += tl.where(here, slope[:, None], 0.0)
    if SOFTCAP:
        z = log_p + lse_of[:, None]
        tanh = z / (tl.load(inv_temperature + i, mask=inside, other=1.0) * softcap)[:, None]
        g *= tl.maximum(1 - tanh * tanh, 0.0)
    columns = tile * STRIPE + tl.arange(0, STRIPE)
    if SUMS:
        at = block.to(tl.int64) * gradient_stride + columns
        tl.store(sums + at, tl.sum(tl.where(valid, g, 0.0), 0), mask=j < vocab)
    places = gradient + far[:, None] * gradient_stride + columns[None, :]
    tl.store(places, g.to(gradient.dtype.element_ty), mask=valid)
