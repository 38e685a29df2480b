"""Reward models from ranked completions."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastrl import losses
from fastrl.train.algorithms.context import Context
from fastrl.train.batches import Batch, pad_batch
from fastrl.train.data import Example
from fastrl.train.stages import Reward
from fastrl.train.update import Update

Values = tuple[Tensor, dict[str, Tensor]]


def reward(context: Context, index: int) -> Iterator[Update]:
    """A step on rankings."""
    stage: Reward = context.stage
    chosen = context.draw(context.setup.train, stage.batch_size, index)
    batch = rankings(context, chosen, stage.margin)
    yield Update((stage.network,), batch, lambda part: ranking_loss(context, part), per="row")


def rankings(context: Context, examples: Sequence[Example], margin: str | None = None) -> Batch:
    """Ranked completions as a batch, best first; each ranking weighs the same."""
    ranked = [e.ranked_ids or [] for e in examples]
    unit = len(ranked[0])
    prompts = [e.prompt_ids for e in examples for _ in range(unit)]
    prompts, ids, mask = pad_batch(prompts, [c for r in ranked for c in r], context.setup.device)
    weights = torch.full((len(prompts),), 1 / len(examples), device=ids.device)
    margins = None
    if margin is not None:
        margins = context.column([e.columns[margin] for e in examples]).repeat_interleave(unit)
    return Batch(prompts, ids, mask, weights, unit, margins=margins)


def ranking_loss(context: Context, batch: Batch) -> Values:
    """Loss and metrics of rankings."""
    stage: Reward = context.stage
    scores = context.scorer(stage.network).heads(batch)
    ranked = scores.view(-1, batch.unit, scores.shape[-1])
    return over_heads(ranked, lambda head: _loss(stage, batch, head))


def over_heads(scores: Tensor, loss: Callable[[Tensor], Values]) -> Values:
    """The mean over heads, the last dimension of scores, of a loss and its metrics."""
    values, figures = zip(*(loss(head) for head in scores.unbind(-1)), strict=True)
    metrics = {name: torch.stack([f[name] for f in figures]).mean() for name in figures[0]}
    return torch.stack(values).mean(), metrics


def _loss(stage: Reward, batch: Batch, scores: Tensor) -> Values:
    weights = batch.weights[:: batch.unit]
    if stage.loss == "plackett_luce":
        return losses.plackett_luce_loss(scores, weights=weights)
    better, worse = scores[:, 0], scores[:, -1]
    if stage.loss == "bradley_terry":
        return losses.bradley_terry_loss(
            better,
            worse,
            margin=None if batch.margins is None else batch.margins[:: batch.unit],
            centering=stage.centering,
            label_smoothing=stage.label_smoothing,
            weights=weights,
        )
    labels = torch.cat([torch.ones_like(better), torch.zeros_like(worse)])
    value, metrics = losses.classification_loss(
        torch.cat([better, worse]), labels, weights=torch.cat([weights, weights]) / 2
    )
    return value, metrics | {"accuracy": (better > worse).float().mean()}
