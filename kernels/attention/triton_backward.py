"""shared_prefix_attention in Triton, backward: gradients of queries, then of keys and values.

Gradients of queries walk the keys as the forward does. Those of keys and values hold N keys of one
segment and one key head and walk every query that sees them, in the order of the tokens: a prompt's
are all that follow it in its group. So a prompt's gradient sums its completions in a fixed order in
float32, without atomic additions or partial results.
"""

import triton
import triton.language as tl

from fastrl.kernels.attention.triton_kernels import (
    _blocks,
    _cap,
    _dot,
    _fetch,
    _keys,
    _place,
    _seen,
    rest_unit,
)


@triton.jit
def _walk_keys(
    result,
    x,
    grad,
    lse,
    delta,
    token,
    k,
    v,
    k_stride,
    v_stride,
    at,
    steps,
    settings,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    of_prompt, own, shared_steps, own_steps = steps
    scale, softcap, window = settings
    for step in range(0, shared_steps + own_steps):
        is_shared, j, start, end = _keys(step, shared_steps, of_prompt, own, at, N)
        key = _fetch(k, start + j, 0, k_stride, 0, j < end, D, WIDTH, MASKED)
        value = _fetch(v, start + j, 0, v_stride, 0, j < end, D, WIDTH, MASKED)
        scores, slope = _cap(_dot(x, key.T, None, WIDE), scale, softcap, SOFTCAP)
        p = tl.exp(scores - lse[:, None])
        if MASKED:
            p = tl.where(_seen(is_shared, j, end, token, at[3], window, WINDOW), p, 0.0)
        by_score = p * (_dot(grad, value.T, None, WIDE) - delta[:, None]) * slope
        result = _dot(by_score.to(key.dtype), key, result, WIDE)
    return result


@triton.jit(do_not_specialize=["segments", "count", "window"])
def _bwd_queries_kernel(
    q,
    k,
    v,
    offsets,
    groups,
    out,
    rest,
    lse,
    grad_out,
    grad_lse,
    delta,
    grad_q,
    segments,
    count,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    EPSILON: tl.constexpr,
):
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, at, _ = _place(slot, offsets, groups, segments, count, SHARE, M)
    first, length, _, _ = at
    if tile * M >= length * SHARE:
        return
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * SHARE
    i = tile * M + tl.arange(0, M)
    inside = i < length * SHARE
    token = i // SHARE
    head = kv_head * SHARE + i % SHARE
    x = _fetch(q, first + token, head, q_stride, q_head_stride, inside, D, WIDTH, True)
    grad = _fetch(grad_out, first + token, head, heads * D, D, inside, D, WIDTH, True)
    # The softmax's gradient takes off the mean of the slopes, which is the output times its
    # gradient: where one key has all the weight, only the output before rounding cancels it.
    kept = _fetch(out, first + token, head, heads * D, D, inside, D, WIDTH, True).to(tl.float32)
    if EPSILON != 0:
        lost = _fetch(rest, first + token, head, heads * D, D, inside, D, WIDTH, True)
        kept += lost.to(tl.float32) * rest_unit(kept, EPSILON)
    mean = tl.sum(kept * grad.to(tl.float32), 1)
    row = (first + token).to(tl.int64) * heads + head
    if grad_lse is not None:
        mean -= tl.load(grad_lse + row, mask=inside, other=0.0)
    tl.store(delta + row, mean, mask=inside)
    lses = tl.load(lse + row, mask=inside, other=float("inf"))
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    of_prompt, own, shared_steps, own_steps = _blocks(tile, at, window, SHARE, M, N, WINDOW)
    settings = (scale, softcap, window)
    result = tl.zeros((M, WIDTH), tl.float32)
    if not WINDOW:
        result = _walk_keys(
            *(result, x, grad, lses, mean, token, k, v, k_stride, v_stride, at),
            *((0, 0, of_prompt, own), settings),
            *(D, WIDTH, N, SOFTCAP, WINDOW, WIDE, False),
        )
    result = _walk_keys(
        *(result, x, grad, lses, mean, token, k, v, k_stride, v_stride, at),
        *((of_prompt, own, shared_steps, own_steps), settings),
        *(D, WIDTH, N, SOFTCAP, WINDOW, WIDE, True),
    )
    d = tl.arange(0, WIDTH)
    there = inside[:, None] & (d < D)[None, :]
    places = grad_q + row[:, None] * D + d[None, :]
    tl.store(places, (result * scale).to(grad_q.dtype.element_ty), mask=there)


@triton.jit
def _walk_queries(
    of_key,
    of_value,
    key,
    value,
    j,
    q,
    grad_out,
    lse,
    delta,
    positions,
    q_stride,
    q_head_stride,
    begin,
    rows,
    blocks,
    settings,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Over some blocks of the rows from token `begin` on, each a query of one of SHARE heads."""
    scale, softcap, window = settings
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * SHARE
    for block in range(blocks[0], blocks[1]):
        i = block * M + tl.arange(0, M)
        inside = i < rows
        token = begin + i // SHARE
        head = kv_head * SHARE + i % SHARE
        x = _fetch(q, token, head, q_stride, q_head_stride, inside, D, WIDTH, True)
        grad = _fetch(grad_out, token, head, heads * D, D, inside, D, WIDTH, True)
        row = token.to(tl.int64) * heads + head
        lses = tl.load(lse + row, mask=inside, other=float("inf"))
        mean = tl.load(delta + row, mask=inside, other=0.0)
        scores, slope = _cap(_dot(key, x.T, None, WIDE), scale, softcap, SOFTCAP)
        p = tl.exp(scores - lses[None, :])
        if MASKED:
            seen = token[None, :] >= j[:, None]
            if WINDOW:
                position = tl.load(positions + token, mask=inside, other=0)
                # A key's own position: the first row is a query at the first key's.
                start = tl.load(positions + begin)
                seen &= (position - start)[None, :] < (j - begin + window)[:, None]
            p = tl.where(seen, p, 0.0)
        of_value = _dot(p.to(grad.dtype), grad, of_value, WIDE)
        by_score = p * (_dot(value, grad.T, None, WIDE) - mean[None, :]) * slope
        of_key = _dot(by_score.to(x.dtype), x, of_key, WIDE)
    return of_key, of_value


@triton.jit(do_not_specialize=["segments", "count", "window"])
def _bwd_keys_kernel(
    q,
    k,
    v,
    offsets,
    groups,
    lse,
    grad_out,
    delta,
    positions,
    grad_k,
    grad_v,
    segments,
    count,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A prompt's first tiles have the most queries, and they come first in their group.
    tile, at, end = _place(tl.program_id(0), offsets, groups, segments, count, 1, N)
    first, length, _, _ = at
    if tile * N >= length:
        return
    kv_head = tl.program_id(1)
    own = tile * N + tl.arange(0, N)
    there = own < length
    key = _fetch(k, first + own, kv_head, k_stride, k_head_stride, there, D, WIDTH, True)
    value = _fetch(v, first + own, kv_head, v_stride, v_head_stride, there, D, WIDTH, True)
    begin = first + tile * N
    if WINDOW:  # a prompt's keys may all be too old for its completions
        end = tl.where(tile * N + N - 1 + window <= length, first + length, end)
    rows = (end - begin) * SHARE
    blocks = tl.cdiv(rows, M)
    diagonal = tl.minimum(tl.cdiv(N * SHARE, M), blocks)
    settings = (scale, softcap, window)
    of_key = tl.zeros((N, WIDTH), tl.float32)
    of_value = tl.zeros((N, WIDTH), tl.float32)
    of_key, of_value = _walk_queries(
        *(of_key, of_value, key, value, first + own, q, grad_out, lse, delta, positions),
        *(q_stride, q_head_stride, begin, rows, (0, blocks if WINDOW else diagonal), settings),
        *(D, WIDTH, SHARE, M, SOFTCAP, WINDOW, WIDE, True),
    )
    if not WINDOW:
        of_key, of_value = _walk_queries(
            *(of_key, of_value, key, value, first + own, q, grad_out, lse, delta, positions),
            *(q_stride, q_head_stride, begin, rows, (diagonal, blocks), settings),
            *(D, WIDTH, SHARE, M, SOFTCAP, WINDOW, WIDE, False),
        )
    heads = tl.num_programs(1)
    row = (first + own).to(tl.int64) * heads + kv_head
    d = tl.arange(0, WIDTH)
    places = row[:, None] * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    tl.store(grad_k + places, (of_key * scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + places, of_value.to(grad_v.dtype.element_ty), mask=inside)
