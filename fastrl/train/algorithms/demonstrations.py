"""Learning from demonstrations alone: sft and iqlearn."""

from collections.abc import Iterator

from torch import Tensor, nn

from fastrl import losses
from fastrl.models import completion_logprobs
from fastrl.train.algorithms.context import Context
from fastrl.train.batches import Batch
from fastrl.train.stages import SFT, IQLearn
from fastrl.train.update import Update


def sft(context: Context, index: int) -> Iterator[Update]:
    """A step on demonstrations."""
    stage: SFT = context.stage
    setup = context.setup
    rows = setup.train if stage.crowd else setup.demonstrations
    chosen = context.draw(rows, stage.batch_size, index)
    batch = context.demonstrations(chosen, stage.reduction)
    yield Update(("policy",), batch, lambda part: demonstration_loss(context.policy, stage, part))


def demonstration_loss(
    model: nn.Module, stage: SFT, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of demonstrations."""
    out = completion_logprobs(model, *batch.completions)
    if isinstance(stage, IQLearn):
        return losses.iqlearn_loss(
            out.logprob,
            out.lse,
            batch.completion_mask,
            batch.weights,
            alpha=stage.alpha,
            gamma=stage.gamma,
        )
    return losses.sft_loss(out.logprob, batch.completion_mask, batch.weights)
