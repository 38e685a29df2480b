"""Everything that a recipe names, loaded and checked before any work is done."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrl import models
from fastrl.hub import find_model
from fastrl.kernels import IMPLEMENTATIONS, native
from fastrl.models.head import unwrap
from fastrl.reward import (
    QuantizedRewardModel,
    RewardFunction,
    RewardModelError,
    load_reward_function,
)
from fastrl.reward.checkpoint import Spec
from fastrl.reward.reasoning_gym import verifier
from fastrl.rollout import Engine, RolloutEngine, VllmEngine
from fastrl.train import data, parallel
from fastrl.train.config import Config, ConfigError, Reward
from fastrl.train.rewards import RewardSum
from fastrl.train.stages import SPIN, AfD, PolicyGradient, Preference
from fastrl.train.stages import Reward as RewardStage
from fastrl.train.tracking import check_trackers

# The stages whose log-probs or scores are of groups that have a prompt in common.
SHARED = (PolicyGradient, Preference, SPIN, RewardStage, AfD)


@dataclass(frozen=True)
class Setup:
    """What a recipe names, loaded and checked.

    config has the dtype that `auto` stood for. networks holds the policy and, once a stage has
    begun that trains one, scoring models by name.
    """

    config: Config
    networks: dict[str, nn.Module]
    tokenizer: PreTrainedTokenizerBase
    train: list[data.Example]
    held_out: list[data.Example]
    rewards: RewardSum
    engine: Engine
    device: torch.device
    shared_prefix: bool  # whether the log-probs of groups compute each prompt once

    @property
    def policy(self) -> nn.Module:
        return self.networks["policy"]

    @property
    def demonstrations(self) -> list[data.Example]:
        """The training examples that are demonstrations."""
        some = self.train[: self.config.data.demonstrations]
        return [e for e in some if e.completion_ids is not None]


def prepare(config: Config) -> Setup:
    """Load and check everything that a recipe names, before any work is done or written."""
    check_trackers(config.trackers)
    device = _device(config)
    if config.model.dtype == "auto":
        dtype = "bfloat16" if native.multiplies_bf16(device) else "float32"
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"dtype": dtype})}
        )
    rewards = _rewards(config)
    tokenizer = _tokenizer(config)
    train, held_out = data.load_examples(config, tokenizer)
    if rewards.functions:
        # A trial call: what a reward function gets wrong is an error now, not after a warm start.
        trial = train[:2]
        ids = [e.completion_ids or [] for e in trial]
        rewards.score(trial, tokenizer.batch_decode(ids, skip_special_tokens=True))
    model = load_policy(config, tokenizer, device)
    stage: Any
    for name, stage in config.stages.items():
        for network in stage.scorers if stage.scorer_kind == "separate" else ():
            check_scorer(model, network)
        if getattr(stage, "teacher", None) is not None:
            find_model(stage.teacher)
        if getattr(stage, "scheme", None) is not None:
            check_scheme(model, f"stages.{name}.scheme={stage.scheme!r}")
    if config.rollout_scheme is not None:
        check_sampling(model, config.rollout_scheme)
    context = getattr(models.backbone(model).config, "max_position_embeddings", None)
    for examples, source in ((train, "training data"), (held_out, "held-out data")):
        data.check_context(examples, config.max_completion_length, context, source)
    shared = _shared_prefix(config, model, device)
    model = parallel.distribute(model, config.parallel)
    sampled = parallel.plain(model)
    engine: Engine
    if config.rollout is None:
        engine = RolloutEngine(
            sampled, tokenizer, max_rows=config.rollout_rows, scheme=config.rollout_scheme
        )
    else:
        engine = VllmEngine(sampled, tokenizer, **config.rollout.model_dump())
    networks = {"policy": model}
    return Setup(config, networks, tokenizer, train, held_out, rewards, engine, device, shared)


def check_scorer(model: nn.Module, name: str) -> None:
    """Raise `ConfigError` where no scoring model can start from the policy."""
    try:
        models.scorer_class(model)
    except ValueError as error:
        raise ConfigError(f"the scoring model {name!r} cannot be made: {error}") from None


def check_sampling(model: nn.Module, scheme: Literal["int8"]) -> None:
    """Raise `ConfigError` where the policy cannot be sampled from in int8."""
    try:
        RolloutEngine(model, scheme=scheme).prefill([0])
    except ValueError as error:
        raise ConfigError(f"rollout_scheme={scheme!r} cannot be: {error}") from None


def check_scheme(model: nn.Module, setting: str) -> None:
    """Raise `ConfigError` where the policy's backbone has no quantized forward."""
    try:
        Spec.from_config(unwrap(model).config)
    except RewardModelError as error:
        raise ConfigError(f"{setting} cannot be: {error}") from None


