"""The shortest plain PyTorch that is right: a loop over time, in the dtype of its inputs.

The arguments are those of the public functions. A masked token gives 0 and leaves what is carried
as it was. The order of operations is the CPU kernel's, so that in float32 both give the same bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Outputs:
    """delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns A + V."""
    (rewards, values), mask, next_value, back = _rows(
        (rewards, values), mask, cu_seqlens, bootstrap
    )
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        valid, value = mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0)
        returns[:, t] = torch.where(valid, advantage + value, 0)
        next_value = torch.where(valid, value, next_value)
        next_advantage = torch.where(valid, advantage, next_advantage)
    return back(advantages), back(returns)


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Outputs:
    """R_t = r_t + gamma R_{t+1}; a tuple of one."""
    (rewards,), mask, next_return, back = _rows((rewards,), mask, cu_seqlens, bootstrap)
    returns = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t]
        next_return = torch.where(valid, rewards[:, t] + gamma * next_return, next_return)
        returns[:, t] = torch.where(valid, next_return, 0)
    return (back(returns),)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Outputs:
    """vs_t - V_t = rho_t delta_t + gamma lam c_t (vs_{t+1} - V_{t+1}), and the advantages."""
    (rewards, values, logprobs, old_logprobs), mask, next_value, back = _rows(
        (rewards, values, logprobs, old_logprobs), mask, cu_seqlens, bootstrap
    )
    ratio = torch.exp(logprobs - old_logprobs)
    targets, advantages = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_target, next_gap = next_value, torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        valid, reward, value = mask[:, t], rewards[:, t], values[:, t]
        rho, c = ratio[:, t].clamp(max=rho_bar), ratio[:, t].clamp(max=c_bar)
        advantage = rho * (reward + gamma * next_target - value)
        gap = rho * (reward + gamma * next_value - value) + gamma * lam * c * next_gap
        target = gap + value
        targets[:, t] = torch.where(valid, target, 0)
        advantages[:, t] = torch.where(valid, advantage, 0)
        next_value = torch.where(valid, value, next_value)
        next_target = torch.where(valid, target, next_target)
        next_gap = torch.where(valid, gap, next_gap)
    return back(targets), back(advantages)


def _rows(
    tokens: Sequence[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Tokens as ``[B, T]``, mask and bootstrap filled in, and the way back to that layout."""
    first = tokens[0]
    mask = first.new_ones(first.shape, dtype=torch.bool) if mask is None else mask
    if cu_seqlens is None:
        bootstrap = first.new_zeros(len(first)) if bootstrap is None else bootstrap
        return list(tokens), mask, bootstrap, lambda rows: rows
    lengths = cu_seqlens.diff()
    bootstrap = first.new_zeros(len(lengths)) if bootstrap is None else bootstrap
    longest = int(lengths.max()) if len(lengths) else 0
    inside = torch.arange(longest, device=first.device) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(inside.shape).masked_scatter(inside, x)

    return [padded(x) for x in tokens], padded(mask), bootstrap, lambda rows: rows[inside]
