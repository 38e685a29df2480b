"""The stages of a run: one class of settings for each family of algorithms."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastrl.losses.imitation import ImitationReward
from fastrl.losses.kl import KLEstimator
from fastrl.losses.mismatch import MismatchKind
from fastrl.losses.reduction import Reduction
from fastrl.train.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW with gradient clipping, linear warm-up and a decay to `final_lr_fraction` of `lr`."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_fraction: float = Field(0.1, ge=0, le=1)


class Stage(Section):
    """What all algorithms share. A stage is one algorithm run for a number of optimizer steps."""

    algorithm: str
    steps: int = Field(ge=1)
    optimizer: Optimizer = Field(default_factory=Optimizer.model_construct)
    micro_batch_size: int = Field(
        64,
        ge=1,
        description="completions per forward and backward pass; with model.shared_prefix a group "
        "is split only where it is larger",
    )
    eval_every: int = Field(50, ge=1)

    demonstrations: ClassVar[bool] = False  # it reads the demonstrations' completions
    rankings: ClassVar[bool] = False  # it reads completions that are ranked: chosen, rejected
    trains_policy: ClassVar[bool] = True

    @property
    def scorers(self) -> dict[str, int]:
        """The scoring models that it trains, and their numbers of heads."""
        return {}

    @property
    def value_head(self) -> bool:
        """Whether its scoring model is a head on the policy."""
        return False

    @property
    def crowd(self) -> bool:
        """Whether it reads the completions of all training rows."""
        return False

    @property
    def reference(self) -> bool:
        """Whether it compares with the policy as it was when the stage began."""
        return False

    @property
    def needs_earlier(self) -> bool:
        """Whether it needs the policy as it was when the stage `earlier`, or the first, began."""
        return False

    @property
    def earlier(self) -> str | None:
        return None

    @property
    def reward_from(self) -> str | None:
        """Where its rewards come from: `functions`, or a scoring model; None needs none."""
        return None


def _belongs(stage: Stage, key: str, choice: str, values: tuple[str, ...]) -> None:
    """Raise `ValueError` for a setting that the stage's choice would ignore."""
    given, chosen = getattr(stage, key), getattr(stage, choice)
    if given != type(stage).model_fields[key].default and chosen not in values:
        raise ValueError(
            f"{key}={given!r} has no effect with {choice}={chosen!r}; it belongs to "
            f"{', '.join(values)}"
        )


class SFT(Stage):
    """Likelihood of demonstrations; see `fastrl.losses.sft_loss`."""

    algorithm: Literal["sft"] = "sft"
    batch_size: int = Field(64, ge=1, description="demonstrations per optimizer step")
    data: Literal["demonstrations", "crowd"] = Field(
        "demonstrations",
        description="or all training rows, where data.demonstrations sets some apart",
    )
    reduction: Reduction = "dapo"
    demonstrations: ClassVar[bool] = True

    @property
    def crowd(self) -> bool:
        return self.data == "crowd"


class IQLearn(SFT):
    """Inverse soft Q-learning on demonstrations alone; see `fastrl.losses.iqlearn_loss`."""

    algorithm: Literal["iqlearn"] = "iqlearn"  # type: ignore[assignment]
    alpha: float = Field(1.0, gt=0, description="larger is nearer to sft")
    gamma: float = Field(1.0, gt=0, le=1)


class Reward(Stage):
    """A reward model from ranked completions; see `fastrl.losses.bradley_terry_loss`."""

    algorithm: Literal["reward"] = "reward"
    batch_size: int = Field(32, ge=1, description="rankings per optimizer step")
    loss: Literal["bradley_terry", "classification", "plackett_luce"] = "bradley_terry"
    centering: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    margin: str | None = Field(None, description="a column of margins, for bradley_terry")
    heads: int = Field(1, ge=1, description="more are an ensemble on one backbone")
    network: str = Field("reward", pattern=r"^[a-z][a-z0-9_]*$", description="its name in the run")
    rankings: ClassVar[bool] = True
    trains_policy: ClassVar[bool] = False

    @model_validator(mode="after")
    def _effective(self):
        for key in ("centering", "label_smoothing", "margin"):
            _belongs(self, key, "loss", ("bradley_terry",))
        return self

    @property
    def scorers(self) -> dict[str, int]:
        return {self.network: self.heads}


class Sampled(Stage):
    """What the algorithms that learn from the policy's own samples share."""

    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)


class AfD(Sampled):
    """A reward model that tells demonstrations from samples once; source: 2405.15624."""

    algorithm: Literal["afd"] = "afd"
    data: Literal["demos_vs_initial", "demos_vs_sft", "sft_vs_initial"] = "sft_vs_initial"
    initial: str | None = Field(
        None, description="the stage before which the policy was initial; default: the first"
    )
    heads: int = Field(1, ge=1)
    network: str = Field("reward", pattern=r"^[a-z][a-z0-9_]*$")
    demonstrations: ClassVar[bool] = True
    trains_policy: ClassVar[bool] = False

    @property
    def scorers(self) -> dict[str, int]:
        return {self.network: self.heads}

    @property
    def needs_earlier(self) -> bool:
        return self.data != "demos_vs_sft"

    @property
    def earlier(self) -> str | None:
        return self.initial


