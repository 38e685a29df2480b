"""Policy gradients on the policy's own samples: the GRPO family."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastrl import losses
from fastrl.kernels import LogProbs
from fastrl.rollout import Rollouts
from fastrl.train.algorithms.context import Context
from fastrl.train.batches import Batch, concatenate
from fastrl.train.data import Example
from fastrl.train.rewards import Scored
from fastrl.train.stages import GRPO, PolicyGradient, Rewarded
from fastrl.train.update import Loss, Update

# The settings that each loss takes besides what all of them do.
SETTINGS = {
    "clip": ("ratio_level", "eps_low", "eps_high", "dual_clip"),
    "gspo": ("eps_low", "eps_high"),
    "cispo": ("max_ratio",),
    "sapo": ("tau_pos", "tau_neg"),
    "gmpo": ("eps_low", "eps_high"),
}


def grpo(context: Context, index: int) -> Iterator[Update]:
    """A step on groups of own samples, whose advantages come from one another."""
    batch, examples, scored, metrics = sample_groups(context, index)
    batch = compare(context, batch)
    batch = replace(batch, advantages=advantages(context, index, batch, examples))
    yield from policy_updates(context, batch, metrics, scored)


def sample_groups(
    context: Context, index: int
) -> tuple[Batch, list[Example], Scored | None, dict[str, float]]:
    """Groups of completions and their rewards, one example for each row, the metrics of sampling.

    With dynamic sampling groups whose rewards are all equal are left out, and more are sampled as
    long as a try is left and groups are missing (2503.14476).
    """
    stage: GRPO = context.stage
    tries = stage.dynamic_sampling
    wanted = stage.prompts_per_step * stage.group_size
    batch, examples, scored, metrics = sample_batch(context, index * tries)
    if tries == 1:
        return batch, examples, scored, metrics
    batches: list[Batch] = []
    kept: list[Example] = []
    for attempt in range(1, tries + 1):
        rows = torch.nonzero(losses.informative_groups(batch["rewards"], stage.group_size)).squeeze(
            -1
        )
        rows = rows[: wanted - len(kept)]
        batches.append(batch.select(rows))
        kept += [examples[i] for i in rows.tolist()]
        if len(kept) == wanted or attempt == tries:
            break
        batch, examples, _, _ = sample_batch(context, index * tries + attempt)
    metrics["sampled_batches"] = float(len(batches))
    joined = concatenate(batches)
    weights = context.token_weights(joined.completion_mask, stage.reduction)
    return replace(joined, weights=weights), kept, scored, metrics


def sample_batch(
    context: Context, index: int, source: list[Example] | None = None
) -> tuple[Batch, list[Example], Scored | None, dict[str, float]]:
    """One batch of own samples with rewards, one example for each row, the metrics of sampling.

    The prompts are of the source, or of all training examples.
    """
    stage: Rewarded = context.stage
    source = context.setup.train if source is None else source
    examples = context.draw(source, stage.prompts_per_step, index)
    rollouts = context.sample(examples, index, stage.group_size)
    scored = context.score(examples, rollouts)
    mask = rollouts.completion_mask
    batch = Batch(
        rollouts.prompt_ids,
        rollouts.completion_ids,
        mask,
        context.token_weights(mask, stage.reduction),
        sampler_logprobs=rollouts.untruncated_logprobs,
    )
    metrics = sampling_metrics(rollouts)
    if scored is not None:
        metrics |= {f"reward/{k}": sum(v) / len(v) for k, v in scored.parts.items()}
    rows = [e for e in examples for _ in range(stage.group_size)]
    if stage.reward_from is None:  # its rewards are made of what the batch holds
        return batch, rows, scored, metrics
    rewards, compared = context.rewards(stage.reward_from, batch, scored)
    if stage.overlong_buffer:
        limit = context.setup.config.max_completion_length
        rewards = rewards + losses.overlong_penalty(mask.sum(-1), limit, stage.overlong_buffer)
    metrics |= compared | reward_metrics(rewards, stage.group_size)
    return replace(batch, rewards=rewards), rows, scored, metrics


def sampling_metrics(rollouts: Rollouts) -> dict[str, float]:
    """What can be said of samples without their rewards."""
    mask = rollouts.completion_mask
    return {
        "completion_length": float(mask.sum(-1).float().mean()),
        "truncated": rollouts.finish_reason.count("length") / len(rollouts.finish_reason),
        "entropy": -float(rollouts.untruncated_logprobs[mask].mean()),
    }


def reward_metrics(rewards: Tensor, group_size: int) -> dict[str, float]:
    """Mean and spread of rewards `[B]`, and the share of groups that have none."""
    groups = rewards.view(-1, group_size)
    equal = (groups == groups[:, :1]).all(1).float()
    spread = groups.std(1).mean() if group_size > 1 else rewards.std(correction=0)
    metrics = {"reward": float(rewards.mean()), "reward_std": float(spread)}
    return metrics | ({"zero_std_groups": float(equal.mean())} if group_size > 1 else {})


def compare(context: Context, batch: Batch) -> Batch:
    """The batch with log-probs of the policy as it is now, and of the reference, where needed."""
    stage: PolicyGradient = context.stage

    def logprobs(model: nn.Module) -> Tensor:
        return batch.frozen_logprobs(
            model, stage.micro_batch_size, stage.temperature, shared_prefix=context.shared_prefix
        )

    in_reward = stage.kl_in == "reward" and stage.kl_coef > 0
    if stage.updates_per_batch > 1 or in_reward or stage.loss in ("clip_cov", "kl_cov"):
        batch = replace(batch, old_logprobs=logprobs(context.policy))
    if context.reference is not None:
        batch = replace(batch, ref_logprobs=logprobs(context.reference))
    return batch


def advantages(context: Context, index: int, batch: Batch, examples: list[Example]) -> Tensor:
    """Advantages `[B]`, or `[B, T]` where tokens have rewards of their own, of the stage's kind."""
    stage: GRPO = context.stage
    rewards, mask, size = batch["rewards"], batch.completion_mask, stage.group_size
    in_reward = stage.kl_coef if stage.kl_in == "reward" else 0.0
    if stage.advantage.startswith("reinforce++"):
        per_token = at_the_end(rewards, mask)
        if in_reward:
            per_token = losses.token_rewards(
                rewards, batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=in_reward
            )
        groups = size if stage.advantage == "reinforce++_baseline" else None
        return losses.reinforce_plus_plus_advantages(per_token, mask, group_size=groups)
    if in_reward:
        gap = torch.where(mask, batch["old_logprobs"] - batch["ref_logprobs"], 0.0)
        rewards = rewards - in_reward * gap.sum(-1)
    if stage.advantage == "rloo":
        return losses.rloo_advantages(rewards, size)
    if stage.advantage == "maxrl":
        return losses.maxrl_advantages(rewards, size)
    if stage.advantage == "opo":
        return losses.opo_advantages(rewards, mask.sum(-1), size)
    if stage.advantage == "remax":
        greedy = context.sample(examples[::size], index, greedy=True)
        scored = context.score(examples[::size], greedy)
        prompts = Batch(greedy.prompt_ids, greedy.completion_ids, greedy.completion_mask, mask)
        baseline, _ = context.rewards(stage.reward, replace(prompts, weights=rewards), scored)
        return losses.remax_advantages(rewards, baseline, size)
    return losses.grpo_advantages(rewards, size, scale=stage.scale_advantages)


