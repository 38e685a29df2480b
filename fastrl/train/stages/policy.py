"""Stages that optimise a reward on the policy's own samples."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fastrl.choices import KLEstimator, MismatchKind
from fastrl.train.stages.base import Optimizer, Rewarded, ScorerKind, belongs


class PolicyGradient(Rewarded):
    """Clipped policy gradients; see `fastrl.losses.policy_loss` for the coefficients."""

    updates_per_batch: int = Field(
        1, ge=1, description="optimizer updates on each batch of rollouts"
    )
    loss: Literal["clip", "gspo", "cispo", "sapo", "gmpo", "clip_cov", "kl_cov"] = "clip"
    ratio_level: Literal["token", "sequence", "sequence_token", "sequence_sum"] = "token"
    eps_low: float = Field(0.2, ge=0, le=1)
    eps_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    max_ratio: float = Field(5.0, gt=0, description="CISPO's bound of the importance ratio")
    tau_pos: float = Field(1.0, gt=0, description="SAPO's temperature where the advantage is > 0")
    tau_neg: float = Field(1.05, gt=0, description="and where it is below")
    cov_fraction: float = Field(2e-4, gt=0, lt=1, description="tokens that clip_cov, kl_cov select")
    kl_cov_coef: float = Field(1.0, gt=0)
    kl_coef: float = Field(0.0, ge=0)
    kl_estimator: KLEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: float = Field(0.0, ge=0)
    mismatch: MismatchKind | None = Field(
        None, description="correction of sampler and trainer that disagree"
    )
    mismatch_low: float | None = Field(None, ge=0)
    mismatch_high: float | None = Field(None, gt=0)

    @property
    def reference(self) -> bool:
        return self.kl_coef > 0

    @model_validator(mode="after")
    def _effective(self):
        for key, losses in ONLY_WITH.items():
            belongs(self, key, "loss", losses)
        if self.mismatch is None and (self.mismatch_low, self.mismatch_high) != (None, None):
            raise ValueError("mismatch_low and mismatch_high need mismatch")
        if self.kl_in == "reward" and self.kl_coef and self.kl_estimator != "k1":
            raise ValueError(f"kl_in=reward needs kl_estimator=k1, got {self.kl_estimator!r}")
        return self


# Settings of one policy loss alone.
ONLY_WITH = {
    "ratio_level": ("clip",),
    "dual_clip": ("clip",),
    "eps_low": ("clip", "gspo", "gmpo", "clip_cov"),
    "eps_high": ("clip", "gspo", "gmpo", "clip_cov"),
    "max_ratio": ("cispo",),
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
    "cov_fraction": ("clip_cov", "kl_cov"),
    "kl_cov_coef": ("kl_cov",),
}


class GRPO(PolicyGradient):
    """Policy gradients whose baseline comes from other completions, not from a critic."""

    algorithm: Literal[
        "grpo",
        "dapo",
        "dr_grpo",
        "rloo",
        "reinforce++",
        "reinforce++_baseline",
        "remax",
        "opo",
        "maxrl",
        "gspo",
        "cispo",
        "sapo",
        "gmpo",
        "clip_cov",
        "kl_cov",
    ] = "grpo"
    advantage: Literal[
        "grpo", "rloo", "reinforce++", "reinforce++_baseline", "remax", "opo", "maxrl"
    ] = "grpo"
    scale_advantages: bool = True
    dynamic_sampling: int = Field(
        1, ge=1, description="batches sampled until enough groups have rewards that differ (DAPO)"
    )

    @model_validator(mode="after")
    def _group(self):
        alone = ("reinforce++", "remax")
        if self.group_size < 2 and self.advantage not in alone:
            raise ValueError(
                f"group_size={self.group_size} must be at least 2 for "
                f"advantage={self.advantage!r}, which compares completions of a prompt"
            )
        return self


class PPO(PolicyGradient):
    """Policy gradients with a critic; see `fastrl.losses.gae_advantages`, `value_loss`."""

    algorithm: Literal["ppo"] = "ppo"
    group_size: int = Field(1, ge=1)
    prompts_per_step: int = Field(128, ge=1)
    updates_per_batch: int = Field(2, ge=1)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    kl_in: Literal["loss", "reward"] = "reward"
    kl_estimator: KLEstimator = "k1"
    value_clip: float | None = Field(0.2, gt=0)
    normalize_advantages: bool = True
    critic: Literal["separate", "head"] = Field(
        "separate", description="a model of its own, or a head on the policy's hidden states"
    )
    value_coef: float = Field(0.1, gt=0, description="of the value loss, with critic=head")
    critic_optimizer: Optimizer = Field(default_factory=Optimizer.model_construct)
    critic_warmup: int = Field(0, ge=0, description="steps before the policy begins to learn")

    @model_validator(mode="after")
    def _critic(self):
        belongs(self, "value_coef", "critic", ("head",))
        return self

    @property
    def scorers(self) -> dict[str, int]:
        return {"critic": 1}

    @property
    def scorer_kind(self) -> ScorerKind:
        return self.critic


class RAFT(Rewarded):
    """Likelihood of the best of each group of samples; source: 2304.06767."""

    algorithm: Literal["raft"] = "raft"
    headline: ClassVar[tuple[str, ...]] = ("nll", "reward", "best_reward", "completion_length")
