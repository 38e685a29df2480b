"""Losses that fit a reward to preferences.

Rewards are the model's scalars, one for a completion. Per-comparison losses are averaged, or
weighted by `weights` `[B]` (1 / B of the whole step, under micro-batches). Metrics are means over
the comparisons.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.losses.reduction import check_rows, masked_mean, weighted_rows


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    centering: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry: `-log sigmoid(r+ - r- - margin) + centering (r+ + r-)^2`.

    label_smoothing e is the share of labels taken to be wrong: `(1 - e)` of the loss plus `e` of
    that of the swapped pair. All tensors `[B]`. Metrics `accuracy` and `margin` (r+ - r-). Sources:
    Bradley and Terry (1952); margin 2307.09288; centring 2312.09244.
    """
    check_rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, margin=margin)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 0.5)")
    gap = chosen_rewards - rejected_rewards
    shifted = gap if margin is None else gap - margin
    per_pair = -F.logsigmoid(shifted)
    if label_smoothing:
        per_pair = (1 - label_smoothing) * per_pair - label_smoothing * F.logsigmoid(-shifted)
    if centering:
        per_pair = per_pair + centering * (chosen_rewards + rejected_rewards).square()
    metrics = {
        "accuracy": weighted_rows((gap > 0).to(gap.dtype), None),
        "margin": weighted_rows(gap.detach(), None),
    }
    return weighted_rows(per_pair, weights), metrics


def classification_loss(
    rewards: Tensor, labels: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of each item by itself: winners 1, losers 0; the logit is the reward.

    It orders items as Bradley-Terry does without needing pairs. rewards and labels (in [0, 1]; a
    fraction is a soft label) `[B]`. Metric `accuracy`. Source: 2411.04991.
    """
    check_rows(rewards=rewards, labels=labels)
    labels = labels.to(rewards.dtype)
    if bool(((labels < 0) | (labels > 1)).any()):
        raise ValueError("labels must lie in [0, 1]")
    per_item = F.binary_cross_entropy_with_logits(rewards, labels, reduction="none")
    right = ((rewards > 0) == (labels > 0.5)).to(rewards.dtype)
    return weighted_rows(per_item, weights), {"accuracy": weighted_rows(right, None)}


def plackett_luce_loss(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Plackett-Luce (K-wise): `-sum_k log softmax(r_k, ..., r_K)_k` of a ranking, best first.

    With K = 2 it is Bradley-Terry. top_k counts only the first k choices, for rankings whose tail
    is not ordered. rewards `[B, K]`; mask bool `[B, K]`, False where a row has fewer items (those
    may hold anything). Metric `accuracy`, over pairs of the ranking. Sources: Plackett (1975),
    2301.11270.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, K], got {tuple(rewards.shape)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool or mask.shape != rewards.shape:
        raise ValueError(
            f"mask must be bool {tuple(rewards.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    filled = torch.where(mask, rewards, torch.finfo(rewards.dtype).min)
    remaining = filled.flip(-1).logcumsumexp(-1).flip(-1)
    counted = mask if top_k is None else mask & (mask.cumsum(-1) <= top_k)
    per_row = torch.where(counted, remaining - filled, 0.0).sum(-1)
    known = torch.where(mask, rewards, 0.0).detach()
    above = known.unsqueeze(-1) > known.unsqueeze(-2)
    pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)
    return weighted_rows(per_row, weights), {"accuracy": masked_mean(above.float(), pairs)}
