"""Our losses, with the options that docs/conformance.md names, beside verl's formulas."""

import torch
import verl_reference as theirs
from conformance_data import VERL, Case, Rollouts, case

from fastrl import losses


def _policy(name: str, reduction: str, ours, want) -> None:
    def run(seed):
        b = Rollouts.random(seed)
        return ours(b, b.weights(reduction))[0], want(*b.five), [b.logprobs]

    VERL[name] = run


for _mode, _reduction in (
    ("token-mean", "dapo"),
    ("seq-mean-token-mean", "grpo"),
    ("seq-mean-token-sum", "sequence_sum"),
):
    _policy(
        f"policy_loss, dual_clip=3, log_ratio_clamp=20, {_reduction}",
        _reduction,
        lambda b, w: losses.policy_loss(
            *b.five, w, eps_high=0.28, dual_clip=3.0, log_ratio_clamp=20.0
        ),
        lambda *five, mode=_mode: theirs.vanilla(*five, low=0.2, high=0.28, c=3.0, mode=mode),
    )
_policy(
    "gspo_loss, token_level=True",
    "grpo",
    lambda b, w: losses.gspo_loss(*b.five, w, eps_low=0.05, eps_high=0.06, token_level=True),
    lambda *five: theirs.gspo(*five, low=0.05, high=0.06),
)
_policy(
    "cispo_loss, min_ratio=1-low, max_ratio=1+high",
    "dapo",
    lambda b, w: losses.cispo_loss(*b.five, w, min_ratio=0.8, max_ratio=1.2),
    lambda *five: theirs.cispo(*five, low=0.2, high=0.2),
)
_policy(
    "sapo_loss",
    "grpo",
    lambda b, w: losses.sapo_loss(*b.five, w),
    lambda *five: theirs.sapo(*five, tau_pos=1.0, tau_neg=1.05),
)
_policy(
    "gmpo_loss",
    "grpo",
    lambda b, w: losses.gmpo_loss(*b.five, w, eps_low=0.2, eps_high=0.3),
    lambda *five: theirs.geo_mean(*five, low=0.2, high=0.3),
)
_policy(
    "clip_cov_loss",
    "dapo",
    lambda b, w: losses.clip_cov_loss(
        *b.five,
        w,
        selected=losses.clip_cov_mask(*b.five, fraction=1.0, low=0.1, high=0.8),
    ),
    lambda *five: theirs.clip_cov(*five, low=0.2, high=0.2, cov_low=0.1, cov_high=0.8),
)
_policy(
    "kl_cov_loss",
    "dapo",
    lambda b, w: losses.kl_cov_loss(
        *b.five,
        w,
        selected=losses.kl_cov_mask(b.logprobs, b.advantages, b.mask, fraction=0.2),
        kl_coef=0.7,
    ),
    lambda *five: theirs.kl_cov(*five, ratio=0.2, coef=0.7),
)


@case("value_loss", VERL)
def _(seed):
    b = Rollouts.random(seed)
    ours, _ = losses.value_loss(b.logprobs, b.old, b.ref, b.mask, b.weights("dapo"))
    return ours, theirs.value(b.logprobs, b.old, b.ref, b.mask, clip=0.2), [b.logprobs]


@case("kl_estimate, log_ratio_clamp=20", VERL)
def _(seed):
    b = Rollouts.random(seed)
    ours = losses.kl_estimate(b.logprobs, b.ref, log_ratio_clamp=20.0)
    return ours.sum(), theirs.low_var_kl(b.logprobs, b.ref).sum(), [b.logprobs]


def _advantage(name: str, run: Case) -> None:
    VERL[name] = lambda seed: (*run(Rollouts.random(seed)), [])


def _tool_mask(b: Rollouts) -> torch.Tensor:
    """Completions with a tool's tokens inside."""
    mask = b.mask.clone()
    mask[0, 2:4] = mask[3, 1] = False
    return mask


_advantage(
    "grpo_advantages, eps=1e-6",
    lambda b: (
        losses.grpo_advantages(b.advantages, 3, eps=1e-6),
        theirs.grpo(b.advantages, 3),
    ),
)
_advantage(
    "rloo_advantages",
    lambda b: (losses.rloo_advantages(b.advantages, 3), theirs.rloo(b.advantages, 3)),
)
_advantage(
    "opo_advantages",
    lambda b: (
        losses.opo_advantages(b.advantages, b.mask.sum(-1), 3),
        theirs.opo(b.advantages, b.mask.sum(-1), 3),
    ),
)
for _which in (0, 1):
    _advantage(
        f"gae_advantages, {('advantages', 'returns')[_which]}, tool tokens inside",
        lambda b, i=_which: (
            losses.gae_advantages(b.old, b.ref, _tool_mask(b), gamma=0.97)[i],
            theirs.gae(b.old, b.ref, _tool_mask(b), gamma=0.97, lam=0.95)[i],
        ),
    )
_advantage(
    "reinforce_plus_plus_advantages",
    lambda b: (
        losses.reinforce_plus_plus_advantages(b.old, b.mask, gamma=0.97),
        theirs.reinforce_plus_plus(torch.where(b.mask, b.old, 0.0), b.mask, gamma=0.97),
    ),
)
_advantage(
    "reinforce_plus_plus_advantages, baseline",
    lambda b: (
        losses.reinforce_plus_plus_advantages(b.old, b.mask, group_size=3),
        theirs.reinforce_plus_plus_baseline(torch.where(b.mask, b.old, 0.0), b.mask, 3),
    ),
)