class Rewarded(Sampled):
    """What the algorithms whose samples are rewarded share."""

    reward: str = Field("functions", description="functions, or a scoring model trained before")
    reduction: Reduction = "dapo"
    overlong_buffer: int = Field(
        0, ge=0, description="tokens before the limit over which a penalty of 0 to -1 grows (DAPO)"
    )

    @property
    def reward_from(self) -> str | None:
        return self.reward


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
            _belongs(self, key, "loss", losses)
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
        _belongs(self, "value_coef", "critic", ("head",))
        return self

    @property
    def scorers(self) -> dict[str, int]:
        return {"critic": 1}

    @property
    def value_head(self) -> bool:
        return self.critic == "head"


class Adversarial(GRPO):
    """Policy against discriminator: GAIL, AIRL or FAIRL by `fastrl.losses.imitation_rewards`."""

    algorithm: Literal["gail", "airl", "fairl"] = "gail"  # type: ignore[assignment]
    reward: ImitationReward = "gail"
    level: Literal["sequence", "token"] = "sequence"
    prompts: Literal["demonstrations", "all"] = Field(
        "demonstrations",
        description="samples answer the demonstrations' prompts, so that the discriminator cannot "
        "tell them by their prompts; or all prompts",
    )
    demonstrations_per_step: int = Field(64, ge=1, description="with prompts=all")
    discriminator_updates: int = Field(1, ge=1)
    discriminator_optimizer: Optimizer = Field(default_factory=Optimizer.model_construct)
    max_logit: float = Field(20.0, gt=0)
    demonstrations: ClassVar[bool] = True

    @property
    def scorers(self) -> dict[str, int]:
        return {"discriminator": 1}

    @property
    def reward_from(self) -> str | None:
        return None

    @model_validator(mode="after")
    def _level(self):
        _belongs(self, "demonstrations_per_step", "prompts", ("all",))
        if self.level == "token" and self.advantage not in ("grpo", "reinforce++"):
            raise ValueError(
                f"level=token has rewards for tokens, which advantage={self.advantage!r} has not "
                "a rule for; use grpo or reinforce++"
            )
        return self


class Preference(Stage):
    """The DPO family, on ranked data or on the policy's own samples."""

    algorithm: Literal["dpo", "ipo", "slic", "robust_dpo", "exo", "rpo", "kto", "simpo", "orpo"] = (
        "dpo"
    )
    batch_size: int = Field(32, ge=1, description="pairs per optimizer step")
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    gamma: float = Field(1.0, ge=0, description="SimPO's target margin")
    nll_coef: float = Field(1.0, ge=0, description="weight of the chosen's likelihood: rpo, orpo")
    pairs: Literal["data", "samples"] = Field(
        "data", description="samples: best against worst of group_size own samples, by reward"
    )
    group_size: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    reference_every: int | None = Field(
        None, ge=1, description="steps after which the policy becomes its own reference"
    )

    @model_validator(mode="after")
    def _effective(self):
        smoothed = ("dpo", "robust_dpo", "exo", "simpo")
        for key, algorithms in (
            ("gamma", ("simpo",)),
            ("nll_coef", ("rpo", "orpo")),
            ("label_smoothing", smoothed),
        ):
            _belongs(self, key, "algorithm", algorithms)
        for key in ("group_size", "temperature"):
            _belongs(self, key, "pairs", ("samples",))
        if self.reference_every is not None and not self.reference:
            raise ValueError(f"reference_every has no effect with algorithm={self.algorithm!r}")
        return self

    @property
    def rankings(self) -> bool:  # type: ignore[override]
        return self.pairs == "data"

    @property
    def reference(self) -> bool:
        return self.algorithm not in ("simpo", "orpo")

    @property
    def reward_from(self) -> str | None:
        return "functions" if self.pairs == "samples" else None


class SPIN(Stage):
    """Demonstrations against the policy's own samples; see `fastrl.losses.spin_loss`."""

    algorithm: Literal["spin"] = "spin"
    batch_size: int = Field(32, ge=1, description="demonstrations per optimizer step")
    lam: float = Field(0.1, gt=0)
    temperature: float = Field(1.0, gt=0)
    reference_every: int = Field(
        50, ge=1, description="steps of an iteration, after which the policy plays a newer self"
    )
    demonstrations: ClassVar[bool] = True

    @property
    def reference(self) -> bool:
        return True


class Distillation(Sampled):
    """A teacher's distribution on the policy's own samples; `fastrl.losses.distillation_loss`."""

    algorithm: Literal["distillation"] = "distillation"
    beta: float = Field(1.0, ge=0, le=1, description="0 forward KL, 1 reverse KL, else between")
    teacher: str | None = Field(
        None,
        description="a model's directory or hub id; default: the policy as the stage before left "
        "it, which the initial policy then learns from",
    )
    group_size: int = Field(1, ge=1)
    reduction: Reduction = "dapo"

    @property
    def reference(self) -> bool:
        return self.teacher is None


class RAFT(Rewarded):
    """Likelihood of the best of each group of samples; source: 2304.06767."""

    algorithm: Literal["raft"] = "raft"


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
