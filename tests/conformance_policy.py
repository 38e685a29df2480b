"""Policy losses, advantages and mismatch weights beside TRL's code."""

import torch
import trl_reference as theirs
from conformance_data import CASES, Case, Rollouts, case

from fastrl import losses


def _policy(reduction, ours, loss_type, **settings) -> Case:
    def run(seed):
        b = Rollouts.random(seed)
        mine = ours(b, b.weights(reduction))
        mine = mine[0] if isinstance(mine, tuple) else mine
        return mine, theirs.grpo(b, loss_type, **settings), [b.logprobs]

    return run


for _reduction in ("grpo", "dapo", "bnpo", "dr_grpo"):
    CASES[f"policy_loss, {_reduction}, KL k3"] = _policy(
        _reduction,
        lambda b, w: losses.policy_loss(
            *b.five, w, eps_high=0.28, ref_logprobs=b.ref, kl_coef=0.05
        ),
        _reduction,
        epsilon_high=0.28,
        beta=0.05,
    )
CASES["policy_loss, sequence_sum (TRL luspo)"] = _policy(
    "sequence_sum",
    lambda b, w: losses.policy_loss(*b.five, w, ratio_level="sequence"),
    "luspo",
    importance_sampling_level="sequence",
)
CASES["kl_loss, times rho"] = _policy(
    "dapo",
    lambda b, w: (
        losses.policy_loss(*b.five, w)[0]
        + losses.kl_loss(b.logprobs, b.ref, b.mask, w, coef=0.1, old_logprobs=b.old)[0]
    ),
    "dapo",
    beta=0.1,
    use_bias_correction_kl=True,
)
CASES["policy_loss, dual_clip (TRL delta)"] = _policy(
    "dapo",
    lambda b, w: losses.policy_loss(*b.five, w, dual_clip=1.3),
    "dapo",
    delta=1.3,
)
CASES["gspo_loss"] = _policy(
    "grpo",
    lambda b, w: losses.gspo_loss(*b.five, w, eps_low=0.05, eps_high=0.06),
    "grpo",
    importance_sampling_level="sequence",
    epsilon_low=0.05,
    epsilon_high=0.06,
)
CASES["cispo_loss"] = _policy(
    "dapo",
    lambda b, w: losses.cispo_loss(*b.five, w, max_ratio=1.2),
    "cispo",
    epsilon_high=1.2,
)
CASES["sapo_loss"] = _policy("grpo", lambda b, w: losses.sapo_loss(*b.five, w), "sapo")
CASES["policy_loss with off_policy_mask"] = _policy(
    "dapo",
    lambda b, w: losses.policy_loss(
        *b.five,
        w,
        importance_weights=losses.off_policy_mask(b.logprobs, b.sampler, b.advantages, b.mask, 0.0),
    ),
    "dapo",
    off_policy_mask_threshold=0.0,
)
CASES["policy_loss with high_entropy_mask"] = _policy(
    "dapo",
    lambda b, w: losses.policy_loss(
        *b.five, w, importance_weights=losses.high_entropy_mask(b.entropy, b.mask, 0.6).float()
    ),
    "dapo",
    top_entropy_quantile=0.4,
)


@case("policy_loss with mismatch_weights")
def _(seed):
    b = Rollouts.random(seed)
    factor = losses.mismatch_weights(b.old, b.sampler, b.mask, "token_truncate", high=1.1)
    ours, _ = losses.policy_loss(*b.five, b.weights("dapo"), importance_weights=factor)
    ratio = theirs.grpo_advantages(
        torch.zeros(6), 2, "group", (b.old, b.sampler, b.mask, "token_truncate", None, 1.1)
    )
    return ours, theirs.grpo(b, "dapo", importance_weights=ratio), [b.logprobs]


@case("policy_loss, sequence_sum ratio (TRL RLOO)")
def _(seed):
    b = Rollouts.random(seed)
    ours, _ = losses.policy_loss(*b.five, b.weights("grpo"), ratio_level="sequence_sum")
    return ours, theirs.rloo(b), [b.logprobs]


@case("gmpo_loss")
def _(seed):
    b = Rollouts.random(seed)
    ours, _ = losses.gmpo_loss(*b.five, b.weights("grpo"), eps_low=0.2, eps_high=0.3)
    return ours, theirs.gmpo(b, epsilon_low=0.2, epsilon_high=0.3), [b.logprobs]


@case("entropy_loss")
def _(seed):
    b = Rollouts.random(seed)
    w = b.weights("dapo")
    ours = (
        losses.policy_loss(*b.five, w)[0] + losses.entropy_loss(b.entropy, b.mask, w, coef=0.01)[0]
    )
    return ours, theirs.grpo(b, "dapo", entropy_coef=0.01), [b.logprobs, b.entropy]


for _scale, _theirs in ((True, "group"), (False, "none"), ("batch", "batch")):

    @case(f"grpo_advantages, scale={_scale}")
    def _(seed, scale=_scale, name=_theirs):
        rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        ours = losses.grpo_advantages(rewards, 4, scale=scale)
        return ours, theirs.grpo_advantages(rewards, 4, name), []


@case("rloo_advantages")
def _(seed):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    return losses.rloo_advantages(rewards, 4), theirs.rloo_advantages(rewards, 4), []


for _kind in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):

    @case(f"mismatch_weights, {_kind}")
    def _(seed, kind=_kind):
        b = Rollouts.random(seed)
        ours = losses.mismatch_weights(b.old, b.sampler, b.mask, kind, low=0.6, high=1.3)
        ratio = theirs.grpo_advantages(
            torch.zeros(6), 2, "group", (b.old, b.sampler, b.mask, kind, 0.6, 1.3)
        )
        return ours, torch.where(b.mask, ratio.expand(b.mask.shape), 0.0), []
