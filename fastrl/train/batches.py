"""What one optimizer step learns from: prompts, completions, and figures for each of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.kernels import LogProbs
from fastrl.models import (
    completion_logprobs,
    group_logprobs,
    group_rows,
)
from fastrl.train import parallel


@dataclass(frozen=True)
class Batch:
    """Prompts, completions `[B, T]` and the loss weight of each token, or of each row.

    The rest only where an algorithm needs it. `unit` neighbouring rows belong together (a pair, a
    ranking) and stay in one micro-batch.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    completion_mask: Tensor
    weights: Tensor
    unit: int = 1
    rewards: Tensor | None = None  # [B]
    advantages: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    selected: Tensor | None = None  # tokens that a covariance marks
    old_values: Tensor | None = None
    returns: Tensor | None = None
    labels: Tensor | None = None  # [B] bool: demonstration, or desirable
    margins: Tensor | None = None  # [B]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that the batch has to have by now."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"the batch has no {name}")
        return value

    def select(self, rows: Tensor) -> "Batch":
        """The given rows, without the padding that none of them needs."""
        steps = int(self.completion_mask[rows].sum(-1).max()) if len(rows) else 0
        tensors: dict[str, Any] = {
            name: value[rows] if value.dim() == 1 else value[rows, :steps]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, prompt_ids=[self.prompt_ids[i] for i in rows.tolist()], **tensors)

    def by_prompt(self) -> "Batch":
        """The same rows, those of equal prompts next to each other."""
        first: dict[tuple[int, ...], int] = {}
        of_prompt = [first.setdefault(tuple(p), row) for row, p in enumerate(self.prompt_ids)]
        order = sorted(range(len(of_prompt)), key=of_prompt.__getitem__)
        return self.select(torch.tensor(order, device=self.completion_mask.device))

    def micro_batches(
        self, size: int, *, shared_prefix: bool = False
    ) -> Iterator[tuple["Batch", bool]]:
        """This process's pieces of at most `size` rows, and whether they count; see `share`.

        Their weights stay those of the whole batch.
        """
        pieces = parallel.share(self.pieces(size, shared_prefix=shared_prefix))
        return ((self.select(piece), counts) for piece, counts in pieces)

    def pieces(self, size: int, *, shared_prefix: bool) -> list[Tensor]:
        """The rows of each micro-batch: of similar length or, with shared_prefix, whole groups.

        A group is split only where it has more than `size` rows, a unit never. Where there are
        several processes, there is a piece for each, if the rows are enough.
        """
        device = self.completion_mask.device
        share = -(-len(self.prompt_ids) // (self.unit * parallel.size()))
        size = max(min(size // self.unit, share), 1) * self.unit
        if shared_prefix:
            parts: list[list[int]] = []
            for group in group_rows(self.prompt_ids):
                for i in range(0, len(group), size):
                    some = group[i : i + size]
                    if parts and len(parts[-1]) + len(some) <= size:
                        parts[-1] += some
                    else:
                        parts.append(some)
            return [torch.tensor(part, device=device) for part in parts]
        lengths = self.completion_mask.sum(-1) + torch.tensor(
            [len(p) for p in self.prompt_ids], device=device, dtype=torch.int64
        )
        units = torch.argsort(lengths.view(-1, self.unit).amax(-1), stable=True)
        order = units.unsqueeze(-1) * self.unit + torch.arange(self.unit, device=device)
        return [piece for piece in order.flatten().split(size) if len(piece)]

    @property
    def completions(self) -> tuple[list[list[int]], Tensor, Tensor]:
        """Prompts, completion ids and mask, as the models' functions take them."""
        return self.prompt_ids, self.completion_ids, self.completion_mask

    def logprobs(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        *,
        shared_prefix: bool,
        entropy: bool = False,
    ) -> LogProbs:
        """Log-probs `[B, T]` of the completions; with shared_prefix from prompts computed once.

        For one backward alone.
        """
        options: dict[str, Any] = {"temperature": temperature, "entropy": entropy}
        options["inplace_backward"] = True
        if shared_prefix:
            return group_logprobs(model, self.completions, **options)
        return completion_logprobs(model, *self.completions, **options)

    def frozen_logprobs(
        self, model: nn.Module, size: int, temperature: float = 1.0, *, shared_prefix: bool
    ) -> Tensor:
        """`logprobs` without gradients or dropout, at most `size` rows at a time."""
        return self.frozen_figures(
            model,
            size,
            lambda part: part.logprobs(model, temperature, shared_prefix=shared_prefix).logprob,
            shared_prefix=shared_prefix,
        )

    def frozen_figures(
        self,
        model: nn.Module | None,
        size: int,
        compute: Callable[["Batch"], Tensor],
        *,
        per_row: bool = False,
        shared_prefix: bool = False,
    ) -> Tensor:
        """Figures `[B, T]`, or `[B]` if per_row, of a model, if any, without gradients or dropout.

        compute makes them of at most `size` rows at a time; processes share the work.
        """
        shape = self.completion_ids.shape[: 1 if per_row else 2]
        out = torch.zeros(shape, device=self.completion_ids.device)
        with frozen(model):
            for piece, counts in parallel.share(self.pieces(size, shared_prefix=shared_prefix)):
                figures = compute(self.select(piece))
                if counts:
                    at: Any = (piece, *map(slice, figures.shape[1:]))
                    out[at] = figures
        parallel.add_up([out])
        return out


@contextmanager
def frozen(model: nn.Module | None) -> Iterator[None]:
    """Without gradients or dropout."""
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    with torch.no_grad():
        yield
    if model is not None:
        model.train(was_training)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches of the same kind, one after another."""
    if len(batches) == 1:
        return batches[0]
    steps = max(b.completion_ids.shape[1] for b in batches)
    tensors: dict[str, Any] = {}
    for name, value in vars(batches[0]).items():
        if isinstance(value, Tensor):
            parts = [getattr(b, name) for b in batches]
            if value.dim() > 1:
                parts = [nn.functional.pad(x, (0, steps - x.shape[1])) for x in parts]
            tensors[name] = torch.cat(parts)
    return replace(batches[0], prompt_ids=[p for b in batches for p in b.prompt_ids], **tensors)


def pad_batch(
    prompt_ids: list[list[int]], completions: Sequence[Sequence[int]], device: torch.device
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts, completion ids and mask `[B, T]`, right-padded with 0, of completions as lists."""
    rows = [torch.tensor(c, dtype=torch.int64) for c in completions]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    return prompt_ids, ids, torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(-1)
