"""Sampler and trainer disagree: how much, and what the loss does about it."""

import math
from typing import get_args

import torch
from torch import Tensor

from fastrl.choices import MismatchKind
from fastrl.losses.kl import LOG_RATIO_CLAMP
from fastrl.losses.reduction import check_tokens, masked_mean


@torch.no_grad()
def mismatch_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    completion_mask: Tensor,
    kind: MismatchKind = "sequence_mask",
    *,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Importance weights `w = pi_old / pi_sampler`, bounded, for `importance_weights` of a loss.

    token_* take the token's w, sequence_* that of the whole completion (product over tokens),
    geometric_mask its geometric mean over tokens. *_truncate clamps w to [low, high] (TIS);
    *_mask sets w outside to 0 (MIS); icepop is token_mask with the band 0.5 to 5. Elsewhere high is
    3 and low absent, as in TRL; pass `math.inf` for no upper bound. A sampler log-prob that is NaN
    counts as equal to the trainer's.

    All tensors `[B, T]`, completion_mask bool. Returns `[B, T]` without gradient, 0 where masked.
    Raises `ValueError` for an unknown kind and an empty band. Sources: TIS and MIS, Yao et al. and
    Liu et al., "Your efficient RL framework secretly brings you off-policy RL training" and "When
    speed kills stability" (2025); IcePop, Ring-1T (2510.18855).
    """
    if kind not in get_args(MismatchKind):
        raise ValueError(
            f"kind={kind!r} is unknown; use one of {', '.join(get_args(MismatchKind))}"
        )
    check_tokens(completion_mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    default_low, default_high = (0.5, 5.0) if kind == "icepop" else (0.0, 3.0)
    low = default_low if low is None else low
    high = default_high if high is None else high
    if not 0 <= low < high:
        raise ValueError(f"need 0 <= low < high, got low={low} and high={high}")
    gap = torch.where(completion_mask, old_logprobs - sampler_logprobs, 0.0).nan_to_num(nan=0.0)
    if kind.startswith("sequence"):
        gap = gap.sum(-1, keepdim=True)
    elif kind == "geometric_mask":
        gap = gap.sum(-1, keepdim=True) / completion_mask.sum(-1, keepdim=True).clamp(min=1)
    w = gap.clamp(max=LOG_RATIO_CLAMP).exp().expand(completion_mask.shape)
    if kind.endswith("truncate"):
        w = w.clamp(low, high)
    else:
        w = torch.where((w < low) | (w > high), 0.0, w)
    return torch.where(completion_mask, w, 0.0)


@torch.no_grad()
def mismatch_metrics(
    old_logprobs: Tensor, sampler_logprobs: Tensor, completion_mask: Tensor
) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, over the masked tokens.

    With `d = old_logprobs - sampler_logprobs`, in nats: `mismatch_mean` of |d|, `mismatch_k3` the
    k3 estimate of KL(sampler || trainer), `mismatch_max` the largest |d|. 0 without tokens.
    """
    check_tokens(completion_mask, old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    gap = torch.where(completion_mask, old_logprobs - sampler_logprobs, 0.0)
    return {
        "mismatch_mean": masked_mean(gap.abs(), completion_mask),
        "mismatch_k3": masked_mean(torch.expm1(gap) - gap, completion_mask),
        "mismatch_max": gap.abs().max() if gap.numel() else gap.sum(),
    }


@torch.no_grad()
def off_policy_mask(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    threshold: float,
) -> Tensor:
    """1 for rows to learn from, 0 for bad rows that the policy has left behind; for
    `importance_weights`.

    A row is dropped where its advantage is negative and the mean over its tokens of
    `sampler_logprobs - logprobs` exceeds the threshold (nats). advantages `[B]`, the others
    `[B, T]`; returns `[B, 1]` float32. Source: DeepSeek-V3.2, equation 9.
    """
    check_tokens(completion_mask, logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    if advantages.shape != completion_mask.shape[:1]:
        raise ValueError(
            f"advantages must be [B] with B={completion_mask.shape[0]}, got "
            f"{tuple(advantages.shape)}"
        )
    gap = torch.where(completion_mask, sampler_logprobs - logprobs, 0.0).nan_to_num(nan=0.0)
    mean = gap.sum(-1) / completion_mask.sum(-1).clamp(min=1)
    return ((advantages >= 0) | (mean <= threshold)).float().unsqueeze(-1)


@torch.no_grad()
def high_entropy_mask(entropy: Tensor, completion_mask: Tensor, quantile: float) -> Tensor:
    """The tokens whose entropy is at or above a quantile of the batch, as bool `[B, T]`.

    Its float is a factor for `importance_weights`. Give the whole step, before micro-batches.
    Source: 2506.01939 (quantile 0.8).
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile} must lie in [0, 1]")
    check_tokens(completion_mask, entropy=entropy)
    kept = entropy[completion_mask].double()
    if kept.numel() == 0:
        return completion_mask
    ordered = kept.sort().values  # torch.quantile refuses more than 2**24 entries
    place = quantile * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    threshold = below + (above - below) * (place - math.floor(place))
    return completion_mask & (entropy >= threshold)
