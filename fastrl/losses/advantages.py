"""Advantages of sampled completions. V-trace is `fastrl.kernels.vtrace`.

Where a group_size is asked for, rewards are `[B]` with the completions of one prompt next to each
other, and B is a multiple of it. Baselines and normalisation are those of the tensors given, so
give the rewards of the whole step, of all processes. Results are float32 (float64 for float64
rewards) without gradients. Raises `ValueError` for a group_size that does not fit and for
non-finite rewards.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastrl.kernels import discounted_returns, gae
from fastrl.losses.reduction import check_rows, check_tokens

MaskedTokens = Literal["carry", "step"]


def grpo_advantages(
    rewards: Tensor, group_size: int, *, scale: bool | Literal["batch"] = True, eps: float = 1e-4
) -> Tensor:
    """Group-relative advantages `(r_i - mean) / (std + eps)`.

    scale=False is `r_i - mean` (Dr. GRPO); scale="batch" takes the std of all rewards.

    mean and std (unbiased) run over the `group_size` neighbouring rewards of one prompt; a group
    whose rewards are all equal has advantage 0. eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in
    OpenRLHF. rewards `[B]`; returns `[B]`. Sources: 2402.03300, 2503.20783.
    """
    if scale not in (True, False, "batch"):
        raise ValueError(f"scale={scale!r} must be True, False or 'batch'")
    groups = _groups(rewards, group_size, least=2)
    centred = _centred(groups)
    if scale == "batch":
        centred = centred / (groups.std() + eps)
    elif scale:
        centred = centred / (groups.std(1, keepdim=True) + eps)
    return centred.flatten()


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Leave-one-out advantages: `r_i` less the mean of the others of its group.

    Exactly `G / (G - 1)` times Dr. GRPO's. rewards `[B]`; returns `[B]`. Source: 2402.14740.
    """
    groups = _groups(rewards, group_size, least=2)
    return (_centred(groups) * (group_size / (group_size - 1))).flatten()


def maxrl_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """MaxRL: `(r_i - mean) / mean` over the group; 0 where all rewards are 0.

    rewards `[B]`, at least 0 (`ValueError` otherwise); returns `[B]`. Source: 2602.02710.
    """
    groups = _groups(rewards, group_size, least=2)
    if (groups < 0).any():
        raise ValueError(f"rewards must be at least 0 for MaxRL, got {groups.min().item()}")
    mean = groups.mean(1, keepdim=True)
    return (_centred(groups) / mean.masked_fill(mean == 0, 1.0)).flatten()


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor, group_size: int = 1) -> Tensor:
    """ReMax: the reward less that of the greedy completion of the same prompt.

    rewards `[B]`, greedy_rewards `[B / group_size]`; returns `[B]`. Source: 2310.10505.
    """
    groups = _groups(rewards, group_size, least=1)
    baseline = _groups(greedy_rewards, 1, least=1)
    if len(baseline) != len(groups):
        raise ValueError(
            f"greedy_rewards must be [B / group_size] = {len(groups)}, got "
            f"{tuple(greedy_rewards.shape)}"
        )
    return (groups - baseline).flatten()


