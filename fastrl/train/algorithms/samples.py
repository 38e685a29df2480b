"""Likelihood-type losses on the policy's own samples: raft and distillation."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastrl import losses
from fastrl.models import completion_logprobs, completion_states, lm_head
from fastrl.models.head import as_forward
from fastrl.train.algorithms.context import Context
from fastrl.train.algorithms.policy import reward_metrics, sample_batch, sampling_metrics
from fastrl.train.algorithms.ranking import Values
from fastrl.train.batches import Batch
from fastrl.train.stages import RAFT, Distillation
from fastrl.train.update import Update


def raft(context: Context, index: int) -> Iterator[Update]:
    """A step on the best completion of each group."""
    stage: RAFT = context.stage
    batch, _, scored, metrics = sample_batch(context, index)
    groups = batch["rewards"].view(-1, stage.group_size)
    start = torch.arange(len(groups), device=groups.device) * stage.group_size
    best = batch.select(start + groups.argmax(1))
    best = replace(best, weights=context.token_weights(best.completion_mask, stage.reduction))
    metrics["best_reward"] = float(groups.amax(1).mean())

    def loss(part: Batch) -> Values:
        out = completion_logprobs(context.policy, *part.completions)
        return losses.sft_loss(out.logprob, part.completion_mask, part.weights)

    yield Update(("policy",), best, loss, metrics=metrics, scored=scored)


def distillation(context: Context, index: int) -> Iterator[Update]:
    """A step towards a teacher's distribution on own samples."""
    stage: Distillation = context.stage
    examples = context.draw(context.setup.train, stage.prompts_per_step, index)
    rollouts = context.sample(examples, index, stage.group_size)
    mask = rollouts.completion_mask
    weights = context.token_weights(mask, stage.reduction)
    batch = Batch(rollouts.prompt_ids, rollouts.completion_ids, mask, weights)
    metrics = sampling_metrics(rollouts)
    scored = context.score(examples, rollouts)
    if scored is not None:
        metrics |= reward_metrics(context.column(scored.total), stage.group_size)
    teacher = context.reference
    assert teacher is not None

    yield Update(
        ("policy",),
        batch,
        lambda part: _loss(context.policy, teacher, stage, part),
        metrics=metrics,
        scored=scored,
    )


# Both lm-heads are read inside their models' forwards: FSDP2 gathers them for no longer.
@as_forward
def _loss(policy: nn.Module, teacher: nn.Module, stage: Distillation, batch: Batch) -> Values:
    student = _states(policy, batch)

    @as_forward
    def compare(teacher: nn.Module) -> Values:
        with torch.no_grad():
            states = _states(teacher, batch)
        return losses.linear_distillation_loss(
            *student,
            *states,
            batch.weights[batch.completion_mask],
            beta=stage.beta,
            temperature=stage.temperature,
        )

    return compare(teacher)


def _states(model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
    """Last hidden states `[N, H]` that predict the completions' tokens, and the lm-head."""
    head = lm_head(model)
    hidden = completion_states(model, *batch.completions)[batch.completion_mask]
    return hidden, {"weight": head.weight, **head.arguments()}
