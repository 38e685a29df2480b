"""Clip-Cov and KL-Cov: hold back the few tokens that drive the entropy down.

Which tokens depends on the whole batch, so they are selected before it is split into micro-batches,
and the losses take the selection.
"""

import torch
from torch import Tensor

from fastrl.losses.kl import LOG_RATIO_CLAMP
from fastrl.losses.policy import policy_loss
from fastrl.losses.ratio import Loss, check_range, prepare, ratio_metrics, weighted
from fastrl.losses.reduction import check_tokens, masked_mean


@torch.no_grad()
def clip_cov_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens that Clip-Cov detaches: drawn from those whose covariance lies in (low, high).

    The covariance of a token is `(A - mean A)(logprobs - mean logprobs)` over the masked tokens;
    those that the ratio clip already stops are left out. `max(1, fraction N)` of the N tokens are
    drawn, or as many as there are. Shapes as in `policy_loss`; returns `[B, T]` bool. Source:
    2505.22617.
    """
    check_range(eps_low, eps_high)
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, LOG_RATIO_CLAMP)
    a, ratio = tokens.advantages, tokens.log_ratio.exp()
    clipped = torch.where(a > 0, ratio > 1 + eps_high, (ratio < 1 - eps_low) & (a < 0))
    covariance = _covariance(tokens.logprobs, a, completion_mask)
    eligible = completion_mask & ~clipped & (covariance > low) & (covariance < high)
    places = eligible.flatten().nonzero().squeeze(-1)
    count = _count(completion_mask, fraction)
    order = torch.randperm(len(places), generator=generator).to(places.device)
    selected = torch.zeros_like(eligible).flatten()
    selected[places[order[:count]]] = True
    return selected.view_as(eligible)


@torch.no_grad()
def kl_cov_mask(
    logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, *, fraction: float = 2e-4
) -> Tensor:
    """The tokens that KL-Cov penalises: the `max(1, fraction N)` with the highest covariance.

    Shapes as in `policy_loss`; returns `[B, T]` bool. Source: 2505.22617.
    """
    tokens = prepare(logprobs, logprobs, advantages, completion_mask, LOG_RATIO_CLAMP)
    covariance = _covariance(tokens.logprobs, tokens.advantages, completion_mask)
    covariance = covariance.masked_fill(~completion_mask, -torch.inf).flatten()
    count = min(_count(completion_mask, fraction), int(completion_mask.sum()))
    selected = torch.zeros_like(completion_mask).flatten()
    selected[covariance.topk(count).indices] = True
    return selected.view_as(completion_mask)


def clip_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    selected: Tensor,
    importance_weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """Clip-Cov: the clipped loss without the selected tokens (`clip_cov_mask`).

    selected `[B, T]` bool; the rest as in `policy_loss`. Metric `selected`, their share. Source:
    2505.22617.
    """
    check_tokens(completion_mask, selected=selected)
    factor = (~selected).to(weights.dtype)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        completion_mask,
        weights,
        importance_weights=factor if importance_weights is None else factor * importance_weights,
        eps_low=eps_low,
        eps_high=eps_high,
        log_ratio_clamp=log_ratio_clamp,
    )
    return loss, metrics | {"selected": masked_mean(selected.float(), completion_mask)}


def kl_cov_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    selected: Tensor,
    importance_weights: Tensor | None = None,
    kl_coef: float = 1.0,
    log_ratio_clamp: float = LOG_RATIO_CLAMP,
) -> Loss:
    """KL-Cov: `-rho A`, with `kl_coef |log rho|` added at the selected tokens (`kl_cov_mask`).

    selected `[B, T]` bool; the rest as in `policy_loss`. Metric `selected`, their share. Source:
    2505.22617.
    """
    check_tokens(completion_mask, selected=selected)
    tokens = prepare(logprobs, old_logprobs, advantages, completion_mask, log_ratio_clamp)
    ratio = tokens.log_ratio.exp()
    penalty = torch.where(selected, kl_coef * tokens.log_ratio.abs(), 0.0)
    per_token = penalty - ratio * tokens.advantages
    loss = weighted(per_token, importance_weights, completion_mask, weights)
    metrics = ratio_metrics(tokens, ratio, completion_mask)
    return loss, metrics | {"selected": masked_mean(selected.float(), completion_mask)}


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))


def _count(mask: Tensor, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1]")
    return max(int(fraction * int(mask.sum())), 1)
