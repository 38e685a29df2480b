"""One optimizer step: gradients a micro-batch at a time, clipped, checked, applied."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fastrl.train.batches import Batch
from fastrl.train.optimizer import Optimizer
from fastrl.train.rewards import Scored

Per = Literal["token", "row", "batch"]
Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Update:
    """What an algorithm asks for: a loss on a batch, and the networks that it trains.

    The loss is a sum over rows whose weights count the whole batch, so that micro-batches add up.
    Its metrics are means over tokens or rows (`per`), or sums that add up to the batch's.
    `metrics` and `scored` are logged beside them; `prefix` goes before the names of its own.
    """

    networks: tuple[str, ...]
    batch: Batch
    loss: Loss
    per: Per = "token"
    prefix: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    scored: Scored | None = None


def accumulate(
    batch: Batch,
    loss: Loss,
    micro_batch_size: int,
    optimizers: Sequence[Optimizer],
    *,
    shared_prefix: bool = False,
    per: Per = "token",
) -> dict[str, float]:
    """Gradients of one optimizer step, a micro-batch at a time.

    Returns the loss and metrics of the whole batch.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()

    def count(part: Batch) -> float:
        if per == "batch":
            return 1.0
        return float(part.completion_mask.sum()) if per == "token" else len(part.prompt_ids)

    metrics: dict[str, float] = {}
    total, whole = 0.0, count(batch)
    for part in batch.micro_batches(micro_batch_size, shared_prefix=shared_prefix):
        value, figures = loss(part)
        value.backward()
        for optimizer in optimizers:
            optimizer.collect()
        total += float(value.detach())
        share = count(part) / max(whole, 1.0)
        for name, figure in figures.items():
            if name.endswith("_max"):
                metrics[name] = max(metrics.get(name, -math.inf), float(figure))
            else:
                metrics[name] = metrics.get(name, 0.0) + share * float(figure)
    return {"loss": total, **metrics}


def apply(
    update: Update,
    optimizers: Mapping[str, Optimizer],
    micro_batch_size: int,
    index: int,
    *,
    shared_prefix: bool,
) -> tuple[dict[str, float], bool]:
    """Take the step that an update asks for; returns its metrics and whether it was finite.

    A step whose loss or gradient is not finite changes nothing.
    """
    trained = [optimizers[name] for name in update.networks]
    metrics = accumulate(
        update.batch,
        update.loss,
        micro_batch_size,
        trained,
        shared_prefix=shared_prefix,
        per=update.per,
    )
    norms = [optimizer.clip() for optimizer in trained]
    metrics["grad_norm"] = math.hypot(*norms)
    finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if finite:
        for optimizer in trained:
            metrics["lr"] = optimizer.step(index)
    return {update.prefix + name: value for name, value in metrics.items()}, finite


def merge(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates of a step that have it; of `_max`, the largest."""
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    values = {name: [m[name] for m in steps if name in m] for name in names}
    return {
        name: max(v) if name.endswith("_max") else sum(v) / len(v) for name, v in values.items()
    }
