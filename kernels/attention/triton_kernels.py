"""shared_prefix_attention in Triton, forward: a prompt and a completion in one softmax.

A program holds M queries of one segment and one key head, token by token and, within a token, head
by head of those that share the key head, so that a short completion fills a tile too. It walks the
keys of the prompt and then those of its own segment with one running maximum and sum in float32:
the two parts are never merged. The backward (triton_backward.py) walks alike.

Tiles start where their segment starts and have one size for any layout, so a completion has the
same bits alone with its prompt and in any batch.

Which tile a program has is found on the device: segment s owns the tiles from
`offsets[s] * SHARE // M + s` on, of which the last may be empty.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf: finite, so that 0 times it is 0
SEARCH = tl.constexpr(512)  # segments that a program looks at, at once, to find its own
REST_STEPS = tl.constexpr(127.0)  # of what rounding may take from an output


@triton.jit
def _tanh(x):
    """Right to float32's last bits near 0 too, where 1 - 2 / (exp(2 x) + 1) is not."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    p = ((p + 1.33314422036e-1) * z - 3.33332819422e-1) * z
    return tl.where(tl.abs(x) < 0.625, x + x * p, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _segment_of(slot, offsets, segments, SHARE: tl.constexpr, M: tl.constexpr):
    found = 0
    for begin in range(0, segments, SEARCH):
        s = begin + tl.arange(0, SEARCH)
        inside = s < segments
        first = tl.load(offsets + s, mask=inside, other=0).to(tl.int64)
        found += tl.sum((inside & (first * SHARE // M + s <= slot)).to(tl.int32))
    return found - 1


@triton.jit
def _group_of(segment, groups, count):
    found = 0
    for begin in range(0, count, SEARCH):
        n = begin + tl.arange(0, SEARCH)
        inside = n < count
        first = tl.load(groups + n, mask=inside, other=0)
        found += tl.sum((inside & (first <= segment)).to(tl.int32))
    return found - 1


@triton.jit
def _place(slot, offsets, groups, segments, count, SHARE: tl.constexpr, M: tl.constexpr):
    """A program's tile; where its segment is: (first token, tokens, the prompt's first, tokens).

    A prompt has no prompt. Last comes the token before which all are that see the segment's keys.
    """
    segment = _segment_of(slot, offsets, segments, SHARE, M)
    group = _group_of(segment, groups, count)
    prompt = tl.load(groups + group)
    first = tl.load(offsets + segment)
    length = tl.load(offsets + segment + 1) - first
    shared_first = tl.load(offsets + prompt)
    shared = tl.load(offsets + prompt + 1) - shared_first
    tile = slot - (first.to(tl.int64) * SHARE // M).to(tl.int32) - segment
    is_prompt = segment == prompt
    end = tl.load(offsets + tl.where(is_prompt, tl.load(groups + group + 1), segment + 1))
    return tile, (first, length, shared_first, tl.where(is_prompt, 0, shared)), end


@triton.jit
def _blocks(
    tile, at, window, SHARE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr
):
    """Of the prompt and of the segment: where blocks of keys that need a mask start, how many.

    Those before are seen whole by every query of the tile, with a window by none.
    """
    _, length, _, shared = at
    low = tile * M // SHARE
    high = tl.minimum((tile * M + M - 1) // SHARE, length - 1)
    if WINDOW:
        oldest = tl.maximum(low + shared - window + 1, 0)
        of_prompt = tl.minimum(oldest // N, tl.cdiv(shared, N))
        own = tl.maximum(oldest - shared, 0) // N
    else:
        of_prompt = shared // N
        own = (low + 1) // N
    return of_prompt, own, tl.cdiv(shared, N) - of_prompt, high // N + 1 - own


@triton.jit
def _keys(step, count, of_prompt, own, at, N: tl.constexpr):
    """A step's keys: whether the prompt's (the first `count` steps), which, their start and end."""
    first, length, shared_first, shared = at
    is_shared = step < count
    block = tl.where(is_shared, of_prompt + step, own + step - count)
    start = tl.where(is_shared, shared_first, first)
    return is_shared, block * N + tl.arange(0, N), start, tl.where(is_shared, shared, length)


@triton.jit
def _seen(is_shared, j, end, token, shared, window, WINDOW: tl.constexpr):
    seen = j[None, :] <= tl.where(is_shared, end - 1, token)[:, None]
    if WINDOW:
        position = j + tl.where(is_shared, 0, shared)
        seen &= position[None, :] > (token + shared - window)[:, None]
    return seen


@triton.jit
def _fetch(
    base,
    row,
    head,
    stride,
    head_stride,
    there,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of x[token, head], [rows, WIDTH]; zeros where they are not there, and beyond D."""
    d = tl.arange(0, WIDTH)
    at = base + (row.to(tl.int64) * stride + head * head_stride)[:, None] + d[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif D != WIDTH:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    if WIDE:  # the interpreter would multiply the integers that hold bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _cap(product, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores, and their slope by what was capped."""
    scores = product * scale
    if SOFTCAP:
        bounded = _tanh(scores / softcap)
        return softcap * bounded, 1 - bounded * bounded
    else:
        return scores, 1.0


@triton.jit
def _attend(
    state,
    x,
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
    """Goes on with a maximum, a sum and a weighted sum of values, over blocks of keys."""
    top, total, result = state
    of_prompt, own, shared_steps, own_steps = steps
    scale, softcap, window = settings
    for step in range(0, shared_steps + own_steps):
        is_shared, j, start, end = _keys(step, shared_steps, of_prompt, own, at, N)
        key = _fetch(k, start + j, 0, k_stride, 0, j < end, D, WIDTH, MASKED)
        value = _fetch(v, start + j, 0, v_stride, 0, j < end, D, WIDTH, MASKED)
        scores, _ = _cap(_dot(x, key.T, None, WIDE), scale, softcap, SOFTCAP)
        if MASKED:
            seen = _seen(is_shared, j, end, token, at[3], window, WINDOW)
            scores = tl.where(seen, scores, LOWEST)
        # A row that has seen nothing yet counts what it does not see; its first key undoes that.
        new = tl.maximum(top, tl.max(scores, 1))
        exps = tl.exp(scores - new[:, None])
        factor = tl.exp(top - new)
        total = total * factor + tl.sum(exps, 1)
        result = _dot(exps.to(value.dtype), value, result * factor[:, None], WIDE)
        top = new
    return top, total, result


@triton.jit
def rest_unit(out, EPSILON: tl.constexpr):
    """What a step of `rest` is worth: 127 of them hold what rounding can take from `out`."""
    return tl.maximum(tl.abs(out), 6.103515625e-05) * (EPSILON / REST_STEPS)


@triton.jit(do_not_specialize=["segments", "count", "window"])
def _fwd_kernel(
    q,
    k,
    v,
    offsets,
    groups,
    out,
    rest,
    lse,
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
    EPSILON: tl.constexpr,  # of the output's type; 0 to keep no rest
):
    # The last tiles of a segment have the most keys: they begin first.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, at, _ = _place(slot, offsets, groups, segments, count, SHARE, M)
    first, length, _, _ = at
    if tile * M >= length * SHARE:
        return
    kv_head = tl.program_id(1)
    i = tile * M + tl.arange(0, M)
    inside = i < length * SHARE
    token = i // SHARE
    head = kv_head * SHARE + i % SHARE
    x = _fetch(q, first + token, head, q_stride, q_head_stride, inside, D, WIDTH, True)
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    of_prompt, own, shared_steps, own_steps = _blocks(tile, at, window, SHARE, M, N, WINDOW)
    settings = (scale, softcap, window)
    top = tl.full((M,), LOWEST, tl.float32)
    state = (top, tl.zeros((M,), tl.float32), tl.zeros((M, WIDTH), tl.float32))
    if not WINDOW:
        state = _attend(
            *(state, x, token, k, v, k_stride, v_stride, at, (0, 0, of_prompt, own), settings),
            *(D, WIDTH, N, SOFTCAP, WINDOW, WIDE, False),
        )
    top, total, result = _attend(
        *(state, x, token, k, v, k_stride, v_stride, at),
        *((of_prompt, own, shared_steps, own_steps), settings),
        *(D, WIDTH, N, SOFTCAP, WINDOW, WIDE, True),
    )
    result /= total[:, None]
    row = (first + token).to(tl.int64) * (tl.num_programs(1) * SHARE) + head
    d = tl.arange(0, WIDTH)
    places = row[:, None] * D + d[None, :]
    there = inside[:, None] & (d < D)[None, :]
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + places, rounded, mask=there)
    tl.store(lse + row, top + tl.log(total), mask=inside)
    if EPSILON != 0:
        kept = rounded.to(tl.float32)
        lost = (result - kept) / rest_unit(kept, EPSILON)
        lost = tl.minimum(tl.maximum(lost, -REST_STEPS), REST_STEPS)
        tl.store(rest + places, tl.floor(lost + 0.5).to(tl.int8), mask=there)
