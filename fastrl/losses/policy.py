"""Policy losses: importance ratios, clipping and the KL to a reference."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastrl.losses.reduction import masked_mean

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from samples of pi, in nats.

    With `d = logprobs - ref_logprobs`: k1 `d`; k2 `d^2 / 2`; k3 `exp(-d) + d - 1`.
    Both inputs and the result are `[B, T]`. Raises `ValueError` for an unknown estimator.
    Source: Schulman, "Approximating KL divergence" (2020); k3 in 2402.03300.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.exp(-d) + d - 1
    raise ValueError(
        f"estimator={estimator!r} is unknown; use one of {', '.join(get_args(KLEstimator))}"
    )


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of PPO and GRPO, with an optional KL penalty to a reference.

    With `rho = exp(logprobs - old_logprobs)`, per token
    `-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + kl_coef * KL`; `dual_clip=c` bounds the
    loss of tokens with A < 0 by `c |A|`. The loss is `sum(weights * per_token)`.

    logprobs, old_logprobs, ref_logprobs, completion_mask (bool) and weights (see `token_weights`)
    are `[B, T]`; advantages `[B]` or `[B, T]`. At rho = 1 the gradient is REINFORCE's. Returns the
    scalar loss and, as means over the masked tokens, the metrics `clip_fraction`, `ratio`,
    `approx_kl` (k3 to old_logprobs) and, with a reference, `kl`. Raises `ValueError` for clip
    ranges that are not ranges and for a kl_coef without ref_logprobs. Sources: 1707.06347,
    2402.03300, 1912.09729 (dual clip).
    """
    if not (0 <= eps_low <= 1 and eps_high >= 0):
        raise ValueError(
            f"eps_low={eps_low} must lie in [0, 1] and eps_high={eps_high} be at least 0"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1, or None for off")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
    a = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    # Masked entries may hold anything; a NaN there must reach neither the sum nor a gradient.
    logprobs = torch.where(completion_mask, logprobs, 0.0)
    log_ratio = torch.where(completion_mask, logprobs - old_logprobs, 0.0)
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    per_token = -torch.min(ratio * a, clipped * a)
    if dual_clip is not None:
        per_token = torch.where(a < 0, torch.min(per_token, -dual_clip * a), per_token)
    outside = torch.where(a > 0, ratio > 1 + eps_high, (ratio < 1 - eps_low) & (a < 0))
    metrics = {
        "clip_fraction": masked_mean(outside.float(), completion_mask),
        "ratio": masked_mean(ratio.detach(), completion_mask),
        "approx_kl": masked_mean(
            torch.expm1(-log_ratio.detach()) + log_ratio.detach(), completion_mask
        ),
    }
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, torch.where(completion_mask, ref_logprobs, 0.0), kl_estimator)
        metrics["kl"] = masked_mean(kl.detach(), completion_mask)
        if kl_coef:
            per_token = per_token + kl_coef * kl
    return (weights * per_token).sum(), metrics
