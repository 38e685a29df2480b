"""Rows that step together through a decoder of ours."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.rollout.cache import Branch
from fastrl.rollout.decoder import Decoder, reads_head
from fastrl.rollout.generation import Drawn, Turn


class Decodes(Protocol):
    """A decoder, on whatever device; its layouts and its scratch are its own."""

    def prefill(self, prompts: Sequence[Sequence[int]], weight_version: int) -> list[Branch]: ...

    def place(self, branches: Sequence[Branch]) -> tuple[Any, Tensor]: ...

    def run(
        self, tokens: Tensor, positions: Tensor, layout: Any, scratch: Any = None
    ) -> Tensor: ...

    def no_rows(self) -> Tensor: ...

    def scratch(self) -> Any: ...


class NativeRows:
    """Branches that step together; `hidden` `[M, H]` is where the tokens they read left them."""

    joins = True

    def __init__(self, decoder: Decodes, weight_version: int):
        self._decoder = decoder
        self._weight_version = weight_version
        self._branches: list[Branch] = []
        self._room = 0  # steps until a branch needs a new node
        self._taken = 0  # steps that the branches' lengths do not count yet
        self._scratch = decoder.scratch()
        self._last: tuple[Sequence[int], Branch] | None = None
        self._unread: Tensor | None = None  # tokens that the rows drew last
        self.hidden = decoder.no_rows()

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        """Some rows of each prompt, behind those there are.

        A prompt that is the very list the last call ended with is not computed again.
        """
        self._read()
        self._settle()
        again = self._last is not None and self._last[0] is prompts[0]
        roots = [self._last[1]] if again and self._last else []
        if len(prompts) > again:
            roots += self._decoder.prefill(prompts[again:], self._weight_version)
        self._last = (prompts[-1], roots[-1])
        self._branches += [r.fork() for r, n in zip(roots, copies, strict=True) for _ in range(n)]
        # A prompt's rows draw their first tokens from the same state.
        last = torch.stack([r.hidden for r in roots if r.hidden is not None])
        times = torch.tensor(list(copies), device=last.device)
        self.hidden = torch.cat([self.hidden, last.repeat_interleave(times, dim=0)])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._settle()
        self._branches = [self._branches[i] for i in rows.tolist()]
        if self._unread is None:
            self.hidden = self.hidden[rows]
        elif self._branches:
            self._unread = self._unread[rows]
        else:
            self._unread, self.hidden = None, self._decoder.no_rows()

    def draw(self, turn: Turn) -> Drawn:
        """A token for each row."""
        self._read()
        drawn = turn.once(self.hidden)
        self._unread = drawn.last()
        return drawn

    def step(self, tokens: Tensor) -> None:
        """Append a token to each row."""
        self._place()
        self.hidden = self._decoder.run(tokens, self._positions, self._layout, self._scratch)
        self._took(1)

    def _read(self) -> None:
        if self._unread is not None:
            self.step(self._unread)
            self._unread = None

    def _place(self) -> None:
        if self._room == 0:
            self._settle()
            self._layout, self._positions = self._decoder.place(self._branches)
            self._room = min(b.room() for b in self._branches)

    def _took(self, steps: int) -> None:
        self._positions += steps
        self._room -= steps
        self._taken += steps

    def _settle(self) -> None:
        for branch in self._branches:
            branch.length += self._taken
        self._taken = self._room = 0


class CpuRows(NativeRows):
    """The same on a CPU, where one call draws and reads many tokens."""

    _decoder: Decoder

    def draw(self, turn: Turn) -> Drawn:
        """Tokens for each row, as many as fit into the nodes that are there."""
        if not reads_head(turn.head):
            return super().draw(turn)
        self._place()
        drawn = self._decoder.generate(
            turn,
            self.hidden,
            self._unread,
            self._positions,
            self._layout,
            self._scratch,
            min(turn.most, self._room),
        )
        # Rows that drew less have ended; where they would go on does not matter.
        self._took(drawn.token.shape[1] - (self._unread is None))
        self._unread = drawn.last()
        return drawn
