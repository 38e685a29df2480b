"""Where the segments of packed groups are."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 2**31 - 1  # offsets are int32


class GroupLayout(NamedTuple):
    """Groups of completions packed behind the prompt they share, with no padding.

    Tokens lie as `prompt | c_1 | ... | c_G` for each prompt, prompt after prompt. Segment s, a
    prompt or a completion, is the tokens `[offsets[s], offsets[s + 1])`; group n is the segments
    `[groups[n], groups[n + 1])`, of which the first is its prompt. Segments may be empty and a
    group may be a prompt alone. offsets `[segments + 1]` and groups `[prompts + 1]` are int32, on
    the device of the tokens.
    """

    offsets: Tensor
    groups: Tensor

    @classmethod
    def from_lengths(
        cls,
        prompts: Sequence[int],
        completions: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
    ) -> "GroupLayout":
        """The layout of prompts and, for each, its completions, from their lengths in tokens.

        Raises `ValueError` where the two differ in number, for negative lengths and for more than
        2**31 - 1 tokens.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"completions must be one list for each of {len(prompts)} prompts, "
                f"got {len(completions)}"
            )
        lengths = [n for p, group in zip(prompts, completions, strict=True) for n in (p, *group)]
        if min(lengths, default=0) < 0:
            raise ValueError(f"lengths must not be negative, got {min(lengths)}")
        if sum(lengths) > _MOST:
            raise ValueError(f"a layout holds at most {_MOST} tokens, got {sum(lengths)}")
        return cls(
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            torch.tensor(
                [0, *accumulate(1 + len(group) for group in completions)],
                dtype=torch.int32,
                device=device,
            ),
        )

    @classmethod
    def of_rows(cls, batch: int, steps: int, device: torch.device | str | None) -> "GroupLayout":
        """The layout of a batch `[B, T]`, each row a prompt of its own: causal attention."""
        rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return cls(rows * steps, rows)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        lengths = self.offsets.diff().tolist()
        return tuple(lengths[first] for first in self.groups[:-1].tolist())

    @property
    def completion_lengths(self) -> tuple[int, ...]:
        """Tokens of each completion, group after group."""
        lengths, prompts = self.offsets.diff().tolist(), set(self.groups[:-1].tolist())
        return tuple(n for segment, n in enumerate(lengths) if segment not in prompts)

    @property
    def group_size(self) -> int:
        """Completions of each prompt. Raises `ValueError` where prompts differ in it."""
        sizes = set((self.groups.diff() - 1).tolist())
        if len(sizes) != 1:
            raise ValueError(f"the groups have no size in common, but {sorted(sizes)}")
        return sizes.pop()

    def to(self, device: torch.device | str) -> "GroupLayout":
        """The same layout on another device."""
        return GroupLayout(self.offsets.to(device), self.groups.to(device))

    def check(self, tokens: int) -> None:
        """Raise `ValueError` unless the offsets are those of `tokens` packed tokens."""
        offsets, groups = self.offsets.tolist(), self.groups.tolist()
        if offsets[:1] != [0] or offsets != sorted(offsets) or offsets[-1] != tokens:
            raise ValueError(
                f"layout.offsets must start at 0, never decrease and end at the number of tokens, "
                f"T={tokens}, got {_short(offsets)}"
            )
        if groups[:1] != [0] or groups != sorted(set(groups)) or groups[-1] != len(offsets) - 1:
            raise ValueError(
                f"layout.groups must start at 0, increase and end at the number of segments, "
                f"{len(offsets) - 1}, got {_short(groups)}"
            )

    def segment_of_token(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Each token's segment, and its prompt's, `[T]` int64; `tokens` is T, if it is known."""
        tokens = int(self.offsets[-1]) if tokens is None else tokens
        token = torch.arange(tokens, dtype=torch.int32, device=self.offsets.device)
        segment = torch.searchsorted(self.offsets, token, right=True) - 1
        group = torch.searchsorted(self.groups, segment.to(torch.int32), right=True) - 1
        return segment, self.groups[group].long()

    def positions(self, tokens: int | None = None) -> Tensor:
        """Each token's position `[T]` int64; a completion's start at its prompt's length."""
        segment, prompt = self.segment_of_token(tokens)
        own = torch.arange(len(segment), device=segment.device) - self.offsets[segment]
        shared = self.offsets[prompt + 1] - self.offsets[prompt]
        return (own + torch.where(segment == prompt, 0, shared)).long()

    def mask(self, window: int | None = None, tokens: int | None = None) -> Tensor:
        """Which keys each query sees, `[T queries, T keys]` bool.

        A token sees its prompt and its own segment, up to itself; with a window only positions
        p - window + 1 to p, p being its own.
        """
        segment, prompt = self.segment_of_token(tokens)
        position = self.positions(tokens)
        related = (segment == segment[:, None]) | (segment == prompt[:, None])
        distance = position[:, None] - position
        seen = related & (distance >= 0)
        return seen if window is None else seen & (distance < window)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
