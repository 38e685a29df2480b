"""Losses and advantages: pure functions on tensors, each with its formula, shapes and paper."""

from fastrl.losses.advantages import (
    gae_advantages,
    grpo_advantages,
    informative_groups,
    maxrl_advantages,
    normalize_advantages,
    opo_advantages,
    overlong_penalty,
    reinforce_plus_plus_advantages,
    remax_advantages,
    rloo_advantages,
)
from fastrl.losses.cov import clip_cov_loss, clip_cov_mask, kl_cov_loss, kl_cov_mask
from fastrl.losses.distillation import (
    distillation_advantages,
    distillation_loss,
    linear_distillation_loss,
)
from fastrl.losses.imitation import (
    discriminator_loss,
    imitation_rewards,
    iqlearn_loss,
    sft_loss,
    spin_loss,
)
from fastrl.losses.kl import entropy_loss, kl_estimate, kl_loss, token_rewards
from fastrl.losses.mismatch import (
    high_entropy_mask,
    mismatch_metrics,
    mismatch_weights,
    off_policy_mask,
)
from fastrl.losses.policy import (
    POLICY_LOSSES,
    cispo_loss,
    gmpo_loss,
    gspo_loss,
    policy_loss,
    reinforce_loss,
    sapo_loss,
)
from fastrl.losses.preference import (
    cpo_loss,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    rpo_loss,
    simpo_loss,
)
from fastrl.losses.reduction import REDUCTIONS, sequence_logprobs, token_weights
from fastrl.losses.reward_model import (
    bradley_terry_loss,
    classification_loss,
    plackett_luce_loss,
)
from fastrl.losses.value import value_loss

__all__ = [
    "POLICY_LOSSES",
    "REDUCTIONS",
    "bradley_terry_loss",
    "cispo_loss",
    "classification_loss",
    "clip_cov_loss",
    "clip_cov_mask",
    "cpo_loss",
    "discriminator_loss",
    "distillation_advantages",
    "distillation_loss",
    "dpo_loss",
    "entropy_loss",
    "gae_advantages",
    "gmpo_loss",
    "grpo_advantages",
    "gspo_loss",
    "high_entropy_mask",
    "imitation_rewards",
    "informative_groups",
    "iqlearn_loss",
    "kl_cov_loss",
    "kl_cov_mask",
    "kl_estimate",
    "kl_loss",
    "kto_loss",
    "kto_reference_point",
    "linear_distillation_loss",
    "maxrl_advantages",
    "mismatch_metrics",
    "mismatch_weights",
    "normalize_advantages",
    "off_policy_mask",
    "opo_advantages",
    "orpo_loss",
    "overlong_penalty",
    "plackett_luce_loss",
    "policy_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "rloo_advantages",
    "rpo_loss",
    "sapo_loss",
    "sequence_logprobs",
    "sft_loss",
    "simpo_loss",
    "spin_loss",
    "token_rewards",
    "token_weights",
    "value_loss",
]