def opo_advantages(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """OPO: `r_i - sum(len r) / sum(len)`, the length-weighted baseline of the group.

    rewards and lengths (tokens of each completion) `[B]`; returns `[B]`. Source: 2505.23585.
    """
    check_rows(rewards=rewards, lengths=lengths)
    groups = _groups(rewards, group_size, least=2)
    length = lengths.to(groups.dtype).view_as(groups)
    total = length.sum(1, keepdim=True)
    baseline = (length * groups).sum(1, keepdim=True) / total.clamp(min=1)
    return (groups - baseline).masked_fill(_equal(groups), 0.0).flatten()


def reinforce_plus_plus_advantages(
    token_rewards: Tensor,
    completion_mask: Tensor,
    *,
    gamma: float = 1.0,
    group_size: int | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """REINFORCE++: returns to go of the token rewards, normalised over the tokens of the batch.

    token_rewards (see `kl.token_rewards`) and completion_mask (bool) `[B, T]`; returns `[B, T]`.
    With a group_size the baseline variant: each row's sum of rewards less its group's mean, at each
    of its tokens, then normalised; it takes no gamma but 1. Source: 2501.03262.
    """
    check_tokens(completion_mask, token_rewards=token_rewards)
    if group_size is None:
        returns = discounted_returns(token_rewards, gamma=gamma, mask=completion_mask)
        return normalize_advantages(returns, completion_mask, eps=eps)
    if gamma != 1:
        raise ValueError(f"gamma={gamma} must be 1 with group_size={group_size}")
    scores = torch.where(completion_mask, token_rewards, 0.0).sum(-1)
    centred = _centred(_groups(scores, group_size, least=2)).flatten()
    return normalize_advantages(
        centred.unsqueeze(-1).expand(completion_mask.shape), completion_mask, eps=eps
    )


def gae_advantages(
    token_rewards: Tensor,
    values: Tensor,
    completion_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    normalize: bool = True,
    masked_tokens: MaskedTokens = "carry",
) -> tuple[Tensor, Tensor]:
    """PPO's advantages and the returns that the critic learns: `(advantages, returns)`.

    GAE by `fastrl.kernels.gae`; normalize sets mean 0 and std 1 over the tokens of the batch.
    token_rewards, values and completion_mask (bool) `[B, T]`, bootstrap `[B]` the value after the
    last token (0 by default: the completion ended). A masked token inside a completion (a tool's)
    is skipped: what comes after is carried across it, as in verl; masked_tokens="step" makes it a
    time step of reward and value 0, as in OpenRLHF. Source: 1506.02438.
    """
    if masked_tokens not in get_args(MaskedTokens):
        raise ValueError(
            f"masked_tokens={masked_tokens!r} is unknown; use one of "
            f"{', '.join(get_args(MaskedTokens))}"
        )
    check_tokens(completion_mask, token_rewards=token_rewards, values=values)
    steps = completion_mask
    if masked_tokens == "step":
        token_rewards, values = (
            torch.where(completion_mask, x, 0.0) for x in (token_rewards, values)
        )
        steps = completion_mask.int().flip(-1).cummax(-1).values.flip(-1).bool()
    advantages, returns = gae(
        token_rewards, values, gamma=gamma, lam=lam, mask=steps, bootstrap=bootstrap
    )
    advantages, returns = (torch.where(completion_mask, x, 0.0) for x in (advantages, returns))
    if normalize:
        advantages = normalize_advantages(advantages, completion_mask)
    return advantages, returns


@torch.no_grad()
def normalize_advantages(
    advantages: Tensor, completion_mask: Tensor | None = None, *, eps: float = 1e-8
) -> Tensor:
    """`(A - mean) / sqrt(var + eps)` over the entries that the mask keeps, all 0 if all are equal.

    var is unbiased. advantages of any shape, completion_mask bool of that shape; masked entries may
    hold anything and become 0.
    """
    mask = torch.ones_like(advantages, dtype=torch.bool)
    mask = mask if completion_mask is None else completion_mask
    kept = advantages[mask]
    if kept.numel() == 0 or bool((kept == kept[0]).all()):
        return torch.zeros_like(advantages)
    scaled = (advantages - kept.mean()) / (kept.var() + eps).sqrt()
    return torch.where(mask, scaled, 0.0)


def overlong_penalty(lengths: Tensor, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft penalty on length, to add to the rewards.

    0 up to `max_length - cache_length` tokens, then falling linearly to -1 at max_length, and -1
    beyond. lengths `[B]` in tokens; returns `[B]` float32. Source: 2503.14476.
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"cache_length={cache_length} must lie in 1..max_length={max_length}")
    return ((max_length - cache_length - lengths.float()) / cache_length).clamp(-1.0, 0.0)


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which completions are of a group whose rewards differ; DAPO resamples the others.

    rewards `[B]`; returns `[B]` bool. Source: 2503.14476.
    """
    groups = _groups(rewards, group_size, least=2)
    return (~_equal(groups)).expand(groups.shape).flatten()


def _groups(rewards: Tensor, group_size: int, *, least: int) -> Tensor:
    if group_size < least:
        raise ValueError(
            f"group_size={group_size} must be at least {least}: one reward has no group to "
            "compare with"
        )
    if rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards must be [B] with B a multiple of group_size={group_size}, got "
            f"{tuple(rewards.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite, got NaN or infinity")
    rewards = rewards.detach()
    wide = rewards if rewards.dtype == torch.float64 else rewards.float()
    return wide.view(-1, group_size)


def _equal(groups: Tensor) -> Tensor:
    return (groups == groups[:, :1]).all(1, keepdim=True)


def _centred(groups: Tensor) -> Tensor:
    """`r - mean`, exactly 0 for equal rewards, whose mean may be rounded."""
    return (groups - groups.mean(1, keepdim=True)).masked_fill(_equal(groups), 0.0)
