"""Policy losses: importance ratios and what keeps them from running away.

Each function returns `(loss, metrics)` of `sum(weights * per_token)`; KL and entropy terms (kl.py)
and the value loss (value.py) are added to it. What they share:

logprobs, old_logprobs and weights (see `token_weights`) are `[B, T]`, completion_mask is bool
`[B, T]`, advantages `[B]` or `[B, T]`; masked entries may hold anything. `importance_weights`,
`[B, T]` or `[B, 1]`, multiplies the per-token loss and gets no gradient: `mismatch_weights`,
`off_policy_mask` or a product of such factors. `log rho = logprobs - old_logprobs` is clamped to
`+-log_ratio_clamp`; the default is far outside what training meets (verl clamps to 20, TRL not at
all). Metrics are means over the masked tokens: `ratio`, `approx_kl` (k3 to old_logprobs) and,
where there is a bound, `clip_fraction`. Raises `ValueError` for bounds that are not bounds and for
tensors of another shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.choices import KLEstimator
from fastrl.losses.kl import LOG_RATIO_CLAMP, kl_loss
from fastrl.losses.ratio import (
    Loss,
    RatioLevel,
    check_range,
    clipped_loss,
    prepare,
    ratio_metrics,
    ratio_of,
    row_mean,
    weighted,
)
from fastrl.losses.reduction import masked_mean


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    ratio_level: RatioLevel = "token",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
) -> Loss:
    """Clipped policy-gradient loss of PPO, GRPO and DAPO, with an optional KL to a reference.

    Per token `-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + kl_coef * KL`;
    `dual_clip=c` bounds the loss of tokens with A < 0 by `c |A|`. At rho = 1 the gradient is
    REINFORCE's. `ratio_level` says what rho is: the token's ratio; "sequence", `exp(mean_t log
    rho_t)`; "sequence_token", the same value with the gradient of the token's own log-prob;
    "sequence_sum", the ratio of the whole completion (RLOO in TRL). With ref_logprobs there is the
    metric `kl`. Raises `ValueError` for a kl_coef without ref_logprobs. Sources: 1707.06347,
    2402.03300, 2503.14476, 1912.09729 (dual clip).
    """
    check_range(eps_low, eps_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1, or None for off")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, log_ratio_clamp)
    a, ratio = tokens.advantages, ratio_of(tokens, completion_mask, ratio_level, log_ratio_clamp)
    per_token = clipped_loss(ratio, a, eps_low, eps_high)
    if dual_clip is not None:
        per_token = torch.where(a < 0, torch.min(per_token, -dual_clip * a), per_token)
    outside = torch.where(a > 0, ratio > 1 + eps_high, (ratio < 1 - eps_low) & (a < 0))
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    metrics = ratio_metrics(tokens, ratio, completion_mask, outside)
    if ref_logprobs is not None:
        penalty, kl = kl_loss(
            logprobs, ref_logprobs, completion_mask, weights, coef=kl_coef, estimator=kl_estimator
        )
        loss, metrics = (loss + penalty if kl_coef else loss), metrics | kl
    return loss, metrics


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    token_level: bool = False,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """GSPO: the clipped loss with one ratio for each sequence, `s = exp(mean_t log rho_t)`.

    token_level is the paper's GSPO-token, the same value where the advantages are, with gradients
    token by token; it is what verl computes. The paper's reduction is grpo. Source: 2507.18071.
    """
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        completion_mask,
        weights,
        importance_weights=importance_weights,
        ratio_level="sequence_token" if token_level else "sequence",
        eps_low=eps_low,
        eps_high=eps_high,
        log_ratio_clamp=log_ratio_clamp,
    )


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    max_ratio: float = 5.0,
    min_ratio: float = 0.0,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """CISPO: `-sg(clip(rho, min_ratio, max_ratio)) A logprobs`; no token loses its gradient.

    TRL's epsilon_high is the bound itself, as max_ratio is here; where the bound is 1 + eps_high
    (the paper, verl) pass that, and verl's `min_ratio = 1 - eps_low`. Source: 2506.13585.
    """
    if not 0 <= min_ratio <= max_ratio:
        raise ValueError(f"need 0 <= min_ratio={min_ratio} <= max_ratio={max_ratio}")
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, log_ratio_clamp)
    ratio = tokens.log_ratio.detach().exp()
    per_token = -ratio.clamp(min_ratio, max_ratio) * tokens.advantages * tokens.logprobs
    outside = (ratio > max_ratio) | (ratio < min_ratio)
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    return loss, ratio_metrics(tokens, ratio, completion_mask, outside)


def sapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """SAPO: a soft gate instead of a clip, `-(4 / tau) sigmoid(tau (rho - 1)) A`.

    tau is tau_pos where A > 0, tau_neg elsewhere. The gate's slope at rho = 1 is 1 for any tau.
    Source: 2511.20347.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ValueError(f"tau_pos={tau_pos} and tau_neg={tau_neg} must be positive")
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, log_ratio_clamp)
    a, ratio = tokens.advantages, tokens.log_ratio.exp()
    tau = torch.where(a > 0, tau_pos, tau_neg)
    per_token = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * a
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    return loss, ratio_metrics(tokens, ratio, completion_mask)


def gmpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
    eps_low: float = 0.4,
    eps_high: float = 0.4,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """GMPO: `-A` times the geometric mean over the sequence of the token ratios, each clipped.

    The clip is in log space, `[-eps_low, eps_high]`, and one-sided by the sign of A, as PPO's.
    Each token of a row holds the row's value, so reduction grpo gives the paper's mean over rows;
    advantages `[B, T]` are averaged over the row. Source: 2507.20673.
    """
    if not (eps_low >= 0 and eps_high >= 0):
        raise ValueError(f"eps_low={eps_low} and eps_high={eps_high} must be at least 0")
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, log_ratio_clamp)
    a = row_mean(tokens.advantages, completion_mask)
    clipped = tokens.log_ratio.clamp(-eps_low, eps_high)
    lower, upper = (f(tokens.log_ratio, clipped) for f in (torch.minimum, torch.maximum))
    kept = torch.where(a > 0, lower, upper)
    per_token = -a * row_mean(kept, completion_mask).exp()
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    return loss, ratio_metrics(
        tokens, tokens.log_ratio.exp(), completion_mask, (kept != tokens.log_ratio) & (a != 0)
    )


def reinforce_loss(
    logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    importance_weights: Tensor | None = None,
) -> Loss:
    """REINFORCE: `-A logprobs`. With reduction sequence_sum its gradient is the policy gradient."""
    tokens = prepare(logprobs, logprobs, advantages, completion_mask, LOG_RATIO_CLAMP)
    per_token = -tokens.advantages * tokens.logprobs
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    return loss, {"nll": masked_mean(-tokens.logprobs.detach(), completion_mask)}


# What share the same five leading arguments, by the name that recipes use.
POLICY_LOSSES: dict[str, Callable[..., Loss]] = {
    "clip": policy_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "gmpo": gmpo_loss,
}
