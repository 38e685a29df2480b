"""What an algorithm's step can reach."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.choices import Reduction
from fastrl.losses import token_weights
from fastrl.models import Level, ScoreHead
from fastrl.reward.ensemble import combine
from fastrl.rollout import Engine, RolloutEngine, Rollouts, SamplingParams, join_rollouts
from fastrl.train import parallel
from fastrl.train.batches import Batch, pad_batch
from fastrl.train.data import Example, batch_indices
from fastrl.train.rewards import Scored
from fastrl.train.scoring import Likelihood, QuantizedScorer, Scorer, frozen_scores
from fastrl.train.setup import SHARED, Setup


def stream_seed(seed: int, name: str) -> int:
    """A 31-bit seed for a named stream of a run: stages and steps draw from unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Context:
    """A stage at work: its settings and seed, the run's networks, and frozen ones beside them."""

    setup: Setup
    stage: Any
    seed: int
    reference: nn.Module | None = None  # or the teacher
    earlier: nn.Module | None = None
    scored_with: nn.Module | None = None  # what a reward model's head or likelihood reads
    engines: dict[tuple[int, str | None], RolloutEngine] = field(default_factory=dict)
    quantized: dict[str, QuantizedScorer] = field(default_factory=dict)

    @property
    def policy(self) -> nn.Module:
        return self.setup.networks["policy"]

    @property
    def shared_prefix(self) -> bool:
        """Whether this stage learns from groups whose prompt is computed once."""
        return self.setup.shared_prefix and isinstance(self.stage, SHARED)

    def scorer(self, name: str) -> Scorer | Likelihood:
        """A scoring model as it is trained.

        A head or a likelihood reads the policy, or the one that it was trained with.
        """
        network, shared = self.setup.networks[name], self.setup.shared_prefix
        stages = self.setup.config.stages.values()
        trainer: Any = next(stage for stage in stages if name in stage.scorers)
        if trainer.scorer_kind == "separate":
            return Scorer(network, None, shared)
        policy = self.policy if name in self.stage.scorers else self.scored_with
        assert policy is not None
        if trainer.scorer_kind == "likelihood":
            return Likelihood(network, policy, getattr(trainer, "temperature", 1.0), shared)
        assert isinstance(network, ScoreHead)
        return Scorer(policy, network, shared)

    def learned_rewards(self, name: str, batch: Batch, level: Level = "sequence") -> Tensor:
        """What a scoring model gives, `[B]` or `[B, T]`, in the stage's scheme if it has one.

        Quantized once where it is frozen, and every time where the stage trains it.
        """
        stage = self.stage
        trained = self.scorer(name)
        scorer: Scorer | Likelihood | QuantizedScorer = trained
        if stage.scheme is not None:
            assert isinstance(trained, Scorer)
            if name in stage.scorers:
                self.quantized.clear()  # before there are two
            if name not in self.quantized:
                self.quantized[name] = trained.quantized(stage.scheme, self.setup.device)
            scorer = self.quantized[name]

        def combined(heads: Tensor) -> Tensor:
            return combine(heads, stage.ensemble, stage.variance_weight)

        return frozen_scores(scorer, batch, stage.micro_batch_size, level, combined)

    def draw(
        self, examples: Sequence[Example], count: int, index: int, stream: str = ""
    ) -> list[Example]:
        """The examples of step `index`; every one is used once per epoch."""
        seed = stream_seed(self.seed, stream) if stream else self.seed
        return [examples[i] for i in batch_indices(len(examples), count, index, seed)]

    def demonstrations(self, chosen: Sequence[Example], reduction: Reduction) -> Batch:
        """Examples with a completion as a batch."""
        prompts = [e.prompt_ids for e in chosen]
        completions = [e.completion_ids or [] for e in chosen]
        prompts, ids, mask = pad_batch(prompts, completions, self.setup.device)
        return Batch(prompts, ids, mask, self.token_weights(mask, reduction))

    def token_weights(self, mask: Tensor, reduction: Reduction) -> Tensor:
        """`fastrl.losses.token_weights` with the recipe's limit of completions."""
        limit = self.setup.config.max_completion_length
        return token_weights(mask, reduction, max_completion_length=limit)

    def sample(
        self,
        examples: Sequence[Example],
        index: int,
        group_size: int = 1,
        *,
        model: nn.Module | None = None,
        greedy: bool = False,
        in_floats: bool = False,
    ) -> Rollouts:
        """Completions of the policy, or of another model; `index` seeds them.

        in_floats leaves the recipe's `rollout_scheme` out.

        Each process samples a part of the groups and gets them all; where a server samples, the
        first process asks it. A sharded model is gathered for as long as it is sampled from.
        """
        stage = self.stage
        sampling = SamplingParams(
            temperature=0.0 if greedy else stage.temperature,
            top_k=0 if greedy else getattr(stage, "top_k", 0),
            top_p=1.0 if greedy else getattr(stage, "top_p", 1.0),
            min_p=0.0 if greedy else getattr(stage, "min_p", 0.0),
            max_new_tokens=self.setup.config.max_completion_length,
            eos_token_id=self.setup.tokenizer.eos_token_id,
            # Streams must differ between steps of one run and between runs of neighbouring seeds.
            seed=(self.seed << 32) + index,
        )
        prompts = [e.prompt_ids for e in examples]
        with parallel.whole(self.policy if model is None else model):
            engine = self._engine(model, in_floats)
            if parallel.size() == 1:
                return engine.generate(prompts, group_size, sampling)
            if not isinstance(engine, RolloutEngine):
                asked = parallel.first(
                    lambda: engine.generate(prompts, group_size, sampling).to("cpu")
                )
                return asked.to(self.setup.device)
            mine, part = parallel.span(len(prompts)), None
            if prompts[mine]:
                row = mine.start * group_size
                part = engine.generate(prompts[mine], group_size, sampling, first_row=row)
        gathered = parallel.gather(None if part is None else part.to("cpu"))
        parts = [part for part in gathered if part is not None]
        return join_rollouts(parts).to(self.setup.device)

    def _engine(self, model: nn.Module | None, in_floats: bool) -> Engine:
        config = self.setup.config
        scheme = None if in_floats else config.rollout_scheme
        if model is None:
            if scheme == config.rollout_scheme:
                return self.setup.engine
            model = self.policy
        key = id(model), scheme
        if key not in self.engines:
            self.engines[key] = RolloutEngine(
                parallel.plain(model),
                self.setup.tokenizer,
                max_rows=config.rollout_rows,
                scheme=scheme,
            )
        self.engines[key].weights_changed()
        return self.engines[key]

    def score(self, examples: Sequence[Example], rollouts: Rollouts) -> Scored | None:
        """What the recipe's reward functions, if any, give to groups of completions."""
        if not self.setup.rewards.functions:
            return None
        return self.setup.rewards.score_rollouts(examples, rollouts, self.setup.tokenizer)

    def rewards(
        self, source: str, batch: Batch, scored: Scored | None
    ) -> tuple[Tensor, dict[str, float]]:
        """The rewards `[B]` that a stage optimises, and their metrics.

        A learned reward is compared with that of the functions, which it does not see.
        """
        if source == "functions":
            assert scored is not None
            return self.column(scored.total), {}
        learned = self.learned_rewards(source, batch)
        return learned, self.compared(learned, scored)

    def compared(self, learned: Tensor, scored: Scored | None) -> dict[str, float]:
        """The correlation of learned rewards with those of the functions."""
        if scored is None:
            return {}
        gold = self.column(scored.total)
        both = torch.stack([learned, gold])
        known = float(both.std(-1).min()) > 0
        correlation = float(torch.corrcoef(both)[0, 1]) if known else 0.0
        return {"gold_reward": float(gold.mean()), "gold_correlation": correlation}

    def column(self, values: Sequence[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """A number for each row, as a tensor."""
        return torch.tensor(values, dtype=dtype, device=self.setup.device)
