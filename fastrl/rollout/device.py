"""Decoding on a GPU: the model's own modules, attention over cached segments, CUDA graphs.

Every step runs the layers of the Hugging Face model itself, so that norms, rotary angles, LoRA and
what else they do need no second version; only their attention is ours, which reads the cache where
it lies. A step of so many rows is recorded once as a CUDA graph and replayed from then on: what
changes, the tokens, their positions and the table of segments, is copied into its buffers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastrl.kernels import GroupLayout, shared_prefix_attention
from fastrl.kernels.native import unavailable
from fastrl.models.attention import implementation
from fastrl.models.head import unwrap
from fastrl.rollout.architecture import FAMILIES, UnsupportedModel, need
from fastrl.rollout.cache import CHUNK, Branch, Node

if TYPE_CHECKING:  # Triton may not be installed
    from fastrl.kernels.attention.decode import Table, Workspace

NAME = "fastrl_decode"
PREFILL_TOKENS = 16384  # at once, unless one prompt has more


class _Prompts(NamedTuple):
    """Prompts that are prefilled, packed, and the nodes that keep their keys and values."""

    layout: GroupLayout
    ends: list[int]
    nodes: list[Node]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        first = 0
        kept = self.nodes[0].storage.dtype
        need(k.dtype == q.dtype == kept, f"its keys are {k.dtype}, its embedding {kept}")
        for node, end in zip(self.nodes, self.ends, strict=True):
            for kind, x in enumerate((k, v)):
                node.storage[layer, kind].copy_(x[first:end].transpose(0, 1))
            first = end
        return shared_prefix_attention(q, k, v, self.layout, **options)


class Placed(NamedTuple):
    """Which nodes each row reads, and the nodes, which live as long as their addresses are used."""

    table: "Table"
    nodes: list[Node]


class _Step:
    """Buffers of a step of at most so many rows, and its CUDA graph."""

    def __init__(self, rows: int, table: "Table", workspace: "Workspace", device: torch.device):
        self.tokens, self.positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._table = table._replace(values=torch.empty_like(table.values, device=device))
        self._workspace = workspace
        self._loaded: Tensor | None = None  # not the nodes, which would outlive their branches
        self.hidden: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, tokens: Tensor, positions: Tensor, where: Placed) -> None:
        self.tokens[: len(tokens)].copy_(tokens)
        self.positions[: len(positions)].copy_(positions)
        if self._loaded is not where.table.values:
            self._table.values.copy_(where.table.values)
            self._loaded = where.table.values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        from fastrl.kernels.attention.decode import decode_attention

        options = {n: x or 0 for n, x in options.items()}
        return decode_attention(
            *(q, k, v, self.positions, self._table, self._workspace, layer), **options
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cached: _Prompts | _Step,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it, `[1, heads, rows, D]`; returns `[1, rows, heads, D]`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = cached.attend(
        module.layer_idx,  # type: ignore[arg-type]
        *(q, k, v),
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


class DeviceDecoder:
    """A causal LM's layers where Triton runs; the interface is that of the CPU's `Decoder`.

    Raises `UnsupportedModel` for what it does not know. Its graphs hold addresses of parameters, so
    it has to be made anew where one has moved; new values in place are seen.
    """

    def __init__(self, model: nn.Module):
        inner = unwrap(model)
        need(type(inner) in FAMILIES, f"{type(inner).__name__} is not one of the known families")
        self._inner = inner.get_decoder()
        self._config = c = self._inner.config
        weight = self._inner.embed_tokens.weight
        self._dtype, self._device = weight.dtype, weight.device
        for name, p in self._inner.named_parameters():
            need(p.device == self._device, f"{name} is on {p.device}, not on {self._device}")
            need(type(p) is nn.Parameter, f"{name} is a {type(p).__name__}")
        floats = torch.float32, torch.bfloat16, torch.float16
        need(self._dtype in floats, f"its parameters are {self._dtype}")
        missing = unavailable("triton", self._device)
        need(missing is None, missing or "")
        rope = c.rope_parameters["rope_type"]
        need(rope not in ("dynamic", "longrope"), f"its {rope} angles depend on the length")
        need(not getattr(c, "use_bidirectional_attention", False), "its attention is not causal")
        self._layers = self._inner.layers[: c.num_hidden_layers]
        self._heads, self._kv_heads = c.num_attention_heads, c.num_key_value_heads
        self._width = self._layers[0].self_attn.head_dim
        need(self._width <= 256, f"its heads have {self._width} numbers, more than 256")
        self._steps: dict[tuple, _Step] = {}
        self._workspaces: dict[int, Workspace] = {}
        on_gpu = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def _new_node(self, start: int, capacity: int, shared: bool) -> Node:
        shape = (len(self._layers), 2, self._kv_heads, capacity, self._width)
        return Node(torch.empty(shape, dtype=self._dtype, device=self._device), start, shared)

    def _forward(self, tokens: Tensor, positions: Tensor, cached: _Prompts | _Step) -> Tensor:
        """Final hidden states of rows `[M]` at positions `[M]`."""
        with implementation(self._config, NAME), _eval(self._inner):
            hidden = self._inner.embed_tokens(tokens.unsqueeze(0))
            at = positions.unsqueeze(0)
            angles = self._inner.rotary_emb(hidden, position_ids=at)
            for layer in self._layers:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_ids=at,
                    position_embeddings=angles,
                    cached=cached,
                )
            return self._inner.norm(hidden)[0]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], weight_version: int) -> list[Branch]:
        """A root for each prompt; a bounded number of tokens at a time, of whole prompts."""
        branches: list[Branch] = []
        while len(branches) < len(prompts):
            begin = end = len(branches)
            total = 0
            while end < len(prompts) and (
                end == begin or total + len(prompts[end]) <= PREFILL_TOKENS
            ):
                total += len(prompts[end])
                end += 1
            branches += self._prefill(prompts[begin:end], weight_version)
        return branches

    def _prefill(self, prompts: Sequence[Sequence[int]], weight_version: int) -> list[Branch]:
        lengths = list(map(len, prompts))
        nodes = [self._new_node(0, n, shared=True) for n in lengths]
        ends = list(accumulate(lengths))
        layout = GroupLayout.from_lengths(lengths, [[]] * len(lengths), self._device)
        tokens = torch.tensor([t for p in prompts for t in p], device=self._device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self._device)
        hidden = self._forward(tokens, positions, _Prompts(layout, ends, nodes))
        branches = []
        for node, end in zip(nodes, ends, strict=True):
            branch = Branch((node,), node.capacity, weight_version)
            branch.hidden = hidden[end - 1].clone()
            branches.append(branch)
        return branches

    def place(self, branches: Sequence[Branch]) -> tuple[Placed, Tensor]:
        """Where the next token of each branch goes; room is made for it."""
        from fastrl.kernels.attention.decode import Segment, Visit, table

        for branch in branches:
            if branch.room() == 0:
                branch.grow(self._new_node(branch.length, CHUNK, shared=False))
        nodes = list({id(n): n for b in branches for n in b.nodes}.values())
        index = {id(n): i for i, n in enumerate(nodes)}
        segments = [Segment(n.storage.data_ptr(), n.start, n.capacity, n.shared) for n in nodes]
        chains = []
        for row, branch in enumerate(branches):
            limits = [b.start - a.start for a, b in pairwise(branch.nodes)]
            pairs = zip(branch.nodes, [*limits, -1], strict=True)
            chains.append([Visit(row, index[id(n)], limit) for n, limit in pairs])
        share = self._heads // self._kv_heads
        placed = Placed(table(segments, chains, share, _bucket(len(branches))), nodes)
        return placed, torch.tensor([b.length for b in branches], device=self._device)

    @torch.no_grad()
    def no_rows(self) -> Tensor:
        """Hidden states of no rows, `[0, H]`."""
        return torch.empty(0, self._config.hidden_size, dtype=self._dtype, device=self._device)

    def scratch(self) -> None:
        """Nothing: steps of one size share a graph's buffers."""

    def run(
        self, tokens: Tensor, positions: Tensor, layout: Placed, scratch: None = None
    ) -> Tensor:
        """Final hidden states `[M, H]` of tokens `[M]` at positions `[M]`, both int64.

        Their keys and values are written where the table's rows end.
        """
        bucket = _bucket(len(tokens))
        size, items = layout.table.size, layout.table.items
        key = (bucket, size, items)
        step = self._steps.get(key)
        if step is None:
            step = _Step(bucket, layout.table, self._workspace(size), self._device)
            self._steps[key] = step
        step.load(tokens, positions, layout)
        if step.graph is not None:
            step.graph.replay()
        else:
            step.hidden = self._forward(step.tokens, step.positions, step)
            if self._pool is not None:
                self._record(step)
        assert step.hidden is not None
        return step.hidden[: len(tokens)].clone()

    def _record(self, step: _Step) -> None:
        """What just ran becomes a graph; then it runs once more, writing what it wrote before."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
                step.hidden = self._forward(step.tokens, step.positions, step)
        except RuntimeError as error:
            raise UnsupportedModel(f"no CUDA graph records its step: {error}") from error
        step.graph = graph
        graph.replay()

    def _workspace(self, size: int) -> "Workspace":
        from fastrl.kernels.attention.decode import Workspace

        if size not in self._workspaces:
            made = Workspace.of(size, self._heads, self._width, self._device)
            self._workspaces[size] = made
        return self._workspaces[size]


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Without dropout inside."""
    training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(training)


def _bucket(rows: int) -> int:
    """Rows of a graph that decodes so many."""
    return 1 << max(rows - 1, 0).bit_length()
