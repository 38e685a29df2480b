"""One optimizer step: gradients a micro-batch at a time, clipped, checked, applied."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fastrl.train import parallel
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
    """Gradients of one optimizer step, a micro-batch at a time; each process sees to its share.

    Returns the loss and metrics of the whole batch. The gradients of a replicated model are this
    process's summands until `Optimizer.clip`.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()

    def count(part: Batch) -> float:
        if per == "batch":
            return 1.0
        return float(part.completion_mask.sum()) if per == "token" else len(part.prompt_ids)

    metrics: dict[str, float] = {}
    total, whole = 0.0, count(batch)
    with parallel.own_noise():
        for part, counts in batch.micro_batches(micro_batch_size, shared_prefix=shared_prefix):
            value, figures = loss(part)
            (value if counts else value * 0.0).backward()
            for optimizer in optimizers:
                optimizer.collect()
            if not counts:
                continue
            total += float(value.detach())
            share = count(part) / max(whole, 1.0)
            for name, figure in figures.items():
                if name.endswith("_max"):
                    metrics[name] = max(metrics.get(name, -math.inf), float(figure))
                else:
                    metrics[name] = metrics.get(name, 0.0) + share * float(figure)
    shares = parallel.gather({"loss": total, **metrics})
    return {name: _combine(name, shares, sum) for name in _names(shares)}


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
    return {name: _combine(name, steps, lambda v: sum(v) / len(v)) for name in _names(steps)}


def _names(parts: Sequence[Mapping[str, float]]) -> Iterable[str]:
    return dict.fromkeys(name for metrics in parts for name in metrics)


def _combine(
    name: str, parts: Sequence[Mapping[str, float]], how: Callable[[list[float]], float]
) -> float:
    values = [metrics[name] for metrics in parts if name in metrics]
    return max(values) if name.endswith("_max") else how(values)
