"""Scoring models at work: in the forward that trains them, or quantized."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fastrl.models import Level, ScoreHead, backbone, completion_scores, head_scores
from fastrl.models.head import unwrap
from fastrl.reward import Checkpoint, QuantizedRewardModel
from fastrl.reward.pairs import Pair
from fastrl.train import parallel
from fastrl.train.batches import Batch, frozen


@dataclass(frozen=True)
class Scorer:
    """A sequence classifier, or a head on another model's hidden states, as it is trained."""

    model: nn.Module
    head: ScoreHead | None
    shared_prefix: bool

    def heads(self, batch: Batch, level: Level = "sequence") -> Tensor:
        """Scores of each of K heads: `[B, K]`, or at the levels of tokens `[B, T, K]`.

        Through a head no gradient reaches the model.
        """
        settings: Any = {"level": level, "shared_prefix": self.shared_prefix}
        if self.head is None:
            scores = completion_scores(self.model, *batch.completions, **settings)
        else:
            scores = head_scores(self.model, self.head, *batch.completions, **settings)
        single = scores.dim() == (1 if level == "sequence" else 2)
        return scores.unsqueeze(-1) if single else scores

    def quantized(self, scheme: str, device: torch.device) -> "QuantizedScorer":
        """The scorer as it is now, through the forward of a quantized reward model.

        Of the weights that a checkpoint would hold, adapters merged; so are its scores. A sharded
        model is gathered meanwhile, and every process holds all of the result. Raises
        `fastrl.reward.RewardModelError` as `QuantizedRewardModel.from_pretrained` does.
        """
        with parallel.whole(self.model) as model:
            checkpoint = _checkpoint(model, self.head)
            quantized = QuantizedRewardModel.from_pretrained(checkpoint, scheme, device=device)
        return QuantizedScorer(quantized)


def _checkpoint(model: Any, head: ScoreHead | None) -> Checkpoint:
    """A classifier, or a causal LM's backbone and a head as the one that they are together."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    if head is None:
        return Checkpoint.of(model)
    config = copy.deepcopy(unwrap(model).config)
    config.num_labels = head.out_features
    tensors = {f"model.{name}": t for name, t in backbone(model).state_dict().items()}
    return Checkpoint(config, tensors | {"score.weight": head.weight}, "a head on the policy")


@dataclass(frozen=True)
class Likelihood:
    """Log p - log policy of a language model p, whose tokens' or whole ratio is the score.

    The policy is at the temperature that it samples with: its density is then that of the samples.
    No gradient reaches it.
    """

    model: nn.Module
    policy: nn.Module
    temperature: float
    shared_prefix: bool

    def heads(self, batch: Batch, level: Level = "sequence") -> Tensor:
        """`Scorer.heads` of the one head that it is, at the levels "sequence" and "token"."""
        assert level != "state", level
        shared = self.shared_prefix
        with frozen(self.policy):
            before = batch.logprobs(self.policy, self.temperature, shared_prefix=shared).logprob
        after = batch.logprobs(self.model, shared_prefix=shared).logprob
        ratios = torch.where(batch.completion_mask, after - before, 0.0)
        return (ratios if level == "token" else ratios.sum(-1)).unsqueeze(-1)


@dataclass(frozen=True)
class QuantizedScorer:
    """A quantized copy of a scorer, which computes each prompt once. It has no gradients."""

    quantized: QuantizedRewardModel
    model: None = None
    shared_prefix: bool = True

    def heads(self, batch: Batch, level: Level = "sequence") -> Tensor:
        """`Scorer.heads`, at the levels "sequence" and "token"."""
        prompts, ids, mask = batch.completions
        rows = zip(prompts, ids.tolist(), mask.sum(-1).tolist(), strict=True)
        pairs = [Pair(tuple(prompt), tuple(row[:n])) for prompt, row, n in rows]
        count = self.quantized.spec.scores
        if level == "sequence":
            return self.quantized.score_pairs(pairs).view(len(pairs), count).to(ids.device)
        assert level == "token", level
        scores = torch.zeros(*mask.shape, count)
        for row, found in zip(scores, self.quantized.score_tokens(pairs), strict=True):
            row[: len(found)] = found.view(-1, count)
        return scores.to(ids.device)


def mean(scores: Tensor) -> Tensor:
    """The mean of several heads."""
    return scores.mean(-1)


def frozen_scores(
    scorer: Scorer | Likelihood | QuantizedScorer,
    batch: Batch,
    size: int,
    level: Level = "sequence",
    combined: Callable[[Tensor], Tensor] = mean,
) -> Tensor:
    """Scores `[B]` or `[B, T]` without gradients or dropout, at most `size` rows at a time.

    combined makes one score of several heads, the last dimension.
    """
    return batch.frozen_figures(
        scorer.model,
        size,
        lambda part: combined(scorer.heads(part, level)),
        per_row=level == "sequence",
        shared_prefix=scorer.shared_prefix,
    )
