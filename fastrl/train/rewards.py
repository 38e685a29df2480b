"""The recipe's reward functions: completions in, one number for each out."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrl.reward import RewardFunction, score_completions
from fastrl.rollout import Rollouts
from fastrl.train.config import Reward
from fastrl.train.data import Example


@dataclass(frozen=True)
class Scored:
    """Completions as text and their rewards: the weighted `total`, and each function's `parts`."""

    prompts: list[Any]
    completions: list[str]
    total: list[float]
    parts: dict[str, list[float]]


@dataclass(frozen=True)
class RewardSum:
    """The recipe's reward functions and their weights."""

    functions: dict[str, tuple[RewardFunction, Reward]]

    def score_rollouts(
        self, examples: Sequence[Example], rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase
    ) -> Scored:
        """Scores of groups of completions, one group for each example."""
        rows = [e for e in examples for _ in range(rollouts.layout.group_size)]
        lists = rollouts.completion_lists()
        return self.score(rows, tokenizer.batch_decode(lists, skip_special_tokens=True))

    def score(self, rows: Sequence[Example], texts: list[str]) -> Scored:
        """Scores of one completion for each row."""
        prompts = [e.prompt for e in rows]
        completions = [
            t if isinstance(p, str) else [{"role": "assistant", "content": t}]
            for p, t in zip(prompts, texts, strict=True)
        ]
        names = {name for e in rows for name in e.columns}
        columns = {name: [e.columns.get(name) for e in rows] for name in sorted(names)}
        parts = {}
        for name, (function, reward) in self.functions.items():
            scores = score_completions(function, name, prompts, completions, columns)
            if reward.threshold is not None:
                scores = [float(s >= reward.threshold) for s in scores]
            parts[name] = scores
        weights = [reward.weight for _, reward in self.functions.values()]
        total = [sum(map(mul, weights, scores)) for scores in zip(*parts.values(), strict=True)]
        return Scored(prompts, texts, total, parts)
