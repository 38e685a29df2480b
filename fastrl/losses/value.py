"""The critic's loss."""

import torch
from torch import Tensor

from fastrl.losses.reduction import check_tokens, masked_mean


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    clip: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss of PPO: per token
    `max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`.

    clip=None is `(V - R)^2 / 2`, whatever old_values. All tensors `[B, T]`, completion_mask bool;
    weights as in the policy losses. Metrics `value_loss` and `value_clip_fraction`, means over the
    masked tokens, and `value_error`, the mean of R - V. Raises `ValueError` for a clip that is not
    positive. Source: 1707.06347.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive, or None for off")
    check_tokens(
        completion_mask, values=values, old_values=old_values, returns=returns, weights=weights
    )
    values, old_values, returns = (
        torch.where(completion_mask, x, 0.0) for x in (values, old_values, returns)
    )
    plain = (values - returns).square()
    worst, clipped = plain, torch.zeros_like(completion_mask)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        far = (near - returns).square()
        worst, clipped = torch.maximum(plain, far), far > plain
    per_token = worst / 2
    metrics = {
        "value_loss": masked_mean(per_token.detach(), completion_mask),
        "value_clip_fraction": masked_mean(clipped.float(), completion_mask),
        "value_error": masked_mean((returns - values).detach(), completion_mask),
    }
    return (weights * per_token).sum(), metrics
