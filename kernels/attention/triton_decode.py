"""Attention of new tokens over cached segments, in Triton.

Keys and values lie in nodes, `[layers, 2, Hkv, capacity, D]` each, of consecutive positions; a row
(one new token of one sequence) sees a chain of them. A program takes SPLIT keys of one node and one
key head: of a node that many rows share with all their queries at once, `rows x SHARE`, of a row's
own with its alone. What it finds, unscaled, with its maximum and sum, is a part in float32; a
second kernel merges the parts of a row in the order of its chain. Splits are counted from the
node's start, so a row's parts do not depend on who else reads it.

Which rows read which nodes is a table of int64 on the device, a line for each field below, so that
a CUDA graph goes on as sequences grow.
"""

import triton
import triton.language as tl

from fastrl.kernels.attention.triton_kernels import LOWEST, _cap, _dot, _fetch

# Of a node: its address, first position, positions.
NODE_BASE = tl.constexpr(0)
NODE_START = tl.constexpr(1)
NODE_CAPACITY = tl.constexpr(2)
# Of a visit, a row that reads a node: the row, how many keys (-1: up to the row), its first part.
VISIT_ROW = tl.constexpr(3)
VISIT_LIMIT = tl.constexpr(4)
VISIT_PART = tl.constexpr(5)
# Of a row: its last node and first part; one line more than rows, for the end of the parts.
ROW_NODE = tl.constexpr(6)
ROW_PART = tl.constexpr(7)
# Of an item, what a program takes: node, first visit, visits (0: nothing), split. First those of
# shared nodes, then, in other fields, the others.
SHARED = tl.constexpr(8)
OWN = tl.constexpr(12)
FIELDS = 16


@triton.jit
def _at(table, size, field, i):
    return tl.load(table + field * size + i)


@triton.jit
def _lane(base, capacity, layer, kind, kv_head, kv_heads, D: tl.constexpr, like):
    """Where keys (0) or values (1) of a head begin in a node."""
    at = base.to(tl.pointer_type(like.dtype.element_ty), bitcast=True)
    return tl.multiple_of(at, 16) + ((layer * 2 + kind) * kv_heads + kv_head) * capacity * D


@triton.jit(do_not_specialize=["layer"])
def _write_kernel(
    k, v, table, positions, layer, size, k_stride, v_stride, D: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    node = _at(table, size, ROW_NODE, row)
    if node < 0:
        return
    base = _at(table, size, NODE_BASE, node)
    capacity = _at(table, size, NODE_CAPACITY, node)
    place = (tl.load(positions + row) - _at(table, size, NODE_START, node)) * D
    d = tl.arange(0, WIDTH)
    for kind in tl.static_range(2):
        source = k + row * k_stride if kind == 0 else v + row * v_stride
        new = tl.load(source + kv_head * D + d, mask=d < D, other=0.0)
        to = _lane(base, capacity, layer, kind, kv_head, kv_heads, D, k) + place
        tl.store(to + d, new, mask=d < D)


@triton.jit(do_not_specialize=["layer", "window"])
def _decode_kernel(
    q,
    table,
    positions,
    out,
    tops,
    totals,
    layer,
    size,
    q_stride,
    scale,
    softcap,
    window,
    FIELD: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = tl.program_id(0)
    visits = _at(table, size, FIELD + 2, item)
    if visits == 0:
        return
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    node = _at(table, size, FIELD, item)
    first = _at(table, size, FIELD + 3, item) * SPLIT
    start = _at(table, size, NODE_START, node)
    base = _at(table, size, NODE_BASE, node)
    capacity = _at(table, size, NODE_CAPACITY, node)
    keys = _lane(base, capacity, layer, 0, kv_head, kv_heads, D, q)
    values = _lane(base, capacity, layer, 1, kv_head, kv_heads, D, q)

    i = tl.arange(0, M)
    inside = i < visits * SHARE
    visit = _at(table, size, FIELD + 1, item) + tl.where(inside, i // SHARE, 0)
    row = _at(table, size, VISIT_ROW, visit)
    head = kv_head * SHARE + i % SHARE
    position = tl.load(positions + row)
    limit = _at(table, size, VISIT_LIMIT, visit)
    limit = tl.where(limit < 0, position - start + 1, limit)
    inside &= first < limit
    limit = tl.where(inside, limit, 0)
    oldest = tl.where(inside, position - start - window + 1, capacity) if WINDOW else limit * 0
    x = _fetch(q, row, head, q_stride, D, inside, D, WIDTH, True)

    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, WIDTH), tl.float32)
    begin = tl.maximum(first, tl.min(oldest, 0) // N * N) if WINDOW else first
    for block in range(begin, tl.minimum(first + SPLIT, tl.max(limit, 0)), N):
        j = block + tl.arange(0, N)
        there = j < tl.max(limit, 0)
        key = _fetch(keys, j, 0, D, 0, there, D, WIDTH, True)
        value = _fetch(values, j, 0, D, 0, there, D, WIDTH, True)
        scores, _ = _cap(_dot(x, key.T, None, WIDE), scale, softcap, SOFTCAP)
        seen = j[None, :] < limit[:, None]
        if WINDOW:
            seen &= j[None, :] >= oldest[:, None]
        scores = tl.where(seen, scores, LOWEST)
        new = tl.maximum(top, tl.max(scores, 1))
        exps = tl.where(seen, tl.exp(scores - new[:, None]), 0.0)
        factor = tl.exp(top - new)
        total = total * factor + tl.sum(exps, 1)
        result = _dot(exps.to(value.dtype), value, result * factor[:, None], WIDE)
        top = new
    part = _at(table, size, VISIT_PART, visit) + first // SPLIT
    at = part * (kv_heads * SHARE) + head
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, total, mask=inside)
    d = tl.arange(0, WIDTH)
    tl.store(out + at[:, None] * D + d[None, :], result, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _merge_kernel(
    parts, tops, totals, table, out, size, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr
):
    row = tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, WIDTH)
    end = _at(table, size, ROW_PART, row + 1)
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((WIDTH,), tl.float32)
    for begin in range(_at(table, size, ROW_PART, row), end, P):
        part = begin + tl.arange(0, P)
        at = part * heads + head
        sums = tl.load(totals + at, mask=part < end, other=0.0)
        some = sums > 0  # or it lies outside the window, and nothing was kept of it
        highest = tl.load(tops + at, mask=some, other=LOWEST)
        there = some[:, None] & (d < D)[None, :]
        found = tl.load(parts + at[:, None] * D + d[None, :], mask=there, other=0.0)
        new = tl.maximum(top, tl.max(highest, 0))
        before = tl.exp(top - new)
        factor = tl.where(some, tl.exp(highest - new), 0.0)
        total = total * before + tl.sum(factor * sums, 0)
        result = result * before + tl.sum(factor[:, None] * found, 0)
        top = new
    result /= tl.where(total > 0, total, 1.0)  # a row of padding has no parts
    places = out + (row * heads + head).to(tl.int64) * D + d
    tl.store(places, result.to(out.dtype.element_ty), mask=d < D)
