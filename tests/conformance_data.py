"""Random tensors for the conformance cases, and the measure of agreement."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl import losses


@dataclass
class Rollouts:
    """Six completions of up to seven tokens; the leaves are those with gradients."""

    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def random(cls, seed: int) -> "Rollouts":
        g = torch.Generator().manual_seed(seed)
        mask = torch.arange(7) < torch.tensor([[7], [3], [1], [6], [5], [2]])
        logprobs = -2 * torch.rand(6, 7, generator=g)
        near = [logprobs + 0.4 * torch.randn(6, 7, generator=g) for _ in range(3)]
        entropy = torch.rand(6, 7, generator=g)
        leaves = logprobs.requires_grad_(), entropy.requires_grad_()
        return cls(*leaves, *near_detached(near), torch.randn(6, generator=g), mask)

    @property
    def five(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logprobs, self.old, self.advantages, self.mask

    def weights(self, reduction: str) -> Tensor:
        return losses.token_weights(self.mask, reduction, max_completion_length=11)


def near_detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


@dataclass
class Pairs:
    """Four comparisons, per token; the leaves are those of the policy."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor

    @classmethod
    def random(cls, seed: int) -> "Pairs":
        g = torch.Generator().manual_seed(seed)
        masks = (
            torch.arange(7) < torch.tensor([[7], [3], [1], [6]]),
            torch.arange(7) < torch.tensor([[2], [5], [4], [7]]),
        )
        policy = [-2 * torch.rand(4, 7, generator=g) for _ in range(2)]
        ref = [p + torch.randn(4, 7, generator=g) for p in policy]
        return cls(*(p.requires_grad_() for p in policy), *near_detached(ref), *masks)

    def sums(self, average: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def total(x: Tensor, mask: Tensor) -> Tensor:
            return losses.sequence_logprobs(x, mask, average=average)

        return (
            total(self.chosen, self.chosen_mask),
            total(self.rejected, self.rejected_mask),
            total(self.ref_chosen, self.chosen_mask),
            total(self.ref_rejected, self.rejected_mask),
        )


# A case takes a seed and returns (ours, the other's, the leaves to differentiate by).
Case = Callable[[int], tuple[Tensor, Tensor, list[Tensor]]]
CASES: dict[str, Case] = {}  # beside TRL
VERL: dict[str, Case] = {}  # beside verl's formulas


def case(name: str, where: dict[str, Case] = CASES) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        where[name] = function
        return function

    return add


def difference(case: Case, seeds: int = 5) -> tuple[float, float]:
    """Largest difference over random tensors, of the values and of the gradients.

    Relative to the largest magnitude of the other's, where that is above 1.
    """
    value = gradient = 0.0

    def apart(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()

    for seed in range(seeds):
        ours, want, leaves = case(seed)
        assert torch.isfinite(want).all()
        value = max(value, apart(ours.detach(), want.detach()))
        if leaves:
            pairs = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, want))
            gradient = max(gradient, *(apart(a, b) for a, b in zip(*pairs, strict=True)))
    return value, gradient
