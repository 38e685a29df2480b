"""What the stages of a run have in common."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fastrl.choices import Reduction
from fastrl.train.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Scheme = Literal["int8", "nf4", "int4", "fp8", "bf16", "float32"]
Ensemble = Literal["mean", "worst_case", "uncertainty"]
ScorerKind = Literal["separate", "head", "likelihood"]

SCHEME = (
    "score samples by the forward of fastrl.reward.QuantizedRewardModel, quantized so: once where "
    "the scoring model is frozen, after its updates where the stage trains it; default: by the "
    "forward that it is trained with"
)
REWARD_MODEL = (
    "a model of its own; or a head alone, on the hidden states of the policy as the stage found "
    "it: they are not trained, and later stages score with that policy, however theirs changes; or "
    "the log ratio of a language model, a copy of that policy to begin with, to that policy: the "
    "implicit reward (2305.18290), which learns from far fewer examples"
)


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
    headline: ClassVar[tuple[str, ...]] = (
        "loss",
    )  # what the console shows of a step, if it has it

    @property
    def scorers(self) -> dict[str, int]:
        """The scoring models that it trains, and their numbers of heads."""
        return {}

    @property
    def scorer_kind(self) -> ScorerKind:
        """What its scoring model is; a head and a likelihood read the policy as well."""
        return "separate"

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


def belongs(stage: Stage, key: str, choice: str, values: tuple[str, ...]) -> None:
    """Raise `ValueError` for a setting that the stage's choice would ignore."""
    given, chosen = getattr(stage, key), getattr(stage, choice)
    if given != type(stage).model_fields[key].default and chosen not in values:
        raise ValueError(
            f"{key}={given!r} has no effect with {choice}={chosen!r}; it belongs to "
            f"{', '.join(values)}"
        )


class Sampled(Stage):
    """What the algorithms that learn from the policy's own samples share."""

    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)


class Rewarded(Sampled):
    """What the algorithms whose samples are rewarded share."""

    reward: str = Field("functions", description="functions, or a scoring model trained before")
    scheme: Scheme | None = Field(None, description=SCHEME)
    ensemble: Ensemble = Field("mean", description="how the heads of a scoring model are one")
    variance_weight: float = Field(
        0.5, ge=0, description="with ensemble=uncertainty: mean - variance_weight * variance"
    )
    reduction: Reduction = "dapo"
    overlong_buffer: int = Field(
        0, ge=0, description="tokens before the limit over which a penalty of 0 to -1 grows (DAPO)"
    )
    headline: ClassVar[tuple[str, ...]] = ("reward", "gold_reward", "kl", "completion_length")

    @property
    def reward_from(self) -> str | None:
        return self.reward

    @model_validator(mode="after")
    def _scoring(self):
        belongs(self, "variance_weight", "ensemble", ("uncertainty",))
        if self.reward_from == "functions":
            for key in ("scheme", "ensemble"):
                if (given := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key}={given!r} has no effect with reward='functions'; it belongs to a "
                        "scoring model that an earlier stage trains"
                    )
        return self
