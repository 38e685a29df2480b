"""The native decoder: what csrc/cpu/decode.cpp is called with, step by step."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.kernels import Samples
from fastrl.kernels.checks import FLOATS
from fastrl.kernels.logprob.checks import check_draws
from fastrl.kernels.logprob.cpu import Drawing, sample
from fastrl.kernels.logprob.draws import Draws
from fastrl.kernels.logprob.parallel import is_dtensor
from fastrl.kernels.native import module, pointer, threads
from fastrl.models.head import LmHead, lm_head
from fastrl.rollout.architecture import describe, need
from fastrl.rollout.cache import CHUNK, Branch, Layout, Node
from fastrl.rollout.generation import Drawn, Turn, draw
from fastrl.rollout.int8 import Int8Linears
from fastrl.rollout.sampling import SamplingParams

PREFILL_ROWS = 256  # in one call, and fewer where their attention would hold more floats than
PREFILL_FLOATS = 16 << 20
SLAB_BYTES = 16 << 20  # of nodes allocated together: a row that goes on alone keeps so much


def reads_head(head: LmHead) -> bool:
    """Whether `Decoder.generate` can draw from an lm-head."""
    parts = [x for x in (head.weight, head.bias) if x is not None]
    return head.weight.dtype in FLOATS and not any(map(is_dtensor, parts))


def _draws(
    hidden: Tensor, head: LmHead, sampling: SamplingParams, seeds: Tensor, positions: Tensor
) -> Draws:
    return Draws(
        hidden,
        head.weight.detach(),
        seeds,
        positions,
        head.bias,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        head.softcap or 0.0,
        head.logit_scale,
        "cpu",
    )


class Decoder:
    """A causal LM's layers on the CPU, on its own parameters and those of its LoRA adapters.

    With `int8` its projections, but adapters, and its lm-head are multiplied as copied there.
    Raises `UnsupportedModel` for what it does not know. It holds addresses of parameters and what
    adapters there are, so it has to be made anew where the `places` of `fingerprint` change.
    """

    def __init__(self, model: nn.Module, int8: Int8Linears | None = None):
        known = describe(model, int8)
        self._inner, self._dtype, self._model = known.inner, known.dtype, known.native
        self._config = self._inner.config
        self._layers, self._head = known.layers, known.head
        self._int8 = int8  # whose arrays native code reads as long as this lives
        self.head_size, self.kv_heads = known.head_size, self._config.num_key_value_heads
        need(int8 is None or reads_head(lm_head(model)), "its lm-head is of another type")
        self._angles = (torch.empty(0), torch.empty(0))
        self._grow_angles(1)

    def _grow_angles(self, positions: int) -> None:
        if len(self._angles[0]) >= positions:
            return
        count = max(256, 2 ** math.ceil(math.log2(positions)))
        like = torch.empty(0, dtype=self._dtype)
        both = self._inner.rotary_emb(like, torch.arange(count).unsqueeze(0))
        need(both[0].shape[-1] == self.head_size, "only a part of each head is rotated")
        half = self.head_size // 2
        # In the model's dtype, as the trainer's forward has them.
        self._angles = tuple(a[0, :, :half].float().contiguous() for a in both)

    def no_rows(self) -> Tensor:
        """Hidden states of no rows, `[0, H]`."""
        return torch.empty(0, self._config.hidden_size, dtype=self._dtype)

    def scratch(self) -> Any:
        """What steps that follow one another share."""
        return module().decode_scratch()

    def _node_shape(self, capacity: int) -> tuple[int, ...]:
        return self._layers, 2, self.kv_heads, capacity, self.head_size

    def _storage(self, nodes: int, capacity: int) -> Sequence[Tensor]:
        """Room for the keys and values of some nodes, on huge pages where it fills one."""
        slab = torch.empty(nodes, *self._node_shape(capacity), dtype=self._dtype)
        module().use_huge_pages(pointer(slab), slab.numel() * slab.element_size())
        return slab.unbind()

    @torch.no_grad()
    def run(self, tokens: Tensor, positions: Tensor, layout: Layout, scratch: Any = None) -> Tensor:
        """Final hidden states `[M, H]` of tokens `[M]` at positions `[M]`, both int64.

        Their keys and values are written where the layout's rows end. Steps that follow one
        another share a `scratch`.
        """
        hidden = torch.empty(len(tokens), self._config.hidden_size, dtype=self._dtype)
        args = self._arguments(tokens, positions, layout, hidden, 1)
        module().decode_cpu(self._model, args, scratch or self.scratch(), threads())
        return hidden

    def _arguments(
        self, tokens: Tensor | None, positions: Tensor, layout: Layout, hidden: Tensor, steps: int
    ) -> Any:
        self._grow_angles(int(positions.max()) + steps)
        return module().decode_args(
            len(positions),
            pointer(tokens),
            pointer(positions),
            *layout.pointers(),
            *map(pointer, self._angles),
            pointer(hidden),
        )

    @torch.no_grad()
    def generate(
        self,
        turn: Turn,
        hidden: Tensor,
        tokens: Tensor | None,
        positions: Tensor,
        layout: Layout,
        scratch: Any,
        steps: int,
    ) -> Drawn:
        """At most so many tokens for each row, as its turn says; those drawn last are not read.

        tokens `[M]` int64 are to be read first, at positions `[M]` int64; None where the rows begin
        with `hidden` `[M, H]`. Returns early after about a tenth of a second.
        """
        drawing = Drawing.of(
            _draws(hidden, turn.head, turn.sampling, turn.seeds, turn.positions),
            len(positions),
            steps,
            int8=self._head,
        )
        stops, count = torch.tensor(turn.stops, dtype=torch.int64), torch.empty_like(positions)
        native = module()
        args = native.generate_args(
            self._arguments(tokens, positions, layout, hidden, steps),
            drawing.arguments(),
            steps,
            turn.fewest,
            pointer(turn.room),
            pointer(stops),
            len(stops),
            pointer(count),
        )
        native.generate_cpu(self._model, args, scratch, threads())
        made = int(count.max())
        token, logprob, untruncated = (x[:, :made] for x in drawing[2:])
        return Drawn(token, logprob, untruncated, count)

    def draw(
        self, hidden: Tensor, head: LmHead, sampling: SamplingParams, seeds: Tensor, at: Tensor
    ) -> Samples:
        """A token for each hidden state `[M, H]`; seeds and positions `at` `[M]` decide it."""
        if self._head is None:
            return draw(hidden, head, sampling, seeds, at)
        check_draws(hidden, head.weight, seeds, at, head.bias, head.softcap)
        if hidden.dtype not in FLOATS:
            raise ValueError(f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
        drawn = sample(_draws(hidden, head, sampling, seeds.long(), at.long()), self._head)
        return Samples(*drawn)

    def place(self, branches: Sequence[Branch]) -> tuple[Layout, Tensor]:
        """Where the next token of each branch goes; room is made for it."""
        full = [branch for branch in branches if branch.room() == 0]
        node = math.prod(self._node_shape(CHUNK)) * self._dtype.itemsize
        at_once = max(1, SLAB_BYTES // node)
        for i in range(0, len(full), at_once):
            some = full[i : i + at_once]
            for branch, storage in zip(some, self._storage(len(some), CHUNK), strict=True):
                branch.grow(Node(storage, branch.length, shared=False))
        return Layout(branches), torch.tensor([b.length for b in branches])

    def prefill(self, prompts: Sequence[Sequence[int]], weight_version: int) -> list[Branch]:
        """A root for each prompt; a bounded number of tokens of all of them at a time."""
        branches = [
            Branch((Node(self._storage(1, len(p))[0], 0, shared=True),), len(p), weight_version)
            for p in prompts
        ]
        owner = [b for b, p in zip(branches, prompts, strict=True) for _ in p]
        tokens = torch.tensor([t for p in prompts for t in p])
        positions = torch.cat([torch.arange(len(p)) for p in prompts])
        ends = [n - 1 for n in accumulate(map(len, prompts))]
        # A row holds a result of its heads for each of the 240 keys that are taken at a time.
        held = (max(map(len, prompts)) // 240 + 2) * self._config.num_attention_heads
        rows = max(16, min(PREFILL_ROWS, PREFILL_FLOATS // (held * self.head_size)))
        scratch = self.scratch()
        for i in range(0, len(owner), rows):
            some = slice(i, i + rows)
            hidden = self.run(tokens[some], positions[some], Layout(owner[some]), scratch)
            for branch, last in zip(branches, ends, strict=True):
                if i <= last < i + rows:
                    branch.hidden = hidden[last - i].clone()
        return branches
