"""Stages that learn from demonstrations, or from a teacher."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fastrl.choices import ImitationReward, Reduction
from fastrl.train.stages.base import (
    REWARD_MODEL,
    Optimizer,
    Sampled,
    ScorerKind,
    Stage,
    belongs,
)
from fastrl.train.stages.policy import GRPO


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
    headline: ClassVar[tuple[str, ...]] = ("nll",)

    @property
    def crowd(self) -> bool:
        return self.data == "crowd"


class IQLearn(SFT):
    """Inverse soft Q-learning on demonstrations alone; see `fastrl.losses.iqlearn_loss`."""

    algorithm: Literal["iqlearn"] = "iqlearn"  # type: ignore[assignment]
    alpha: float = Field(1.0, gt=0, description="larger is nearer to sft")
    gamma: float = Field(1.0, gt=0, le=1)
    headline: ClassVar[tuple[str, ...]] = ("loss", "nll")


class AfD(Sampled):
    """A reward model that tells demonstrations from samples once; source: 2405.15624."""

    algorithm: Literal["afd"] = "afd"
    data: Literal["demos_vs_initial", "demos_vs_sft", "sft_vs_initial"] = "sft_vs_initial"
    initial: str | None = Field(
        None, description="the stage before which the policy was initial; default: the first"
    )
    heads: int = Field(1, ge=1)
    network: str = Field("reward", pattern=r"^[a-z][a-z0-9_]*$")
    reward_model: ScorerKind = Field("separate", description=REWARD_MODEL)
    demonstrations: ClassVar[bool] = True
    trains_policy: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("loss", "demo_accuracy", "policy_accuracy")

    @property
    def scorers(self) -> dict[str, int]:
        return {self.network: self.heads}

    @property
    def scorer_kind(self) -> ScorerKind:
        return self.reward_model

    @property
    def needs_earlier(self) -> bool:
        return self.data != "demos_vs_sft"

    @property
    def earlier(self) -> str | None:
        return self.initial


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
    discriminator: ScorerKind = Field(
        "separate",
        description="a model of its own; or a head alone, on the hidden states of the policy as it "
        "is: less memory and time, but these are not trained to tell the two apart, and move with "
        "each step of the policy, which the head has to follow; or log p - log policy of a "
        "language model p, a copy of the policy to begin with: AIRL's f - log policy, which "
        "learns from far fewer demonstrations",
    )
    discriminator_updates: int = Field(1, ge=1)
    discriminator_warmup: int = Field(
        0,
        ge=0,
        description="steps before the policy begins to learn; an untrained discriminator's rewards "
        "lead it astray",
    )
    discriminator_optimizer: Optimizer = Field(default_factory=Optimizer.model_construct)
    max_logit: float = Field(20.0, gt=0)
    demonstrations: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = (
        "reward",
        "gold_reward",
        "discriminator/demo_accuracy",
        "discriminator/policy_accuracy",
    )

    @property
    def scorers(self) -> dict[str, int]:
        return {"discriminator": 1}

    @property
    def scorer_kind(self) -> ScorerKind:
        return self.discriminator

    @property
    def reward_from(self) -> str | None:
        return None

    @model_validator(mode="after")
    def _level(self):
        belongs(self, "demonstrations_per_step", "prompts", ("all",))
        for key in ("overlong_buffer", "dynamic_sampling", "ensemble"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect where a discriminator gives the rewards")
        if self.advantage == "remax":
            raise ValueError("advantage=remax has no rule for a discriminator's rewards")
        if self.level == "token" and self.kl_in == "reward":
            raise ValueError("kl_in=reward has no effect with level=token; use loss")
        if self.level == "token" and self.advantage not in ("grpo", "reinforce++"):
            raise ValueError(
                f"level=token has rewards for tokens, which advantage={self.advantage!r} has not "
                "a rule for; use grpo or reinforce++"
            )
        return self


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
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")

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
    headline: ClassVar[tuple[str, ...]] = ("distillation", "reward", "completion_length")

    @property
    def reference(self) -> bool:
        return self.teacher is None
