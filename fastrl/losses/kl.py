"""KL to a reference, in the loss or in the reward, and the entropy bonus."""

from typing import get_args

import torch
from torch import Tensor

from fastrl.choices import KLEstimator
from fastrl.losses.reduction import check_tokens, masked_mean

# exp of it squares to a finite float32, and no ratio that means anything comes near it.
LOG_RATIO_CLAMP = 40.0


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: KLEstimator = "k3",
    *,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from samples of pi, in nats.

    With `d = logprobs - ref_logprobs`: k1 `d`; k2 `d^2 / 2`; k3 `exp(-d) + d - 1`, where d is
    clamped to `+-log_ratio_clamp`. `k1+` and `k3+` have the value of k1 and k3 and the gradient of
    k2, the only one whose expectation under pi is the gradient of the KL (that of k1 vanishes, that
    of k3 is KL(pi_ref || pi)'s). Both inputs and the result are `[B, T]`. Raises `ValueError` for
    an unknown estimator and a clamp that is not positive. Source: Schulman, "Approximating KL
    divergence" (2020); k3 in 2402.03300.
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(
            f"estimator={estimator!r} is unknown; use one of {', '.join(get_args(KLEstimator))}"
        )
    check_clamp(log_ratio_clamp)
    d = logprobs - ref_logprobs
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    small = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    value = d if estimator.startswith("k1") else torch.expm1(-small) + small
    return value.detach() + (k2 - k2.detach()) if estimator.endswith("+") else value


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    coef: float,
    estimator: KLEstimator = "k3",
    old_logprobs: Tensor | None = None,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL penalty in the loss: `coef * sum(weights * kl_estimate)`.

    With old_logprobs each estimate is times `rho = exp(logprobs - old_logprobs)`, which corrects
    for samples of an older policy. All tensors `[B, T]`, completion_mask bool. Metric `kl`, a mean
    over the masked tokens. Sources: 2402.03300; the correction, DeepSeek-V3.2.
    """
    check_tokens(
        completion_mask, logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs
    )
    logprobs = torch.where(completion_mask, logprobs, 0.0)
    ref_logprobs = torch.where(completion_mask, ref_logprobs, 0.0)
    kl = kl_estimate(logprobs, ref_logprobs, estimator, log_ratio_clamp=log_ratio_clamp)
    if old_logprobs is not None:
        log_ratio = torch.where(completion_mask, logprobs - old_logprobs, 0.0)
        kl = kl * log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    return coef * (weights * kl).sum(), {"kl": masked_mean(kl.detach(), completion_mask)}


def entropy_loss(
    entropy: Tensor, completion_mask: Tensor, weights: Tensor, *, coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Entropy bonus as a loss: `-coef * sum(weights * entropy)`, with the gradient of the entropy.

    entropy `[B, T]` in nats, as `linear_logprob(..., entropy=True)` returns it. TRL's bonus is a
    mean over tokens whatever the policy's reduction: pass `token_weights(mask, "dapo")`. Metric
    `entropy`.
    """
    check_tokens(completion_mask, entropy=entropy)
    entropy = torch.where(completion_mask, entropy, 0.0)
    metrics = {"entropy": masked_mean(entropy.detach(), completion_mask)}
    return -coef * (weights * entropy).sum(), metrics


@torch.no_grad()
def token_rewards(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    *,
    kl_coef: float,
    estimator: KLEstimator = "k1",
) -> Tensor:
    """Token rewards of PPO: the KL inside the reward and the score at the last token.

    `-kl_coef * kl_estimate(old_logprobs, ref_logprobs)_t + 1[t = last] r`, where the last token is
    the last one that the mask keeps. rewards `[B]`; the others `[B, T]`, completion_mask bool.
    Returns `[B, T]`, 0 at masked tokens. Source: 1909.08593.
    """
    check_tokens(completion_mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if rewards.shape != completion_mask.shape[:1]:
        raise ValueError(
            f"rewards must be [B] with B={completion_mask.shape[0]}, got {tuple(rewards.shape)}"
        )
    kl = kl_estimate(old_logprobs, ref_logprobs, estimator)
    count = completion_mask.cumsum(-1)
    last = completion_mask & (count == count[:, -1:])
    scores = torch.where(last, rewards.unsqueeze(-1), 0.0)
    return torch.where(completion_mask, scores - kl_coef * kl, 0.0)


def check_clamp(log_ratio_clamp: float) -> None:
    """Raise `ValueError` unless positive."""
    if not log_ratio_clamp > 0:
        raise ValueError(f"log_ratio_clamp={log_ratio_clamp} must be positive")
