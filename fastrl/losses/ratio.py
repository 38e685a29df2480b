"""What the policy losses share: their tokens, their ratios, and the way to `(loss, metrics)`."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastrl.losses.kl import check_clamp
from fastrl.losses.reduction import check_tokens, masked_mean

RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_sum"]
Loss = tuple[Tensor, dict[str, Tensor]]


class Tokens(NamedTuple):
    """Log-probs, log rho and advantages `[B, T]`, zero where masked."""

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor


def prepare(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clamp: float
) -> Tokens:
    a = advantages.unsqueeze(-1).expand(mask.shape) if advantages.dim() == 1 else advantages
    check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=a)
    check_clamp(clamp)
    # Masked entries may hold anything; a NaN there must reach neither the sum nor a gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return Tokens(
        torch.where(mask, logprobs, 0.0), log_ratio.clamp(-clamp, clamp), torch.where(mask, a, 0.0)
    )


def ratio_of(tokens: Tokens, mask: Tensor, level: RatioLevel, clamp: float) -> Tensor:
    if level == "token":
        return tokens.log_ratio.exp()
    if level == "sequence_sum":
        total = tokens.log_ratio.sum(-1, keepdim=True).clamp(-clamp, clamp)
        return total.exp().expand(mask.shape)
    mean = row_mean(tokens.log_ratio, mask)
    if level == "sequence":
        return mean.exp()
    if level == "sequence_token":
        return (mean.detach() + tokens.logprobs - tokens.logprobs.detach()).exp()
    raise ValueError(
        f"ratio_level={level!r} is unknown; use one of {', '.join(get_args(RatioLevel))}"
    )


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's tokens, at each of its positions; x is zero where masked."""
    return (x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)


def clipped_loss(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    return -torch.min(ratio * advantages, clipped * advantages)


def check_range(eps_low: float, eps_high: float) -> None:
    if not (0 <= eps_low <= 1 and eps_high >= 0):
        raise ValueError(
            f"eps_low={eps_low} must lie in [0, 1] and eps_high={eps_high} be at least 0"
        )


def weighted(
    per_token: Tensor, importance_weights: Tensor | None, mask: Tensor, weights: Tensor
) -> Tensor:
    if importance_weights is not None:
        if importance_weights.shape not in (mask.shape, (mask.shape[0], 1)):
            raise ValueError(
                f"importance_weights must be [B, T] = {tuple(mask.shape)} or [B, 1], got "
                f"{tuple(importance_weights.shape)}"
            )
        factor = importance_weights.detach().expand(mask.shape)
        per_token = per_token * torch.where(mask, factor, 0.0)
    check_tokens(mask, weights=weights)
    return (weights * torch.where(mask, per_token, 0.0)).sum()


def ratio_metrics(
    tokens: Tokens, ratio: Tensor, mask: Tensor, outside: Tensor | None = None
) -> dict[str, Tensor]:
    log_ratio = tokens.log_ratio.detach()
    metrics = {} if outside is None else {"clip_fraction": masked_mean(outside.float(), mask)}
    return metrics | {
        "ratio": masked_mean(ratio.detach(), mask),
        "approx_kl": masked_mean(torch.expm1(-log_ratio) + log_ratio, mask),
    }
