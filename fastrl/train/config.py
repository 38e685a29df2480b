"""The recipe: every setting of a run, checked before any work is done."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from fastrl.choices import Parallel
from fastrl.train.mistakes import ConfigError, messages
from fastrl.train.section import Section
from fastrl.train.stages import (
    ALGORITHMS,
    PRESETS,
    Ensemble,
    PolicyGradient,
    Scheme,
    ScorerKind,
    Stage,
)


class Architecture(Section):
    """A Qwen3-type model built from scratch."""

    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=2, multiple_of=2)
    intermediate_size: int = Field(384, ge=8)
    context_length: int = Field(128, ge=2)
    tie_embeddings: bool = True
    vocab_size: int | None = Field(None, ge=4, description="default: the tokenizer's size")

    @model_validator(mode="after")
    def _heads(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        return self


class Lora(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class RolloutServer(Section):
    """A vLLM server that samples in this process's place; see `fastrl.rollout.VllmEngine`."""

    server: str = Field(pattern=r"^https?://", description="such as http://localhost:8000")
    weights: str = Field(description="folder for weights, which the server reads")
    served_model: str | None = Field(None, description="default: the first one it serves")
    update: Literal["reload", "sleep"] = "reload"
    timeout: float = Field(600.0, gt=0, description="seconds for one request")
    update_timeout: float = Field(600.0, gt=0, description="seconds for loading weights")
    concurrency: int = Field(32, ge=1, description="requests under way at a time")


# YAML reads a bare on and off as true and false.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda v: {True: "on", False: "off"}[v] if isinstance(v, bool) else v),
]


class Model(Section):
    """Either an existing checkpoint (`path`) or a small model built here (`architecture`)."""

    path: str | None = Field(None, description="local Hugging Face directory or hub id")
    architecture: Architecture | None = None
    alphabet: str | None = Field(None, description="characters of a character-level tokenizer")
    tokenizer: str | None = Field(
        None, description="directory or hub id; default: the model's path"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="auto: bfloat16 where the device multiplies it; on other CPUs PyTorch emulates "
        "it, several times slower than float32",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    shared_prefix: Switch = Field(
        "auto",
        description="compute each prompt once for its group of completions: on, off, or where the "
        "device has a kernel for it and the model can (auto)",
    )

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give either path (an existing model) or architecture (build one), not both"
            )
        if self.alphabet is not None and self.tokenizer is not None:
            raise ValueError("give either alphabet or tokenizer, not both")
        if self.path is None and self.alphabet is None and self.tokenizer is None:
            raise ValueError("a model built from an architecture needs alphabet or tokenizer")
        return self


class ReasoningGym(Section):
    """A procedural task of the reasoning-gym library: its prompts, answers and verifier."""

    task: str
    options: dict[str, Any] = Field(default_factory=dict)
    size: int = Field(10_000, ge=1, description="training problems")
    eval_size: int = Field(
        200, ge=0, description="held-out problems, disjoint from the training ones"
    )
    seed: int = Field(0, description="of the problems; independent of the run's seed")
    prompt: str = Field(
        "{question}", description="format string over question and the entry's metadata"
    )
    slips: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training answers beyond data.demonstrations that are wrong by one",
    )
    flips: float = Field(
        0.0, ge=0, le=1, description="share of training rankings that are the wrong way round"
    )
    ranked: int = Field(
        2, ge=2, description="completions of a ranking: the answer, and ever worse copies of it"
    )


# Absolute, so that a run can be resumed from any folder.
DataFile = Annotated[Path | None, AfterValidator(lambda p: p and p.expanduser().absolute())]


