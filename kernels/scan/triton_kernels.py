"""Reverse scans in Triton: one program per segment, blocks walked from its end.

A token is an affine map of what follows it, acc[t] = c[t] acc[t+1] + d[t]; maps compose, so a block
is one associative scan, and a masked token is the identity. ``latest`` carries values the same way:
it holds the nearest valid one to the right. Both count from the segment's end and the block size is
fixed, so a segment's bits do not depend on its batch.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
WARPS = 4


@triton.jit
def _after(c_right, d_right, c, d):
    return c * c_right, d + c * d_right


@triton.jit
def _after_exclusive(c_right, d_right, ec_right, ed_right, c, d, ec, ed):
    # ec, ed: the maps to the right of the leftmost token alone.
    return c * c_right, d + c * d_right, ec * c_right, ed + ec * d_right


@triton.jit
def _latest(has_right, x_right, has, x):
    return has | has_right, tl.where(has != 0, x, x_right)


@triton.jit
def _segment(cu_seqlens, bootstrap, length, PACKED: tl.constexpr, BOOTSTRAP: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + s).to(tl.int64)
        end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    else:
        begin = s * length
        end = begin + length
    after = tl.load(bootstrap + s) if BOOTSTRAP else 0.0
    return begin, end, after


@triton.jit
def _valid(mask, i, inside, MASKED: tl.constexpr):
    if MASKED:
        return inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def _next_value(values, mask, i, end, carry, begin, MASKED: tl.constexpr):
    """The value at the nearest valid token right of each, ``carry`` where the block has none."""
    inside = (i + 1 >= begin) & (i + 1 < end)
    valid = _valid(mask, i + 1, inside, MASKED)
    x = tl.load(values + i + 1, mask=valid, other=0.0)
    has, x = tl.associative_scan((valid.to(tl.int32), x), 0, _latest, reverse=True)
    return tl.where(has != 0, x, carry)


@triton.jit
def _first(x, lane):
    """Lane 0 of a block; not a product with a mask, so that NaN elsewhere stays there."""
    return tl.sum(tl.where(lane == 0, x, 0.0), 0)


@triton.jit
def _gae_kernel(
    rewards,
    values,
    advantages,
    returns,
    mask,
    cu_seqlens,
    bootstrap,
    length,
    gamma,
    gamma_lam,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end, after = _segment(cu_seqlens, bootstrap, length, PACKED, BOOTSTRAP)
    lane = tl.arange(0, BLOCK)
    next_value, next_advantage = after + 0.0, 0.0
    for walked in range(0, end - begin, BLOCK):
        i = end - walked - BLOCK + lane
        inside = i >= begin
        valid = _valid(mask, i, inside, MASKED)
        reward = tl.load(rewards + i, mask=valid, other=0.0)
        value = tl.load(values + i, mask=valid, other=0.0)
        following = _next_value(values, mask, i, end, next_value, begin, MASKED)
        delta = tl.where(valid, reward + gamma * following - value, 0.0)
        c = tl.where(valid, gamma_lam, 1.0)
        c, d = tl.associative_scan((c, delta), 0, _after, reverse=True)
        advantage = d + c * next_advantage
        tl.store(advantages + i, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(returns + i, tl.where(valid, advantage + value, 0.0), mask=inside)
        next_value = _first(tl.where(valid, value, following), lane)
        next_advantage = _first(advantage, lane)


@triton.jit
def _discounted_returns_kernel(
    rewards,
    returns,
    mask,
    cu_seqlens,
    bootstrap,
    length,
    gamma,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end, after = _segment(cu_seqlens, bootstrap, length, PACKED, BOOTSTRAP)
    lane = tl.arange(0, BLOCK)
    next_return = after + 0.0
    for walked in range(0, end - begin, BLOCK):
        i = end - walked - BLOCK + lane
        inside = i >= begin
        valid = _valid(mask, i, inside, MASKED)
        d = tl.load(rewards + i, mask=valid, other=0.0)
        c = tl.where(valid, gamma, 1.0)
        c, d = tl.associative_scan((c, d), 0, _after, reverse=True)
        result = d + c * next_return
        tl.store(returns + i, tl.where(valid, result, 0.0), mask=inside)
        next_return = _first(result, lane)


@triton.jit
def _vtrace_kernel(
    rewards,
    values,
    logprobs,
    old_logprobs,
    targets,
    advantages,
    mask,
    cu_seqlens,
    bootstrap,
    length,
    gamma,
    gamma_lam,
    rho_bar,
    c_bar,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end, after = _segment(cu_seqlens, bootstrap, length, PACKED, BOOTSTRAP)
    lane = tl.arange(0, BLOCK)
    next_value, next_gap = after + 0.0, 0.0
    for walked in range(0, end - begin, BLOCK):
        i = end - walked - BLOCK + lane
        inside = i >= begin
        valid = _valid(mask, i, inside, MASKED)
        reward = tl.load(rewards + i, mask=valid, other=0.0)
        value = tl.load(values + i, mask=valid, other=0.0)
        new = tl.load(logprobs + i, mask=valid, other=0.0)
        old = tl.load(old_logprobs + i, mask=valid, other=0.0)
        ratio = tl.exp(new - old)
        rho = tl.where(ratio > rho_bar, rho_bar, ratio)  # keeps NaN, as torch.clamp does
        following = _next_value(values, mask, i, end, next_value, begin, MASKED)
        d = tl.where(valid, rho * (reward + gamma * following - value), 0.0)
        c = tl.where(valid, gamma_lam * tl.where(ratio > c_bar, c_bar, ratio), 1.0)
        c, d, ec, ed = tl.associative_scan(
            (c, d, tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32)),
            0,
            _after_exclusive,
            reverse=True,
        )
        gap = d + c * next_gap
        next_target = following + (ed + ec * next_gap)
        advantage = rho * (reward + gamma * next_target - value)
        tl.store(targets + i, tl.where(valid, gap + value, 0.0), mask=inside)
        tl.store(advantages + i, tl.where(valid, advantage, 0.0), mask=inside)
        next_value = _first(tl.where(valid, value, following), lane)
        next_gap = _first(gap, lane)


KERNELS = {
    "gae": _gae_kernel,
    "discounted_returns": _discounted_returns_kernel,
    "vtrace": _vtrace_kernel,
}


def launch(
    op: str,
    tokens: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    coefficients: tuple[float, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> None:
    """Fills ``results``.

    Contiguous float32 tensors, bool mask, int32 cu_seqlens, all on one device.
    """
    first = tokens[0]
    segments, length = first.shape if cu_seqlens is None else (len(cu_seqlens) - 1, 0)
    KERNELS[op][(segments,)](
        *tokens,
        *results,
        mask,
        cu_seqlens,
        bootstrap,
        length,
        *coefficients,
        MASKED=mask is not None,
        PACKED=cu_seqlens is not None,
        BOOTSTRAP=bootstrap is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
