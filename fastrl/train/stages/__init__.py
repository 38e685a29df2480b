"""The stages of a run: one class of settings for each family of algorithms."""

from typing import Any

from fastrl.train.stages.base import (
    Ensemble,
    Optimizer,
    Rewarded,
    Sampled,
    Scheme,
    ScorerKind,
    Stage,
)
from fastrl.train.stages.imitation import SFT, SPIN, Adversarial, AfD, Distillation, IQLearn
from fastrl.train.stages.policy import GRPO, PPO, RAFT, PolicyGradient
from fastrl.train.stages.preference import Preference, Reward

# Settings that an algorithm's name stands for; what the recipe gives comes first.
PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"eps_high": 0.28, "dynamic_sampling": 4},
    "dr_grpo": {"scale_advantages": False, "reduction": "dr_grpo"},
    "rloo": {"advantage": "rloo", "ratio_level": "sequence_sum", "reduction": "sequence_sum"},
    "reinforce++": {"advantage": "reinforce++", "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce++_baseline": {"advantage": "reinforce++_baseline"},
    "remax": {"advantage": "remax", "group_size": 1},
    "opo": {"advantage": "opo"},
    "maxrl": {"advantage": "maxrl"},
    "gspo": {"loss": "gspo", "eps_low": 3e-4, "eps_high": 4e-4, "reduction": "grpo"},
    "cispo": {"loss": "cispo"},
    "sapo": {"loss": "sapo"},
    "gmpo": {"loss": "gmpo", "eps_low": 0.4, "eps_high": 0.4, "reduction": "grpo"},
    "clip_cov": {"loss": "clip_cov"},
    "kl_cov": {"loss": "kl_cov"},
    "airl": {"reward": "airl"},
    "fairl": {"reward": "forward_kl"},
    "simpo": {"beta": 2.0},
    "exo": {"label_smoothing": 1e-3},
}
FAMILIES: tuple[type[Stage], ...] = (
    SFT,
    IQLearn,
    Reward,
    AfD,
    GRPO,
    PPO,
    Adversarial,
    Preference,
    SPIN,
    Distillation,
    RAFT,
)
ALGORITHMS: dict[str, type[Stage]] = {
    name: family
    for family in FAMILIES
    for name in family.model_fields["algorithm"].annotation.__args__  # type: ignore[union-attr]
}

__all__ = [
    "ALGORITHMS",
    "FAMILIES",
    "GRPO",
    "PPO",
    "PRESETS",
    "RAFT",
    "SFT",
    "SPIN",
    "Adversarial",
    "AfD",
    "Distillation",
    "Ensemble",
    "IQLearn",
    "Optimizer",
    "PolicyGradient",
    "Preference",
    "Reward",
    "Rewarded",
    "Sampled",
    "Scheme",
    "ScorerKind",
    "Stage",
]