class Data(Section):
    """Where prompts and demonstrations come from: one of reasoning_gym and train_file."""

    reasoning_gym: ReasoningGym | None = None
    train_file: DataFile = Field(None, description="JSON lines or parquet: prompt, completion ...")
    eval_file: DataFile = None

    demonstrations: int | None = Field(
        None,
        ge=1,
        description="only the first so many training rows are demonstrations; an sft stage with "
        "data=crowd learns from the completions of all",
    )

    @model_validator(mode="after")
    def _one_source(self):
        if (self.reasoning_gym is None) == (self.train_file is None):
            raise ValueError("give one of reasoning_gym and train_file")
        gym = self.reasoning_gym
        if gym is not None and gym.slips and self.demonstrations is None:
            raise ValueError("reasoning_gym.slips needs demonstrations, the number of rows without")
        if self.eval_file is not None and self.train_file is None:
            raise ValueError(
                "eval_file goes with train_file; reasoning_gym makes its own held-out set"
            )
        return self


class Reward(Section):
    """A function `f(prompts, completions, **columns) -> list[float]` and its weight.

    Either `function`, or `model`, a reward model.
    """

    function: str = Field(
        "", description="import path module:function, or reasoning_gym for the task's verifier"
    )
    model: str | None = Field(None, description="local Hugging Face directory or hub id")
    scheme: Scheme | None = Field(None, description="default: int8, or what the model was saved in")
    keep_bf16: tuple[str, ...] = Field((), description="the model's linear layers left in bf16")
    ensemble: Ensemble | None = Field(
        None, description="how the heads of a model with several become one reward"
    )
    variance_weight: float = Field(
        0.5, ge=0, description="with ensemble=uncertainty: mean - variance_weight * variance"
    )
    weight: float = 1.0
    threshold: float | None = Field(
        None,
        description="the score becomes 1 where it reaches this and 0 elsewhere: no partial credit",
    )

    @property
    def source(self) -> str:
        """The function's import path, or the model's path."""
        return self.model or self.function

    @model_validator(mode="after")
    def _one_source(self):
        if bool(self.function) == (self.model is not None):
            raise ValueError("give either function or model")
        if self.function and self.function != "reasoning_gym":
            module, _, name = self.function.partition(":")
            if not module or not name:
                close = difflib.get_close_matches(self.function, ["reasoning_gym"])
                hint = "did you mean that?" if close else "the task's verifier"
                raise ValueError(
                    f"function={self.function!r} must look like module:function, or be "
                    f"reasoning_gym; {hint}"
                )
        if self.model is None and (self.scheme or self.keep_bf16 or self.ensemble):
            raise ValueError("scheme, keep_bf16 and ensemble go with model")
        if self.variance_weight != 0.5 and self.ensemble != "uncertainty":
            raise ValueError("variance_weight goes with ensemble=uncertainty")
        return self