def add_scorer(setup: Setup, name: str, heads: int, seed: int) -> None:
    """A scoring model that starts from the policy as it is."""
    config = setup.config.model
    with parallel.whole(setup.policy) as policy:
        scorer = models.build_scorer(policy, padding(setup), heads=heads, seed=seed)
    if config.lora is not None:
        scorer = models.add_lora(scorer, **config.lora.model_dump(), seed=seed, scores=True)
    if config.gradient_checkpointing:
        scorer.gradient_checkpointing_enable({"use_reentrant": False})
    setup.networks[name] = parallel.distribute(scorer.train(), setup.config.parallel)


def add_likelihood(setup: Setup, name: str) -> None:
    """A language model that is the policy as it is, and trains like it."""
    setup.policy.zero_grad()  # gradients would be copied along
    with parallel.whole(setup.policy) as policy:
        model = copy.deepcopy(policy)
    setup.networks[name] = parallel.distribute(model.train(), setup.config.parallel)


def padding(setup: Setup) -> int:
    """The id that stands for padding in a scoring model's config."""
    pad = setup.tokenizer.pad_token_id
    return setup.tokenizer.eos_token_id if pad is None else pad


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    if config.model.alphabet is not None:
        return models.character_tokenizer(config.model.alphabet)
    path = config.model.tokenizer or config.model.path
    assert path is not None
    return models.load_tokenizer(path)


def _device(config: Config) -> torch.device:
    """The device that the recipe names, which is there."""
    name = config.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.size() > 1:
        name = f"cuda:{parallel.local_rank()}"  # a GPU for each process
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device={config.model.device!r} cannot be used: {error}") from None


def load_policy(
    config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> nn.Module:
    """The policy as a run begins with it."""
    settings = config.model
    dtype = getattr(torch, settings.dtype)
    if settings.architecture is not None:
        model: Any = models.build_model(
            tokenizer, **settings.architecture.model_dump(), seed=config.seed
        )
    else:
        assert settings.path is not None
        model = models.load_model(settings.path, dtype)
    models.check_vocabulary(model, tokenizer)
    model = model.to(device)
    # Parameters alone: rotary frequencies are buffers, and have to stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if settings.lora is not None:
        model = models.add_lora(model, **settings.lora.model_dump(), seed=config.seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    models.verify_lm_head(model)
    return model.train()


def _shared_prefix(config: Config, model: nn.Module, device: torch.device) -> bool:
    wanted = config.model.shared_prefix
    if wanted == "off" or not any(isinstance(s, SHARED) for s in config.stages.values()):
        return False
    fast = set(native.FAST.get(device.type, ())) & set(IMPLEMENTATIONS["shared_prefix_attention"])
    if wanted == "auto" and all(native.unavailable(impl, device) for impl in fast):
        return False  # the reference holds all pairs of tokens
    try:
        models.verify_shared_prefix(model)
    except ValueError as error:
        if wanted == "on":
            raise ConfigError(f"model.shared_prefix=on cannot be: {error}") from None
        warnings.warn(f"prompts are repeated for each completion: {error}", stacklevel=2)
        return False
    return True


def _rewards(config: Config) -> RewardSum:
    short = [
        r.function.rpartition(":")[2] if r.model is None else Path(r.model).name
        for r in config.rewards
    ]
    functions = {}
    for reward, name in zip(config.rewards, short, strict=True):
        if reward.model is not None:
            function = _reward_model(reward)
        elif reward.function == "reasoning_gym":
            gym = config.data.reasoning_gym
            assert gym is not None
            function = verifier(gym.task, gym.options)
        else:
            function = load_reward_function(reward.function)
        functions[reward.source if short.count(name) > 1 else name] = (function, reward)
    return RewardSum(functions)


def _reward_model(reward: Reward) -> RewardFunction:
    assert reward.model is not None
    try:
        model = QuantizedRewardModel.from_pretrained(
            reward.model, reward.scheme, keep_bf16=reward.keep_bf16
        )
        return model.as_reward_function(
            ensemble=reward.ensemble,
            variance_weight=reward.variance_weight,
            name=Path(reward.model).name,
        )
    except ValueError as error:
        raise ConfigError(f"reward model {reward.model!r}: {error}") from error
