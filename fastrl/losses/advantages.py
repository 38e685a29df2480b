"""Advantages of sampled completions."""

import torch
from torch import Tensor


def grpo_advantages(
    rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4
) -> Tensor:
    """Group-relative advantages `(r_i - mean) / (std + eps)`.

    Without scale `r_i - mean` (Dr. GRPO).

    mean and std (unbiased) run over the `group_size` neighbouring rewards of one prompt; a group
    whose rewards are all equal has advantage 0. rewards `[B]`, B a multiple of group_size; returns
    `[B]` float32. Raises `ValueError` for a group_size below 2, a B that it does not divide, and
    non-finite rewards. Sources: 2402.03300, 2503.20783.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size={group_size} must be at least 2: one reward has no group to compare with"
        )
    if rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards must be [B] with B a multiple of group_size={group_size}, got "
            f"{tuple(rewards.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite, got NaN or infinity")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + eps)
    return centred.flatten()
