"""What one optimizer step learns from: demonstrations, or rollouts and their advantages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrl import losses
from fastrl.models import completion_logprobs, group_logprobs, group_rows
from fastrl.reward import RewardFunction, score_completions
from fastrl.rollout import Engine, Rollouts, SamplingParams
from fastrl.train.config import GRPO, SFT, Reward
from fastrl.train.data import Example, batch_indices


@dataclass(frozen=True)
class Batch:
    """Prompts, completions `[B, T]` and, per token, the loss weight.

    The rest only where an algorithm needs it.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    completion_mask: Tensor
    weights: Tensor
    advantages: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def select(self, rows: Tensor) -> "Batch":
        """The given rows, without the padding that none of them needs."""
        steps = int(self.completion_mask[rows].sum(-1).max()) if len(rows) else 0
        tensors = {
            name: value[rows] if value.dim() == 1 else value[rows, :steps]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, prompt_ids=[self.prompt_ids[i] for i in rows.tolist()], **tensors)

    def micro_batches(self, size: int, *, shared_prefix: bool = False) -> Iterator["Batch"]:
        """Pieces of at most `size` rows. Their weights stay those of the whole batch."""
        return map(self.select, self.pieces(size, shared_prefix=shared_prefix))

    def pieces(self, size: int, *, shared_prefix: bool) -> list[Tensor]:
        """The rows of each micro-batch: of similar length or, with shared_prefix, whole groups.

        A group is split only where it has more than `size` rows.
        """
        device = self.completion_mask.device
        if shared_prefix:
            parts: list[list[int]] = []
            for group in group_rows(self.prompt_ids):
                for i in range(0, len(group), size):
                    some = group[i : i + size]
                    if parts and len(parts[-1]) + len(some) <= size:
                        parts[-1] += some
                    else:
                        parts.append(some)
            return [torch.tensor(part, device=device) for part in parts]
        lengths = self.completion_mask.sum(-1) + torch.tensor(
            [len(p) for p in self.prompt_ids], device=device, dtype=torch.int64
        )
        order = torch.argsort(lengths, stable=True)
        return [piece for piece in order.split(size) if len(piece)]

    def logprobs(self, model: nn.Module, temperature: float, *, shared_prefix: bool) -> Tensor:
        """Log-probs `[B, T]` of the completions; with shared_prefix from prompts computed once."""
        completions = (self.prompt_ids, self.completion_ids, self.completion_mask)
        if shared_prefix:
            return group_logprobs(model, completions, temperature=temperature).logprob
        return completion_logprobs(model, *completions, temperature=temperature).logprob


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


def sft_batch(
    examples: Sequence[Example],
    stage: SFT,
    step: int,
    seed: int,
    max_completion_length: int,
    device: Any,
) -> Batch:
    """The demonstrations of one optimizer step."""
    chosen = [examples[i] for i in batch_indices(len(examples), stage.batch_size, step, seed)]
    return demonstrations(chosen, stage, max_completion_length, device)


def demonstrations(
    chosen: Sequence[Example], stage: SFT, max_completion_length: int, device: Any
) -> Batch:
    """Examples with a completion as a batch."""
    completions = [torch.tensor(e.completion_ids) for e in chosen]
    ids = nn.utils.rnn.pad_sequence(completions, batch_first=True).to(device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(-1)
    weights = losses.token_weights(
        mask, stage.reduction, max_completion_length=max_completion_length
    )
    return Batch([e.prompt_ids for e in chosen], ids, mask, weights)


def grpo_batch(
    examples: Sequence[Example],
    stage: GRPO,
    step: int,
    seed: int,
    max_completion_length: int,
    engine: Engine,
    rewards: RewardSum,
    tokenizer: PreTrainedTokenizerBase,
    reference: nn.Module | None,
    shared_prefix: bool,
) -> tuple[Batch, Scored, dict[str, float]]:
    """Rollouts of one step with rewards and advantages, and the metrics of sampling."""
    chosen = [examples[i] for i in batch_indices(len(examples), stage.prompts_per_step, step, seed)]
    sampling = SamplingParams(
        temperature=stage.temperature,
        top_k=stage.top_k,
        top_p=stage.top_p,
        min_p=stage.min_p,
        max_new_tokens=max_completion_length,
        eos_token_id=tokenizer.eos_token_id,
        # Sampling streams must differ between steps of one run and between runs of neighbouring
        # seeds.
        seed=(seed << 32) + step,
    )
    rollouts = engine.generate([e.prompt_ids for e in chosen], stage.group_size, sampling)
    scored = rewards.score_rollouts(chosen, rollouts, tokenizer)
    device = rollouts.completion_ids.device
    total = torch.tensor(scored.total, device=device)
    mask = rollouts.completion_mask
    batch = Batch(
        rollouts.prompt_ids,
        rollouts.completion_ids,
        mask,
        losses.token_weights(mask, stage.reduction, max_completion_length=max_completion_length),
        advantages=losses.grpo_advantages(total, stage.group_size, scale=stage.scale_advantages),
        sampler_logprobs=rollouts.untruncated_logprobs,
    )
    if stage.updates_per_batch > 1:
        old = _frozen_logprobs(engine.model, batch, stage, shared_prefix)
        batch = replace(batch, old_logprobs=old)
    if reference is not None:
        ref = _frozen_logprobs(reference, batch, stage, shared_prefix)
        batch = replace(batch, ref_logprobs=ref)
    groups = total.view(-1, stage.group_size)
    lengths = mask.sum(-1).float()
    metrics = {
        "reward": total.mean(),
        "reward_std": groups.std(1).mean(),
        "zero_std_groups": (groups == groups[:, :1]).all(1).float().mean(),
        "completion_length": lengths.mean(),
        "truncated": torch.tensor([r == "length" for r in rollouts.finish_reason]).float().mean(),
        "entropy": -rollouts.untruncated_logprobs[mask].mean(),
        **{f"reward/{name}": torch.tensor(part).mean() for name, part in scored.parts.items()},
    }
    return batch, scored, {k: float(v) for k, v in metrics.items()}


@torch.no_grad()
def _frozen_logprobs(model: nn.Module, batch: Batch, stage: GRPO, shared_prefix: bool) -> Tensor:
    was_training = model.training
    model.eval()
    out = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
    for piece in batch.pieces(stage.micro_batch_size, shared_prefix=shared_prefix):
        part = batch.select(piece)
        logprobs = part.logprobs(model, stage.temperature, shared_prefix=shared_prefix)
        out[piece, : logprobs.shape[1]] = logprobs
    model.train(was_training)
    return out