class Config(Section):
    """A whole run: model, data, rewards and stages, in the order in which they are given."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**31)
    model: Model
    data: Data
    rewards: tuple[Reward, ...] = ()
    stages: dict[str, SerializeAsAny[Stage]] = Field(min_length=1)
    max_prompt_length: int | None = Field(
        None, ge=1, description="tokens; a longer prompt is an error"
    )
    max_completion_length: int = Field(
        256, ge=1, description="tokens sampled or learned per completion"
    )
    save_every: int = Field(50, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    rollout_rows: int = Field(256, ge=1, description="completions decoded at a time")
    rollout_scheme: Literal["int8"] | None = Field(
        None, description="the products that completions are sampled with; evaluation is in floats"
    )
    rollout: RolloutServer | None = None
    parallel: Parallel = Field(
        "replicated",
        description="how several processes hold a model: each all of it, or each a part (fsdp)",
    )
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()

    @property
    def trained(self) -> list[str]:
        """The networks that its stages train: the policy, scoring models by name."""
        stages = self.stages.values()
        policy = ["policy"] if any(stage.trains_policy for stage in stages) else []
        return [*policy, *dict.fromkeys(name for stage in stages for name in stage.scorers)]

    @model_validator(mode="before")
    @classmethod
    def _algorithm_from_name(cls, values: Any) -> Any:
        stages = values.get("stages") if isinstance(values, dict) else None
        if not isinstance(stages, dict):
            return values
        chosen = {}
        for name, stage in stages.items():
            if stage is None:  # --set stages.sft=null leaves a recipe's stage out
                continue
            if not isinstance(stage, dict):
                chosen[name] = stage
                continue
            algorithm = stage.get("algorithm", name)
            if algorithm not in ALGORITHMS:
                raise ValueError(
                    f"stages.{name}: algorithm {algorithm!r} is unknown; use one of "
                    f"{', '.join(ALGORITHMS)}"
                )
            family = ALGORITHMS[algorithm]
            settings = PRESETS.get(algorithm, {}) | stage | {"algorithm": algorithm}
            try:
                chosen[name] = family(**settings)
            except ValidationError as error:
                mistakes = messages(error, cls, ("stages", name), family)
                raise ConfigError("\n".join(mistakes)) from None
        return values | {"stages": chosen}

    @model_validator(mode="after")
    def _one_sampler(self):
        if self.rollout is not None and self.rollout_scheme is not None:
            raise ValueError(
                f"rollout_scheme={self.rollout_scheme!r} has no effect on a server that samples; "
                "leave it out, or rollout"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_together(self):
        dropout = self.model.lora is not None and self.model.lora.dropout > 0
        trained: dict[str, tuple[int, ScorerKind]] = {}
        stage: Any
        for i, (name, stage) in enumerate(self.stages.items()):
            if dropout and isinstance(stage, PolicyGradient) and stage.updates_per_batch > 1:
                raise ValueError(
                    f"stages.{name}.updates_per_batch={stage.updates_per_batch} needs "
                    "model.lora.dropout=0: dropout noise would look like a change of the policy"
                )
            source = stage.reward_from
            if source == "functions" and not self.rewards:
                raise ValueError(
                    f"rewards is empty, but stages.{name} ({stage.algorithm}) needs at least one"
                )
            if source not in (None, "functions") and source not in trained:
                raise ValueError(
                    f"stages.{name}.reward={source!r} is neither functions nor a scoring model "
                    f"that an earlier stage trains ({', '.join(sorted(trained)) or 'none does'})"
                )
            heads, kind = trained.get(source or "", (1, stage.scorer_kind))
            if kind == "likelihood" and getattr(stage, "scheme", None) is not None:
                raise ValueError(
                    f"stages.{name}.scheme={stage.scheme!r} has no effect on a likelihood, which "
                    "has no quantized forward; leave it out"
                )
            if heads == 1 and getattr(stage, "ensemble", "mean") != "mean":
                raise ValueError(
                    f"stages.{name}.ensemble={stage.ensemble!r} has no effect: {source!r} has one "
                    "head; train it with heads of 2 or more"
                )
            if stage.earlier is not None and stage.earlier not in list(self.stages)[: i + 1]:
                raise ValueError(
                    f"stages.{name}.initial={stage.earlier!r} is not one of the stages up to it: "
                    f"{', '.join(list(self.stages)[: i + 1])}"
                )
            for network, count in stage.scorers.items():
                if stage.scorer_kind == "likelihood" and count > 1:
                    raise ValueError(f"stages.{name}.heads={count}: a likelihood has one; use 1")
                made = (count, stage.scorer_kind)
                if trained.setdefault(network, made) != made:
                    raise ValueError(
                        f"stages.{name} goes on with the scoring model {network!r} of an earlier "
                        "stage; its number of heads and its backbone must be the same there"
                    )
        names = [r.source for r in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards names a function twice: {', '.join(names)}")
        if "reasoning_gym" in names and self.data.reasoning_gym is None:
            raise ValueError("the reward reasoning_gym needs data.reasoning_gym")
        return self


def parse_config(values: dict[str, Any]) -> Config:
    """Check a recipe's values; raises `ConfigError` that names every bad key, with a suggestion."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(messages(error, Config))) from None
