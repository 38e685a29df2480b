"""What to sample and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrl.kernels import GroupLayout


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; temperature 0 is greedy.

    top_k 0, top_p 1 and min_p 0 are off; truncation is applied in that order. `stop` strings end a
    completion and stay part of it. A completion depends on (seed, its row, its position), not on
    the batch around it. Raises `ValueError` for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    eos_token_id: int | tuple[int, ...] | None = None
    stop: tuple[str, ...] = field(default=())
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, value, ok, right in (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or positive"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or positive"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "stop",
                self.stop,
                not isinstance(self.stop, str) and all(self.stop),
                "non-empty strings",
            ),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r} must be {right}")


@dataclass(frozen=True)
class Group:
    """A group in the making: its prompt's index, its completions so far, which of them ended."""

    index: int
    completions: list[list[int]]
    finished: list[bool]


# True ends the group's other completions; one bool for each completion ends these.
GroupStop = Callable[[Group], bool | Sequence[bool]]


@dataclass(frozen=True)
class Rollouts:
    """B = prompts x group_size completions, groups next to each other.

    prompt_ids: B lists (rows of a group share one); completion_ids `[B, T]` int64, right-padded
    with 0; completion_mask `[B, T]` bool, true up to and including the stop token; logprobs `[B,
    T]` float32 of the distribution sampled from, untruncated_logprobs of the one before top-k,
    top-p and min-p (equal without them); finish_reason "stop", "length", or "pruned" where
    `group_stop` ended it; layout: the groups packed as `prompt | c_1 | ... | c_G`;
    weight_version: the weights' version at sampling.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    untruncated_logprobs: Tensor
    finish_reason: list[str]
    layout: GroupLayout
    weight_version: int

    def completion_lists(self) -> list[list[int]]:
        """The completions as lists of ids, without padding."""
        return [
            ids[:n]
            for ids, n in zip(
                self.completion_ids.tolist(), self.layout.completion_lengths, strict=True
            )
        ]

    def to(self, device: torch.device | str) -> "Rollouts":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | GroupLayout)
        }
        return replace(self, **moved)


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of one policy and group size as one, in the order given."""
    steps = max(part.completion_ids.shape[1] for part in parts)

    def tensor(name: str) -> Tensor:
        rows = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(x, (0, steps - x.shape[1])) for x in rows])

    mask = tensor("completion_mask")
    lengths = mask.sum(-1).view(-1, parts[0].layout.group_size).tolist()
    prompts = [n for part in parts for n in part.layout.prompt_lengths]
    return Rollouts(
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        completion_ids=tensor("completion_ids"),
        completion_mask=mask,
        logprobs=tensor("logprobs"),
        untruncated_logprobs=tensor("untruncated_logprobs"),
        finish_reason=[reason for part in parts for reason in part.finish_reason],
        layout=GroupLayout.from_lengths(prompts, lengths, mask.device),
        weight_version=parts[0].weight_version,
    )


class Engine(Protocol):
    """What a trainer asks of an engine; `RolloutEngine.generate` says what the arguments mean."""

    model: nn.Module

    @property
    def weight_version(self) -> int: ...

    def weights_changed(self) -> None: ...

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        group_size: int = 1,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        group_stop: GroupStop | None = None,
        progress: bool = False,
    ) -> Rollouts: ...
