"""Stages that learn from completions that are ranked."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fastrl.train.stages.base import REWARD_MODEL, ScorerKind, Stage, belongs


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
    reward_model: ScorerKind = Field("separate", description=REWARD_MODEL)
    rankings: ClassVar[bool] = True
    trains_policy: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @model_validator(mode="after")
    def _effective(self):
        for key in ("centering", "label_smoothing", "margin"):
            belongs(self, key, "loss", ("bradley_terry",))
        return self

    @property
    def scorers(self) -> dict[str, int]:
        return {self.network: self.heads}

    @property
    def scorer_kind(self) -> ScorerKind:
        return self.reward_model


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
    headline: ClassVar[tuple[str, ...]] = (
        "loss",
        "accuracy",
        "margin",
        "desirable_reward",
        "undesirable_reward",
        "reward",
    )

    @model_validator(mode="after")
    def _effective(self):
        smoothed = ("dpo", "robust_dpo", "exo", "simpo")
        for key, algorithms in (
            ("gamma", ("simpo",)),
            ("nll_coef", ("rpo", "orpo")),
            ("label_smoothing", smoothed),
        ):
            belongs(self, key, "algorithm", algorithms)
        for key in ("group_size", "temperature"):
            belongs(self, key, "pairs", ("samples",))
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
