"""Norms, rotations and gated activations in Triton, forward and backward.

Everything is computed in float32 and rounded once. A tile's shape depends on the width of a row and
never on how many there are, and so does the order of its sums: a row has its own bits. Tensors are
read and written once; rows wider than a tile are read once more.

In a backward with a weight each program walks ``each`` rows, adds up their gradients of the weight,
and stores the sum in its row of ``partials``; there are no atomics.
"""

import triton
import triton.language as tl

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


# ---- norms ---------------------------------------------------------------------------------------


@triton.jit
def _place(m, rows, first, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the rows m the columns from `first` on: offsets, which are inside, the columns."""
    k = first + tl.arange(0, COLUMNS)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    return at, (m < rows)[:, None] & (k < K)[None, :], k


@triton.jit
def _read(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale(weight, k, offset, WIDTH: tl.constexpr):
    """What a norm multiplies by, as a row [1, k]."""
    return (tl.load(weight + k, mask=k < WIDTH, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def _total(x, residual, at, inside):
    """x + residual, rounded as it is stored."""
    h = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        more = tl.load(residual + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + more.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def _inverse_norm(squares, eps, WIDTH: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / WIDTH) + eps))


@triton.jit(do_not_specialize=["rows"])
def _rmsnorm_kernel(
    x,
    residual,
    weight,
    h,
    y,
    inverse,
    rows,
    eps,
    offset,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    squares = tl.zeros((R, COLUMNS), tl.float32)
    for first in range(0, K, COLUMNS):
        at, inside, _ = _place(m, rows, first, K, COLUMNS)
        value = _total(x, residual, at, inside).to(tl.float32)
        squares += value * value
    norm = _inverse_norm(tl.sum(squares, 1), eps, K)
    # Nothing is stored before this, so that a row within a tile is not loaded again.
    for first in range(0, K, COLUMNS):
        at, inside, k = _place(m, rows, first, K, COLUMNS)
        total = _total(x, residual, at, inside)
        if residual is not None:
            tl.store(h + at, total, mask=inside)
        normed = (total.to(tl.float32) * norm[:, None]) * _scale(weight, k, offset, K)
        tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + m, norm, mask=m < rows)


@triton.jit(do_not_specialize=["rows", "each"])
def _rmsnorm_bwd_kernel(
    h,
    weight,
    inverse,
    grad_y,
    grad_h,
    grad,
    partials,
    rows,
    each,  # R where K is above COLUMNS
    offset,
    K: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,  # rows that are loaded while one is computed, and that one
):
    # y = n w with n = x inverse, where inverse depends on x, has the gradient
    #   inverse (g w - n mean(g w n)),   and that of w is the sum of g n over rows.
    program = tl.program_id(0).to(tl.int64)
    end = tl.minimum((program + 1) * each, rows)
    sums = tl.zeros((R, COLUMNS), tl.float32)
    if K <= COLUMNS:
        w = _scale(weight, tl.arange(0, COLUMNS), offset, K)
    for row in tl.range(program * each, end, R, num_stages=STAGES):
        m = row + tl.arange(0, R)
        norm = tl.load(inverse + m, mask=m < rows, other=0.0)[:, None]
        along = tl.zeros((R, COLUMNS), tl.float32)
        for first in range(0, K, COLUMNS):
            at, inside, k = _place(m, rows, first, K, COLUMNS)
            g, n = _read(grad_y, at, inside), _read(h, at, inside) * norm
            if K > COLUMNS:
                w = _scale(weight, k, offset, K)
            along += g * w * n
        pull = tl.sum(along, 1)[:, None] * (1.0 / K)
        for first in range(0, K, COLUMNS):
            at, inside, k = _place(m, rows, first, K, COLUMNS)
            g, n = _read(grad_y, at, inside), _read(h, at, inside) * norm
            if K > COLUMNS:
                w = _scale(weight, k, offset, K)
            back = norm * (g * w - n * pull)
            if grad_h is not None:
                back += _read(grad_h, at, inside)
            tl.store(grad + at, back.to(grad.dtype.element_ty), mask=inside)
            if partials is not None:
                if K <= COLUMNS:
                    sums += g * n
                else:
                    tl.store(partials + program * K + k, tl.sum(g * n, 0), mask=k < K)
    if partials is not None and K <= COLUMNS:
        k = tl.arange(0, COLUMNS)
        tl.store(partials + program * K + k, tl.sum(sums, 0), mask=k < K)


# ---- rotations -----------------------------------------------------------------------------------


@triton.jit
def _heads(m, rows, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Of heads, tokens' next to each other: offsets of first halves, of angles; what is inside."""
    i = tl.arange(0, HALF)
    m = m.to(tl.int64)
    at = m[:, None] * D + i[None, :]
    angle = (m // HEADS)[:, None] * (D // 2) + i[None, :]
    return at, angle, (m < rows)[:, None] & (i < D // 2)[None, :]


@triton.jit
def _halves(x, at, inside, D: tl.constexpr):
    return _read(x, at, inside), _read(x + D // 2, at, inside)


@triton.jit
def _store_halves(x, at, inside, one, two, D: tl.constexpr):
    tl.store(x + at, one.to(x.dtype.element_ty), mask=inside)
    tl.store(x + D // 2 + at, two.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _scale_halves(weight, offset, D: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    return _scale(weight, i, offset, D // 2), _scale(weight + D // 2, i, offset, D // 2)


@triton.jit(do_not_specialize=["rows"])
def _rope_kernel(
    x,
    cos,
    sin,
    weight,
    y,
    rows,
    eps,
    offset,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at, angle, inside = _heads(m, rows, HEADS, D, HALF)
    one, two = _halves(x, at, inside, D)
    if weight is not None:
        norm = _inverse_norm(tl.sum(one * one + two * two, 1), eps, D)[:, None]
        left, right = _scale_halves(weight, offset, D, HALF)
        one, two = (one * norm) * left, (two * norm) * right
    c, s = _read(cos, angle, inside), _read(sin, angle, inside)
    _store_halves(y, at, inside, one * c - two * s, two * c + one * s, D)


@triton.jit(do_not_specialize=["rows", "each"])
def _rope_bwd_kernel(
    x,
    cos,
    sin,
    weight,
    grad_y,
    grad,
    partials,
    rows,
    each,
    eps,
    offset,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sum_one = tl.zeros((R, HALF), tl.float32)
    sum_two = tl.zeros((R, HALF), tl.float32)
    if weight is not None:
        left, right = _scale_halves(weight, offset, D, HALF)
    for row in range(program * each, tl.minimum((program + 1) * each, rows), R):
        m = row + tl.arange(0, R)
        at, angle, inside = _heads(m, rows, HEADS, D, HALF)
        g_one, g_two = _halves(grad_y, at, inside, D)
        c, s = _read(cos, angle, inside), _read(sin, angle, inside)
        one, two = g_one * c + g_two * s, g_two * c - g_one * s
        if weight is not None:  # as in _rmsnorm_bwd_kernel
            n_one, n_two = _halves(x, at, inside, D)
            norm = _inverse_norm(tl.sum(n_one * n_one + n_two * n_two, 1), eps, D)
            norm = tl.where(m < rows, norm, 0.0)[:, None]  # with eps = 0 it would be infinite
            n_one, n_two = n_one * norm, n_two * norm
            if partials is not None:
                sum_one += one * n_one
                sum_two += two * n_two
            one, two = one * left, two * right
            pull = tl.sum(one * n_one + two * n_two, 1)[:, None] * (1.0 / D)
            one, two = norm * (one - n_one * pull), norm * (two - n_two * pull)
        _store_halves(grad, at, inside, one, two, D)
    if partials is not None:
        i = tl.arange(0, HALF)
        to = partials + program * D + i
        tl.store(to, tl.sum(sum_one, 0), mask=i < D // 2)
        tl.store(to + D // 2, tl.sum(sum_two, 0), mask=i < D // 2)


# ---- gated activations ---------------------------------------------------------------------------


@triton.jit
def _elements(count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def _sigmoid(g, GELU: tl.constexpr):
    """act(g) / g: of g for SiLU; for GELU of twice its tanh's argument."""
    u = g
    if GELU:
        u = TWICE_ROOT * (g * (1.0 + CUBIC * (g * g)))
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def _glu_kernel(gate, up, y, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = _elements(count, BLOCK)
    g = _read(gate, at, inside)
    out = g * _sigmoid(g, GELU) * _read(up, at, inside)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _glu_bwd_kernel(
    gate, up, grad_y, grad_gate, grad_up, count, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    at, inside = _elements(count, BLOCK)
    g, d = _read(gate, at, inside), _read(grad_y, at, inside)
    s = _sigmoid(g, GELU)
    change = g * s * (1.0 - s)
    if GELU:  # where the square would overflow, s has long been 0 or 1
        change *= TWICE_ROOT * (1.0 + 3.0 * CUBIC * tl.minimum(g * g, 1e6))
    to_gate, to_up = d * _read(up, at, inside) * (s + change), d * (g * s)
    tl.store(grad_gate + at, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, to_up.to(grad_up.dtype.element_ty), mask=inside)
