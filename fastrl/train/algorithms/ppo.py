"""PPO: policy gradients whose advantages come from a critic."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastrl import losses
from fastrl.models import logprobs_and_values
from fastrl.train.algorithms.context import Context
from fastrl.train.algorithms.policy import (
    at_the_end,
    compare,
    policy_loss,
    policy_updates,
    sample_batch,
)
from fastrl.train.algorithms.ranking import Values
from fastrl.train.batches import Batch
from fastrl.train.scoring import frozen_scores, mean
from fastrl.train.stages import PPO
from fastrl.train.update import Update


def ppo(context: Context, index: int) -> Iterator[Update]:
    """A step on own samples: the critic's updates and the policy's, in turns."""
    stage: PPO = context.stage
    batch, _, scored, metrics = sample_batch(context, index)
    batch = compare(context, batch)
    mask, rewards = batch.completion_mask, batch["rewards"]
    per_token = at_the_end(rewards, mask)
    if stage.kl_in == "reward" and stage.kl_coef:
        per_token = losses.token_rewards(
            rewards, batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=stage.kl_coef
        )
    values = frozen_values(context, batch)
    advantages, returns = losses.gae_advantages(
        per_token,
        values,
        mask,
        gamma=stage.gamma,
        lam=stage.lam,
        normalize=stage.normalize_advantages,
    )
    batch = replace(batch, advantages=advantages, returns=returns, old_values=values)
    critic_update = Update(
        ("critic",), batch, lambda part: critic_loss(context, part), prefix="critic/"
    )
    if index < stage.critic_warmup:
        for _ in range(stage.updates_per_batch):
            yield replace(critic_update, metrics=metrics, scored=scored)
    elif stage.critic == "head":
        yield from policy_updates(
            context, batch, metrics, scored, lambda part: joint_loss(context, part)
        )
    else:
        for update in policy_updates(context, batch, metrics, scored):
            yield critic_update
            yield update


def frozen_values(context: Context, batch: Batch) -> Tensor:
    """The critic's values `[B, T]` before each token, without gradients."""
    return frozen_scores(context.scorer("critic"), batch, context.stage.micro_batch_size, "state")


def critic_loss(context: Context, batch: Batch) -> Values:
    """Loss and metrics of the critic alone; through a head no gradient reaches the policy."""
    return _value_loss(context.stage, batch, mean(context.scorer("critic").heads(batch, "state")))


def joint_loss(context: Context, batch: Batch) -> Values:
    """Loss and metrics of the policy and of the head on its hidden states."""
    stage: PPO = context.stage
    critic: Any = context.setup.networks["critic"]
    out, values = logprobs_and_values(
        context.policy,
        critic,
        *batch.completions,
        temperature=stage.temperature,
        entropy=stage.entropy_coef > 0,
        inplace_backward=True,
    )
    value, metrics = policy_loss(context, batch, out)
    missed, figures = _value_loss(stage, batch, values)
    metrics |= {f"critic/{name}": figure for name, figure in figures.items()}
    return value + stage.value_coef * missed, metrics


def _value_loss(stage: PPO, batch: Batch, values: Tensor) -> Values:
    return losses.value_loss(
        values,
        batch["old_values"],
        batch["returns"],
        batch.completion_mask,
        batch.weights,
        clip=stage.value_clip,
    )
