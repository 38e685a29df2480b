"""The policy from pairs of completions: the DPO family on data or own samples, and spin."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl import losses
from fastrl.train.algorithms.context import Context
from fastrl.train.algorithms.policy import reward_metrics, sampling_metrics
from fastrl.train.algorithms.ranking import Values, rankings
from fastrl.train.batches import Batch, pad_batch
from fastrl.train.rewards import Scored
from fastrl.train.stages import SPIN, Preference
from fastrl.train.update import Update

# Names of `fastrl.losses.dpo_loss`'s variants.
VARIANTS: dict[str, Any] = {
    "dpo": "sigmoid",
    "ipo": "ipo",
    "slic": "hinge",
    "robust_dpo": "robust",
    "exo": "exo",
}


def preference(context: Context, index: int) -> Iterator[Update]:
    """A step on pairs, chosen before rejected."""
    stage: Preference = context.stage
    metrics: dict[str, float] = {}
    scored = None
    if stage.pairs == "data":
        chosen = context.draw(context.setup.train, stage.batch_size, index)
        batch = rankings(context, chosen)
    else:
        batch, scored, metrics = own_pairs(context, index)
    if context.reference is not None:
        batch = replace(batch, ref_logprobs=reference_logprobs(context, batch))
    point = reference_point(context, batch) if stage.algorithm == "kto" else None
    yield Update(
        ("policy",),
        batch,
        lambda part: preference_loss(context, part, point),
        per="row",
        metrics=metrics,
        scored=scored,
    )


def own_pairs(context: Context, index: int) -> tuple[Batch, Scored | None, dict[str, float]]:
    """The best and the worst of each group of own samples; groups without a difference are left."""
    stage: Preference = context.stage
    examples = context.draw(context.setup.train, stage.batch_size, index)
    rollouts = context.sample(examples, index, stage.group_size)
    scored = context.score(examples, rollouts)
    assert scored is not None
    rewards = context.column(scored.total)
    groups = rewards.view(-1, stage.group_size)
    start = torch.arange(len(groups), device=groups.device) * stage.group_size
    rows = torch.stack([start + groups.argmax(1), start + groups.argmin(1)], 1)
    rows = rows[groups.amax(1) > groups.amin(1)].flatten()
    samples = Batch(
        rollouts.prompt_ids,
        rollouts.completion_ids,
        rollouts.completion_mask,
        torch.full_like(rewards, 2 / max(len(rows), 1)),
        2,
    )
    metrics = sampling_metrics(rollouts) | reward_metrics(rewards, stage.group_size)
    return samples.select(rows), scored, metrics | {"pairs": len(rows) / 2}


def reference_logprobs(context: Context, batch: Batch) -> Tensor:
    """Log-probs `[B, T]` under the reference."""
    assert context.reference is not None
    size, shared = context.stage.micro_batch_size, context.shared_prefix
    return batch.frozen_logprobs(context.reference, size, shared_prefix=shared)


def reference_point(context: Context, batch: Batch) -> Tensor:
    """KTO's z0: how far the policy moved from the reference on completions of other prompts."""
    ids, mask = (x.roll(-batch.unit, 0) for x in (batch.completion_ids, batch.completion_mask))
    mismatched = Batch(batch.prompt_ids, ids, mask, batch.weights)
    size, shared = context.stage.micro_batch_size, context.shared_prefix
    now = mismatched.frozen_logprobs(context.policy, size, shared_prefix=shared)
    before = reference_logprobs(context, mismatched)
    return losses.kto_reference_point(now.sum(-1), before.sum(-1))


def preference_loss(context: Context, batch: Batch, point: Tensor | None) -> Values:
    """Loss and metrics of pairs."""
    stage: Preference = context.stage
    mask = batch.completion_mask
    logprobs = batch.logprobs(context.policy, shared_prefix=context.shared_prefix).logprob
    average = stage.algorithm in ("ipo", "simpo", "orpo")

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = losses.sequence_logprobs(values, mask, average=average)
        return rows[::2], rows[1::2]

    chosen, rejected = sides(logprobs)
    weights = batch.weights[::2]
    if stage.algorithm == "simpo":
        return losses.simpo_loss(
            chosen,
            rejected,
            beta=stage.beta,
            gamma=stage.gamma,
            label_smoothing=stage.label_smoothing,
            weights=weights,
        )
    if stage.algorithm == "orpo":
        return losses.orpo_loss(
            chosen, rejected, beta=stage.beta, nll_coef=stage.nll_coef, weights=weights
        )
    ref_chosen, ref_rejected = sides(batch["ref_logprobs"])
    given = (chosen, rejected, ref_chosen, ref_rejected)
    if stage.algorithm == "kto":
        assert point is not None
        both = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
        desirable = torch.arange(len(both[0]), device=mask.device) < len(chosen)
        halves = torch.cat([weights, weights]) / 2
        return losses.kto_loss(*both, desirable, point, beta=stage.beta, weights=halves)
    if stage.algorithm == "rpo":
        return losses.rpo_loss(
            *given, mask[::2].sum(-1), beta=stage.beta, alpha=stage.nll_coef, weights=weights
        )
    return losses.dpo_loss(
        *given,
        beta=stage.beta,
        variant=VARIANTS[stage.algorithm],
        label_smoothing=stage.label_smoothing,
        weights=weights,
    )


def spin(context: Context, index: int) -> Iterator[Update]:
    """A step on demonstrations against samples of the policy as the iteration began."""
    stage: SPIN = context.stage
    examples = context.draw(context.setup.demonstrations, stage.batch_size, index)
    rollouts = context.sample(examples, index, model=context.reference)
    pairs = zip(
        (e.completion_ids or [] for e in examples), rollouts.completion_lists(), strict=True
    )
    batch = Batch(
        *pad_batch(
            [e.prompt_ids for e in examples for _ in range(2)],
            [c for pair in pairs for c in pair],
            context.setup.device,
        ),
        torch.full((2 * len(examples),), 1 / len(examples), device=context.setup.device),
        2,
    )
    batch = replace(batch, ref_logprobs=reference_logprobs(context, batch))

    def loss(part: Batch) -> Values:
        logprobs = part.logprobs(context.policy, shared_prefix=context.shared_prefix).logprob
        now, before = (
            losses.sequence_logprobs(x, part.completion_mask)
            for x in (logprobs, part["ref_logprobs"])
        )
        return losses.spin_loss(
            now[::2], now[1::2], before[::2], before[1::2], lam=stage.lam, weights=part.weights[::2]
        )

    yield Update(("policy",), batch, loss, per="row", metrics=sampling_metrics(rollouts))
