"""Held-out figures."""

from typing import Any

import torch

from fastrl.train import parallel
from fastrl.train.algorithms import Context, demonstration_loss, ranking_loss, rankings
from fastrl.train.rewards import Scored
from fastrl.train.stages import SFT, Reward


@torch.no_grad()
def evaluate(context: Context) -> tuple[dict[str, float], Scored | None]:
    """Held-out figures of what a stage trains, and the completions that they come from.

    Of the policy reward and accuracy of greedy completions, and for sft the NLL; accuracy is the
    share of completions that the first reward function gives at least 1, and left out where all
    rewards are models' scores. Of a reward model the share of held-out rankings whose best
    completion it prefers to the worst.
    """
    setup, stage = context.setup, context.stage
    metrics: dict[str, float] = {}
    scored = None
    if not setup.held_out:
        return metrics, scored
    for network in setup.networks.values():
        network.eval()
    if isinstance(stage, SFT) and all(e.completion_ids for e in setup.held_out):
        metrics["eval/nll"] = _nll(context)
    if isinstance(stage, Reward) and all(e.ranked_ids for e in setup.held_out):
        metrics["eval/pair_accuracy"] = _pair_accuracy(context)
    if stage.trains_policy and setup.rewards.functions:
        rollouts = context.sample(setup.held_out, 0, greedy=True, in_floats=True)
        scored = context.score(setup.held_out, rollouts)
        assert scored is not None
        metrics["eval/reward"] = sum(scored.total) / len(scored.total)
        if setup.rewards.verifier is not None:
            verdicts = scored.parts[setup.rewards.verifier]
            metrics["eval/accuracy"] = sum(s >= 1 - 1e-6 for s in verdicts) / len(verdicts)
    for network in setup.networks.values():
        network.train()
    return metrics, scored


def _nll(context: Context) -> float:
    stage: Any = context.stage
    batch = context.demonstrations(context.setup.held_out, stage.reduction)
    nll = sum(
        float(demonstration_loss(context.policy, stage, part)[1]["nll"])
        * int(part.completion_mask.sum())
        * counts
        for part, counts in batch.micro_batches(stage.micro_batch_size)
    )
    return sum(parallel.gather(nll)) / int(batch.completion_mask.sum())


def _pair_accuracy(context: Context) -> float:
    stage: Reward = context.stage
    held_out = context.setup.held_out
    margin = stage.margin if all(stage.margin in e.columns for e in held_out) else None
    batch = rankings(context, held_out, margin)
    right = sum(
        float(ranking_loss(context, part)[1]["accuracy"]) * len(part.prompt_ids) * counts
        for part, counts in batch.micro_batches(
            stage.micro_batch_size, shared_prefix=context.shared_prefix
        )
    )
    return sum(parallel.gather(right)) / len(batch.prompt_ids)
