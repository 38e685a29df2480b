"""Losses that learn from demonstrations.

Adversarial imitation alternates `discriminator_loss` with policy optimisation on
`imitation_rewards`. AfD (2405.15624) fits the discriminator once, on one of three data modes
(demonstrations against samples of the initial policy, or of the SFT policy; SFT samples against
initial samples), and then uses its logit as a reward.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.choices import ImitationReward
from fastrl.losses.preference import dpo_loss
from fastrl.losses.reduction import check_tokens, masked_mean, weighted_rows


def sft_loss(
    logprobs: Tensor, completion_mask: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of demonstrations: `sum(weights * -logprobs)`.

    logprobs, completion_mask (bool) and weights (see `token_weights`) are `[B, T]`. Returns the
    scalar loss and, as means over the masked tokens, the metric `nll`, in nats.
    """
    nll = torch.where(completion_mask, -logprobs, 0.0)
    return (weights * nll).sum(), {"nll": masked_mean(nll.detach(), completion_mask)}


def discriminator_loss(
    demo_logits: Tensor,
    policy_logits: Tensor,
    demo_weights: Tensor | None = None,
    policy_weights: Tensor | None = None,
    *,
    demo_mask: Tensor | None = None,
    policy_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of a discriminator: demonstrations 1, samples of the policy 0.

    `(sum w softplus(-f(demo)) + sum w softplus(f(policy))) / 2`, each side with its own weights,
    so the optimal logit is `log d_demo - log d_policy` whatever the numbers of each. Sequence
    level: logits `[B]`, weights `[B]` or None for the mean. Token level: logits `[B, T]` with bool
    masks and `token_weights`; the two sides may differ in shape.

    Metrics `demo_accuracy`, `policy_accuracy`, `demo_logit`, `policy_logit`. Raises `ValueError`
    for token logits without mask and weights. Sources: 1606.03476, 2405.15624.
    """
    demo, demo_metrics = _side("demo", demo_logits, demo_weights, demo_mask, 1.0)
    policy, policy_metrics = _side("policy", policy_logits, policy_weights, policy_mask, -1.0)
    return (demo + policy) / 2, demo_metrics | policy_metrics


@torch.no_grad()
def imitation_rewards(
    logits: Tensor, kind: ImitationReward = "airl", *, max_logit: float = 20.0
) -> Tensor:
    """The policy's reward from a discriminator's logit f, and the divergence that it minimises.

    airl `f` (reverse KL, 1710.11248); gail `softplus(f)` = -log(1 - D) and gail_saturating
    `-softplus(-f)` = log D (Jensen-Shannon, 1606.03476); forward_kl `exp(f)` (f-MAX); fairl
    `-f exp(f)` (both 1911.02256). With the optimal f the policy gradient of airl, gail and
    forward_kl is exactly that of their divergence. fairl's is not: it writes KL(demo || policy) as
    an expectation under the policy and then holds f fixed, which drops the part of the gradient
    that matters. Its slope at f = 0 is -1, so the demonstrations repel it; prefer forward_kl.

    f is clamped to `+-max_logit` first. logits of any shape, which is kept; no gradient.
    """
    if not max_logit > 0:
        raise ValueError(f"max_logit={max_logit} must be positive")
    f = logits.clamp(-max_logit, max_logit)
    if kind == "airl":
        return f
    if kind == "gail":
        return F.softplus(f)
    if kind == "gail_saturating":
        return F.logsigmoid(f)
    if kind == "forward_kl":
        return f.exp()
    if kind == "fairl":
        return -f * f.exp()
    raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(get_args(ImitationReward))}")


def spin_loss(
    demo_logprobs: Tensor,
    sample_logprobs: Tensor,
    prev_demo_logprobs: Tensor,
    prev_sample_logprobs: Tensor,
    *,
    lam: float = 0.1,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SPIN: DPO with the demonstration as chosen and a sample of the previous policy as rejected.

    `-log sigmoid(lam ([log pi/pi_prev](demo) - [log pi/pi_prev](sample)))`; iterated, pi_prev being
    the policy that the last round ended with. All `[B]`, sums over tokens. Metrics as `dpo_loss`'s.
    Source: 2401.01335.
    """
    if not lam > 0:
        raise ValueError(f"lam={lam} must be positive")
    return dpo_loss(
        demo_logprobs,
        sample_logprobs,
        prev_demo_logprobs,
        prev_sample_logprobs,
        beta=lam,
        weights=weights,
    )


def iqlearn_loss(
    logprobs: Tensor,
    lse: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """IQ-Learn for language: `-log pi(a|s) + (Q(s, a) - gamma V(s'))^2 / (4 alpha)`.

    Q is the logit, `logprobs + lse`, and V the logsumexp: both from `linear_logprob` at temperature
    1. s' is the next token that the mask keeps; after the last one V is 0, or bootstrap `[B]` for
    completions cut short. `Q - gamma V'` is the implied reward; alpha to infinity is SFT. logprobs,
    lse, completion_mask (bool), weights `[B, T]`. Metrics `nll`, `iq_reward`, `iq_penalty`. Source:
    2409.01369.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must lie in [0, 1]")
    check_tokens(completion_mask, logprobs=logprobs, lse=lse, weights=weights)
    rows, steps = completion_mask.shape
    if bootstrap is not None and bootstrap.shape != (rows,):
        raise ValueError(f"bootstrap must be [B] with B={rows}, got {tuple(bootstrap.shape)}")
    logprobs = torch.where(completion_mask, logprobs, 0.0)
    lse = torch.where(completion_mask, lse, 0.0)
    last = lse.new_zeros(rows) if bootstrap is None else bootstrap.to(lse.dtype)
    # Where the next kept token is; `steps` stands for the end.
    place = torch.arange(steps, device=lse.device).expand(rows, steps)
    place = place.masked_fill(~completion_mask, steps).flip(-1)
    nearest = F.pad(place.cummin(-1).values.flip(-1) if steps else place, (0, 1), value=steps)
    next_value = torch.cat([lse, last.unsqueeze(-1)], -1).gather(-1, nearest[:, 1:])
    reward = torch.where(completion_mask, logprobs + lse - gamma * next_value, 0.0)
    penalty = reward.square() / (4 * alpha)
    metrics = {
        "nll": masked_mean(-logprobs.detach(), completion_mask),
        "iq_reward": masked_mean(reward.detach(), completion_mask),
        "iq_penalty": masked_mean(penalty.detach(), completion_mask),
    }
    return (weights * (penalty - logprobs)).sum(), metrics


def _side(
    name: str, logits: Tensor, weights: Tensor | None, mask: Tensor | None, sign: float
) -> tuple[Tensor, dict[str, Tensor]]:
    if logits.dim() == 1:
        if mask is not None:
            raise ValueError(f"{name}_mask is for token logits, but {name}_logits are [B]")
        kept = torch.ones_like(logits, dtype=torch.bool)
        loss = weighted_rows(F.softplus(-sign * logits), weights)
    else:
        if mask is None or weights is None:
            raise ValueError(f"{name}_logits [B, T] need {name}_mask and {name}_weights")
        check_tokens(mask, **{f"{name}_logits": logits, f"{name}_weights": weights})
        kept, logits = mask, torch.where(mask, logits, 0.0)
        loss = (weights * F.softplus(-sign * logits)).sum()
    return loss, {
        f"{name}_accuracy": masked_mean((sign * logits > 0).float(), kept),
        f"{name}_logit": masked_mean(logits.detach(), kept),
    }
