"""PPO: policy gradients whose advantages come from a critic."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from fastrl import losses
from fastrl.train.algorithms.context import Context
from fastrl.train.algorithms.policy import at_the_end, compare, policy_updates, sample_batch
from fastrl.train.batches import Batch
from fastrl.train.stages import PPO
from fastrl.train.update import Update


def ppo(context: Context, index: int) -> Iterator[Update]:
    """A step on own samples: the critic's updates and the policy's, in turns."""
    stage: PPO = context.stage
    critic = context.setup.networks["critic"]
    batch, _, scored, metrics = sample_batch(context, index)
    batch = compare(context, batch)
    mask, rewards = batch.completion_mask, batch["rewards"]
    per_token = at_the_end(rewards, mask)
    if stage.kl_in == "reward" and stage.kl_coef:
        per_token = losses.token_rewards(
            rewards, batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=stage.kl_coef
        )
    values = batch.frozen_scores(critic, stage.micro_batch_size, "state")
    advantages, returns = losses.gae_advantages(
        per_token,
        values,
        mask,
        gamma=stage.gamma,
        lam=stage.lam,
        normalize=stage.normalize_advantages,
    )
    batch = replace(batch, advantages=advantages, returns=returns, old_values=values)

    def critic_loss(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.value_loss(
            part.scores(critic, "state"),
            part["old_values"],
            part["returns"],
            part.completion_mask,
            part.weights,
            clip=stage.value_clip,
        )

    critic_update = Update(("critic",), batch, critic_loss, prefix="critic/")
    if index < stage.critic_warmup:
        for _ in range(stage.updates_per_batch):
            yield replace(critic_update, metrics=metrics, scored=scored)
        return
    for update in policy_updates(context, batch, metrics, scored):
        yield critic_update
        yield update
