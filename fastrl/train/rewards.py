"""The recipe's reward functions: completions in, one number for each out."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrl.reward import RewardFunction, score_completions
from fastrl.rollout import Rollouts
from fastrl.train import parallel
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

    @property
    def verifier(self) -> str | None:
        """The first that says what is right by 1: a function, or a model's score at a threshold."""
        for name, (_, reward) in self.functions.items():
            if reward.model is None or reward.threshold is not None:
                return name
        return None

    def score_rollouts(
        self, examples: Sequence[Example], rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase
    ) -> Scored:
        """Scores of groups of completions, one group for each example.

        Each process scores a part of the groups.
        """
        size = rollouts.layout.group_size
        rows = [e for e in examples for _ in range(size)]
        texts = tokenizer.batch_decode(rollouts.completion_lists(), skip_special_tokens=True)
        mine = parallel.span(len(examples))
        return self.score(rows, texts, slice(mine.start * size, mine.stop * size))

    def score(self, rows: Sequence[Example], texts: list[str], mine: slice | None = None) -> Scored:
        """Scores of one completion for each row; of those that are not `mine` by others."""
        prompts = [e.prompt for e in rows]
        completions = [
            t if isinstance(p, str) else [{"role": "assistant", "content": t}]
            for p, t in zip(prompts, texts, strict=True)
        ]
        names = {name for e in rows for name in e.columns}
        columns = {name: [e.columns.get(name) for e in rows] for name in sorted(names)}
        parts = {}
        for name, (function, reward) in self.functions.items():
            if mine is None:
                scores = score_completions(function, name, prompts, completions, columns)
            else:
                some = {key: values[mine] for key, values in columns.items()}
                given = prompts[mine], completions[mine], some
                part = score_completions(function, name, *given) if given[0] else []
                scores = [score for scores in parallel.gather(part) for score in scores]
            if reward.threshold is not None:
                scores = [float(s >= reward.threshold) for s in scores]
            parts[name] = scores
        weights = [reward.weight for _, reward in self.functions.values()]
        total = [sum(map(mul, weights, scores)) for scores in zip(*parts.values(), strict=True)]
        return Scored(prompts, texts, total, parts)
