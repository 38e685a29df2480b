"""Quantizers and products of quantized weights in Triton.

Everything that goes through int8 has the bits of reference.py: products and sums are rounded one by
one (all kernels must be compiled with ``enable_fp_fusion=False``), divisions and roots rightly, and
the squares of a norm are summed in 16 lanes in their order. Integer sums and maxima are exact, so
tiles may have any size. Products in bf16 are summed tile by tile, in the order of their tile.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
PER_STEP = tl.constexpr(1 / 127)
SMALLEST = tl.constexpr(2.0**-126)
ROUNDER = tl.constexpr(1.5 * 2**23)  # adding it to a small float leaves no room for a fraction
LANES = tl.constexpr(16)
NESTED_BLOCK = tl.constexpr(256)


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even; |x| below 2^22."""
    return (x + ROUNDER) - ROUNDER


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def _place(first, rows, width, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program's rows the columns from `first` on: offsets, which are inside, the columns."""
    m = tl.program_id(0) * R + tl.arange(0, R)
    k = first + tl.arange(0, COLUMNS)
    at = m.to(tl.int64)[:, None] * width + k[None, :]
    return at, (m < rows)[:, None] & (k < width)[None, :], k


@triton.jit
def _highest(top, x):
    """The largest magnitude so far, infinite from a NaN on."""
    size = tl.abs(x)
    return tl.maximum(top, tl.max(tl.where(size < INFINITY, size, INFINITY), 1))


@triton.jit
def _store_scale(scale, top, rows, R: tl.constexpr):
    """Stores the scales; returns 1 / scale."""
    step = tl.where(top < INFINITY, tl.maximum(top * PER_STEP, SMALLEST), NAN)
    m = tl.program_id(0) * R + tl.arange(0, R)
    tl.store(scale + m, step, mask=m < rows)
    return tl.div_rn(1.0, step)


@triton.jit
def _store_steps(data, at, inside, x, inverse):
    steps = _rint(x * inverse[:, None])
    tl.store(data + at, tl.where(steps == steps, steps, 0.0).to(tl.int8), mask=inside)


@triton.jit
def _quantize_rows_kernel(x, data, scale, rows, width, R: tl.constexpr, COLUMNS: tl.constexpr):
    top = tl.zeros((R,), tl.float32)
    for first in range(0, width, COLUMNS):
        at, inside, _ = _place(first, rows, width, R, COLUMNS)
        top = _highest(top, tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
    inverse = _store_scale(scale, top, rows, R)
    for first in range(0, width, COLUMNS):
        at, inside, _ = _place(first, rows, width, R, COLUMNS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        _store_steps(data, at, inside, value, inverse)


@triton.jit
def _total(x, residual, at, inside):
    """x + residual, rounded as it is stored."""
    h = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        more = tl.load(residual + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + more.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def _normed(h, inverse, weight, offset, k, width):
    scale = tl.load(weight + k, mask=k < width, other=0.0).to(tl.float32) + offset
    return (h.to(tl.float32) * inverse[:, None]) * scale[None, :]


@triton.jit
def _rmsnorm_quant_kernel(
    x,
    residual,
    weight,
    new,
    data,
    scale,
    rows,
    width,
    reciprocal_width,
    eps,
    offset,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    lanes = tl.zeros((R, LANES), tl.float32)
    for first in tl.range(0, width, LANES, loop_unroll_factor=8):
        at, inside, _ = _place(first, rows, width, R, LANES)
        h = _total(x, residual, at, inside).to(tl.float32)
        lanes += h * h
    # Halves are folded onto each other: of two numbers there is one sum.
    squares = tl.sum(tl.reshape(lanes, (R, 2, 8)), 1)
    squares = tl.sum(tl.reshape(squares, (R, 2, 4)), 1)
    squares = tl.sum(tl.reshape(squares, (R, 2, 2)), 1)
    squares = tl.sum(squares, 1)
    norm = tl.div_rn(1.0, tl.sqrt_rn(squares * reciprocal_width + eps))

    top = tl.zeros((R,), tl.float32)
    for first in range(0, width, COLUMNS):
        at, inside, k = _place(first, rows, width, R, COLUMNS)
        h = _total(x, residual, at, inside)
        if residual is not None:
            tl.store(new + at, h, mask=inside)
        top = _highest(top, tl.where(inside, _normed(h, norm, weight, offset, k, width), 0.0))
    inverse = _store_scale(scale, top, rows, R)
    for first in range(0, width, COLUMNS):
        at, inside, k = _place(first, rows, width, R, COLUMNS)
        h = _total(x, residual, at, inside)
        _store_steps(data, at, inside, _normed(h, norm, weight, offset, k, width), inverse)


@triton.jit
def _gated(gate, up, at, inside, GELU: tl.constexpr):
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    z = g
    if GELU:  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        z = 1.5957691216057308 * (g + 0.044715 * (g * g * g))
    active = tl.div_rn(g, 1.0 + tl.exp(-z))
    return active * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _glu_quant_kernel(
    gate,
    up,
    data,
    scale,
    rows,
    width,
    GELU: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    top = tl.zeros((R,), tl.float32)
    for first in range(0, width, COLUMNS):
        at, inside, _ = _place(first, rows, width, R, COLUMNS)
        top = _highest(top, _gated(gate, up, at, inside, GELU))
    inverse = _store_scale(scale, top, rows, R)
    for first in range(0, width, COLUMNS):
        at, inside, _ = _place(first, rows, width, R, COLUMNS)
        _store_steps(data, at, inside, _gated(gate, up, at, inside, GELU), inverse)


# ---- weights -------------------------------------------------------------------------------------


@triton.jit
def _absmax(stored, block):
    """The absmax of blocks by number; `stored` as in `_four_bit`."""
    _, absmax, _, nested_absmax, nested_code, nested_offset = stored
    value = tl.load(absmax + block)
    if nested_absmax is not None:
        each = tl.load(nested_absmax + block // NESTED_BLOCK)
        value = tl.load(nested_code + value.to(tl.int32)) * each + tl.load(nested_offset)
    return value


@triton.jit
def _four_bit(
    stored,
    n,
    first,
    columns,
    stride,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [n, BK]: the rows n of a 4-bit weight from column `first` on; anything behind.

    PAIRS: every row starts with a whole byte. ALIGNED: BK columns of a row share an absmax.
    """
    data, _, code, _, _, _ = stored
    row = n.to(tl.int64) * stride
    k = first + tl.arange(0, BK)
    if PAIRS:
        pair = first // 2 + tl.arange(0, BK // 2)
        at = (row // 2)[:, None] + pair[None, :]
        byte = tl.load(data + at, mask=(2 * pair < columns)[None, :], other=0)
        index = tl.interleave(byte >> 4, byte & 15)
    else:
        i = row[:, None] + k[None, :]
        byte = tl.load(data + i // 2, mask=(k < columns)[None, :], other=0)
        index = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(code + index.to(tl.int32))
    if ALIGNED:
        each = _absmax(stored, (row + first) // BLOCK)[:, None]
    else:
        each = _absmax(stored, (row[:, None] + tl.minimum(k, columns - 1)[None, :]) // BLOCK)
    return value * each


@triton.jit
def _dequantize_kernel(
    data,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    out,
    rows,
    columns,
    stride,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    stored = data, absmax, code, nested_absmax, nested_code, nested_offset
    last = tl.minimum(n, rows - 1)
    value = _four_bit(stored, last, first, columns, stride, BLOCK, PAIRS, ALIGNED, BK)
    at = n.to(tl.int64)[:, None] * columns + k[None, :]
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_kernel(
    x,
    x_scale,
    data,
    scale,
    absmax,
    code,
    nested_absmax,
    nested_code,
    nested_offset,
    bias,
    out,
    tokens,
    rows,
    columns,
    stride,
    BLOCK: tl.constexpr,  # 0 for a weight stored in int8
    PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr,
    INT8: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Neighbours share a panel of the weight.
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row, last = tl.minimum(m, tokens - 1).to(tl.int64), tl.minimum(n, rows - 1)
    stored = data, absmax, code, nested_absmax, nested_code, nested_offset
    if INT8 and BLOCK > 0:
        inverse = tl.div_rn(1.0, tl.load(scale + last))
    total = tl.zeros((BM, BN), tl.int32 if INT8 else tl.float32)
    for first in range(0, columns, BK):
        k = first + tl.arange(0, BK)
        a = tl.load(x + (row * columns)[:, None] + k[None, :], mask=(k < columns)[None, :], other=0)
        if BLOCK == 0:
            at = (last.to(tl.int64) * stride)[:, None] + k[None, :]
            w = tl.load(data + at, mask=(k < stride)[None, :], other=0)  # 0 behind the columns
        else:
            w = _four_bit(stored, last, first, columns, stride, BLOCK, PAIRS, ALIGNED, BK)
            # What lies behind the columns may be anything finite: it meets zeros.
            w = _rint(w * inverse[:, None]).to(tl.int8) if INT8 else w.to(tl.bfloat16)
        if WIDE:  # the interpreter would multiply the integers that hold bf16
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(a, w.T, total, input_precision="ieee", out_dtype=total.dtype)
    y = total.to(tl.float32)
    if INT8:
        y = (y * tl.load(x_scale + row)[:, None]) * tl.load(scale + last)[None, :]
    if bias is not None:
        y += tl.load(bias + last).to(tl.float32)[None, :]
    to = out + m.to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < rows)[None, :])
