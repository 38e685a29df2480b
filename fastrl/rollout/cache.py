"""Keys and values as a forest: nodes of consecutive positions, and branches that run through them.

A prompt is one node that all its completions read; a completion grows by nodes of `CHUNK`
positions, a few completions' next nodes in one allocation. Python's own references count who reads
it: the last branch to leave frees it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.kernels.native import pointer

CHUNK = 64  # positions per node of a completion


class Node:
    """Keys and values `[layers, 2, Hkv, capacity, D]` of the positions from `start` on.

    Those of a `shared` one are read once for all rows, of others once for each.
    """

    __slots__ = ("capacity", "shared", "start", "storage")

    def __init__(self, storage: Tensor, start: int, shared: bool):
        self.storage = storage
        self.start = start
        self.shared = shared
        self.capacity = storage.shape[3]


class Branch:
    """A sequence in the cache: `length` tokens in `nodes`, the first of them a root.

    `hidden` `[H]` is the final hidden state of the last token, None where that was not computed
    (after a fork or a rewind to an earlier token). `weight_version` is that of the weights behind
    it.
    """

    __slots__ = ("growing", "hidden", "length", "nodes", "weight_version")

    def __init__(self, nodes: tuple[Node, ...], length: int, weight_version: int):
        self.nodes = nodes
        self.length = length
        self.weight_version = weight_version
        self.hidden: Tensor | None = None
        # Whether the last node is this branch's to write on. Never after a fork or a rewind, so
        # where a branch's nodes begin, and with it every bit, depends on its own history alone.
        self.growing = False

    def room(self) -> int:
        """How many tokens fit before a new node is needed."""
        last = self.nodes[-1] if self.growing else None
        return 0 if last is None else last.start + last.capacity - self.length

    def grow(self, node: Node) -> None:
        """Continue in a new node."""
        self.nodes = (*self.nodes, node)
        self.growing = True

    def fork(self, at: int | None = None) -> "Branch":
        """A branch of the first `at` tokens (all of them by default), which reads them in place."""
        at = self.length if at is None else at
        if not 0 < at <= self.length:
            raise ValueError(f"at={at} must lie in [1, {self.length}], the tokens of the branch")
        nodes = tuple(n for n in self.nodes if n.start < at)
        branch = Branch(nodes, at, self.weight_version)
        branch.hidden = self.hidden if at == self.length else None
        return branch

    def rewind(self, to: int) -> None:
        """Forget all but the first `to` tokens; forks keep what they read."""
        kept = self.fork(to)
        self.nodes, self.length, self.hidden = kept.nodes, kept.length, kept.hidden
        self.growing = False


class Layout:
    """Which nodes each row reads, as `decode_args` takes it."""

    def __init__(self, rows: Sequence[Branch]):
        self._nodes = list({id(n): n for b in rows for n in b.nodes}.values())
        index = {id(n): i for i, n in enumerate(self._nodes)}
        lengths = torch.tensor([0, *(len(b.nodes) for b in rows)])
        self._tensors = (
            torch.tensor([pointer(n.storage) for n in self._nodes]),
            torch.tensor([n.start for n in self._nodes]),
            torch.tensor([n.capacity for n in self._nodes]),
            torch.tensor([int(n.shared) for n in self._nodes]),
            lengths.cumsum(0),
            torch.tensor([index[id(n)] for b in rows for n in b.nodes]),
        )

    def pointers(self) -> tuple[int, ...]:
        """In the order of `decode_args`."""
        return tuple(map(pointer, self._tensors))
