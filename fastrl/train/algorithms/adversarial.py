"""Rewards that tell demonstrations from samples: gail, airl and fairl in turns, afd once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastrl import losses
from fastrl.models import Level
from fastrl.train.algorithms.context import Context
from fastrl.train.algorithms.policy import (
    advantages,
    compare,
    policy_updates,
    reward_metrics,
    sample_batch,
)
from fastrl.train.algorithms.ranking import Values, over_heads
from fastrl.train.batches import Batch, concatenate
from fastrl.train.data import Example
from fastrl.train.stages import Adversarial, AfD
from fastrl.train.update import Update


def adversarial(context: Context, index: int) -> Iterator[Update]:
    """A step of the discriminator on demonstrations and samples, then one of the policy."""
    stage: Adversarial = context.stage
    setup = context.setup
    paired = stage.prompts == "demonstrations"
    source = setup.demonstrations if paired else None
    batch, examples, scored, metrics = sample_batch(context, index, source)
    warming = index < stage.discriminator_warmup
    for update in range(stage.discriminator_updates):
        chosen = examples[:: stage.group_size]
        if not paired:
            chosen = context.draw(
                setup.demonstrations,
                stage.demonstrations_per_step,
                index * stage.discriminator_updates + update,
                "demonstrations",
            )
        demonstrations = context.demonstrations(chosen, "dapo")
        step = discrimination(
            context, "discriminator", demonstrations, batch, stage.level, "discriminator/"
        )
        yield replace(step, metrics=metrics, scored=scored) if warming else step
    if warming:
        return
    logits = context.learned_rewards("discriminator", batch, stage.level)
    rewards = losses.imitation_rewards(logits, stage.reward, max_logit=stage.max_logit)
    mask = batch.completion_mask
    total = rewards
    if stage.level == "token":
        rewards = torch.where(mask, rewards, 0.0)
        total = rewards.sum(-1)
    batch = compare(context, replace(batch, rewards=total))
    if stage.level == "token":
        whitened = losses.reinforce_plus_plus_advantages(
            rewards,
            mask,
            group_size=stage.group_size if stage.advantage == "grpo" else None,
        )
        batch = replace(batch, advantages=whitened)
    else:
        batch = replace(batch, advantages=advantages(context, index, batch, examples))
    metrics |= reward_metrics(total, stage.group_size) | context.compared(total, scored)
    yield from policy_updates(context, batch, metrics, scored)


def afd(context: Context, index: int) -> Iterator[Update]:
    """A step that teaches a reward model what is to be imitated, and what is not."""
    stage: AfD = context.stage
    setup = context.setup
    if stage.data == "sft_vs_initial":
        examples = context.draw(setup.train, stage.prompts_per_step, index)
        good = _samples(context, examples, 2 * index, None)
    else:
        examples = context.draw(setup.demonstrations, stage.prompts_per_step, index)
        good = context.demonstrations(examples, "dapo")
    model = None if stage.data == "demos_vs_sft" else context.earlier
    bad = _samples(context, examples, 2 * index + 1, model)
    yield discrimination(context, stage.network, good, bad, "sequence")


def _samples(
    context: Context, examples: Sequence[Example], index: int, model: nn.Module | None
) -> Batch:
    rollouts = context.sample(examples, index, context.stage.group_size, model=model)
    mask = rollouts.completion_mask
    return Batch(rollouts.prompt_ids, rollouts.completion_ids, mask, mask.float())


def discrimination(
    context: Context, name: str, good: Batch, bad: Batch, level: Level, prefix: str = ""
) -> Update:
    """An update of a discriminator: each side weighs one half, by rows or by tokens."""
    scorer = context.scorer(name)

    def side(batch: Batch, label: bool) -> Batch:
        mask = batch.completion_mask
        rows = torch.ones(len(mask), device=mask.device)
        weights = (
            losses.token_weights(mask, "dapo") if level == "token" else rows / max(len(mask), 1)
        )
        return Batch(*batch.completions, weights, labels=rows.bool() & label)

    def loss(part: Batch) -> Values:
        demos, mask, weights = part["labels"], part.completion_mask, part.weights
        masks = {"demo_mask": mask[demos], "policy_mask": mask[~demos]} if level == "token" else {}

        def head(logits: Tensor) -> Values:
            value, _ = losses.discriminator_loss(
                logits[demos], logits[~demos], weights[demos], weights[~demos], **masks
            )
            logits = logits.detach()
            right = {"demo": logits[demos] > 0, "policy": logits[~demos] < 0}
            metrics = {}
            for name, rows in (("demo", demos), ("policy", ~demos)):
                metrics[f"{name}_logit"] = (weights[rows] * logits[rows]).sum()
                metrics[f"{name}_accuracy"] = (weights[rows] * right[name]).sum()
            return value, metrics

        return over_heads(scorer.heads(part, level), head)

    batch = concatenate([side(good, True), side(bad, False)])
    if scorer.shared_prefix:
        batch = batch.by_prompt()
    return Update((name,), batch, loss, per="batch", prefix=prefix)