def at_the_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards `[B]` as rewards of tokens `[B, T]`: all of it at the last token."""
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(last, rewards.unsqueeze(-1), 0.0)


def policy_updates(
    context: Context,
    batch: Batch,
    metrics: dict[str, float],
    scored: Scored | None,
    joint: Loss | None = None,
) -> Iterator[Update]:
    """Updates of the policy on a batch that has its advantages; by a joint loss with its critic."""
    stage: PolicyGradient = context.stage
    # Rows that cannot contribute are left out: their gradient is exactly zero, while the weights of
    # the others still count them.
    rows = batch.completion_mask.any(-1)
    silent = stage.entropy_coef == 0 and not (stage.kl_coef and stage.kl_in == "loss")
    if silent and joint is None:
        some = batch["advantages"] != 0
        rows = rows & (some if some.dim() == 1 else some.any(-1))
    batch = batch.select(torch.nonzero(rows).squeeze(-1))
    for update in range(stage.updates_per_batch):
        part = replace(batch, selected=selected(context, batch, update))
        first = update == 0
        yield Update(
            ("policy",) if joint is None else ("policy", "critic"),
            part,
            joint or (lambda part: policy_loss(context, part, None)),
            metrics=metrics if first else {},
            scored=scored if first else None,
        )


def selected(context: Context, batch: Batch, update: int) -> Tensor | None:
    """The tokens that clip_cov and kl_cov pick from the whole batch."""
    stage: PolicyGradient = context.stage
    if stage.loss not in ("clip_cov", "kl_cov"):
        return None
    old, advantages = batch["old_logprobs"], batch["advantages"]
    now = old
    if update:
        now = batch.frozen_logprobs(
            context.policy,
            stage.micro_batch_size,
            stage.temperature,
            shared_prefix=context.shared_prefix,
        )
    mask, fraction = batch.completion_mask, stage.cov_fraction
    if stage.loss == "kl_cov":
        return losses.kl_cov_mask(now, advantages, mask, fraction=fraction)
    return losses.clip_cov_mask(
        now,
        old,
        advantages,
        mask,
        fraction=fraction,
        eps_low=stage.eps_low,
        eps_high=stage.eps_high,
    )


def policy_loss(
    context: Context, batch: Batch, out: LogProbs | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of rollouts, with the mismatch between sampler and trainer.

    out holds the policy's log-probs, which are computed where it is None.
    """
    stage: PolicyGradient = context.stage
    if out is None:
        out = batch.logprobs(
            context.policy,
            stage.temperature,
            shared_prefix=context.shared_prefix,
            entropy=stage.entropy_coef > 0,
        )
    mask, weights, logprobs = batch.completion_mask, batch.weights, out.logprob
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    importance = None
    if stage.mismatch is not None:
        importance = losses.mismatch_weights(
            old,
            batch["sampler_logprobs"],
            mask,
            stage.mismatch,
            low=stage.mismatch_low,
            high=stage.mismatch_high,
        )
    given = (logprobs, old, batch["advantages"], mask, weights)
    if stage.loss in SETTINGS:
        settings = {name: getattr(stage, name) for name in SETTINGS[stage.loss]}
        function = losses.POLICY_LOSSES[stage.loss]
        value, metrics = function(*given, importance_weights=importance, **settings)
    elif stage.loss == "clip_cov":
        value, metrics = losses.clip_cov_loss(
            *given,
            importance_weights=importance,
            selected=batch["selected"],
            eps_low=stage.eps_low,
            eps_high=stage.eps_high,
        )
    else:
        value, metrics = losses.kl_cov_loss(
            *given,
            importance_weights=importance,
            selected=batch["selected"],
            kl_coef=stage.kl_cov_coef,
        )
    if batch.ref_logprobs is not None:
        coef = stage.kl_coef if stage.kl_in == "loss" else 0.0
        penalty, figures = losses.kl_loss(
            logprobs, batch.ref_logprobs, mask, weights, coef=coef, estimator=stage.kl_estimator
        )
        value, metrics = value + penalty, metrics | figures
    if out.entropy is not None:
        bonus, figures = losses.entropy_loss(out.entropy, mask, weights, coef=stage.entropy_coef)
        value, metrics = value + bonus, metrics | {"entropy_exact": figures["entropy"]}
    return value, metrics | losses.mismatch_metrics(old, batch["sampler_logprobs"], mask)
