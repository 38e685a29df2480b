"""The scoring forward of a reward model's backbone: packed, unpadded, each prompt once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.kernels import GroupLayout, rmsnorm, rope, shared_prefix_attention
from fastrl.reward.checkpoint import Checkpoint, Spec, rotary
from fastrl.reward.linear import Linear, Rows, glu_rows, norm_rows

Observe = Callable[[str, Tensor], None]  # called with a linear layer's name and its input


class Batch(NamedTuple):
    """Packed groups: token ids `[T]`, where they lie, and the tokens that are scored `[B]`."""

    ids: Tensor
    layout: GroupLayout
    pooled: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.layout.to(device), self.pooled.to(device))


class Angles(NamedTuple):
    """Cosines and sines of tokens, `[T, D / 2]`."""

    cos: Tensor
    sin: Tensor

    def select(self, index: Tensor) -> "Angles":
        return Angles(self.cos[index], self.sin[index])


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Norms hold what they multiply by, Gemma's offset included, in float32."""

    spec: Spec
    index: int
    linears: Mapping[str, Linear]  # by their names within the layer
    norms: Mapping[str, Tensor]

    def __call__(
        self,
        x: Tensor,
        delta: Tensor | None,
        layout: GroupLayout,
        angles: Angles,
        wide: Tensor | None = None,
        pooled: Tensor | None = None,
        observe: Observe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x + delta after this layer, as the two.

        `wide` is room for the MLP's two products, `[2, T, I]`: fresh memory in every layer would
        take longer than what is computed there. With `pooled`, the result is that of these tokens
        alone, and only their queries, output projection and MLP are computed.
        """
        s, tokens = self.spec, len(x)
        q, k, v, o = (self.linears[f"self_attn.{n}_proj"] for n in "qkvo")
        gate, up, down = (self.linears[f"mlp.{n}_proj"] for n in ("gate", "up", "down"))
        rows, x = norm_rows(x, delta, self.norms["input_layernorm"], s.eps, (q, k, v))
        self._watch(observe, rows, *(f"self_attn.{n}_proj" for n in "qkv"))
        keys, values = (f(rows, x.dtype).view(tokens, s.kv_heads, s.head_size) for f in (k, v))
        keys = rope(keys, *angles, norm_weight=self.norms.get("self_attn.k_norm"), eps=s.eps)
        if pooled is not None:
            rows, x, angles = rows.select(pooled), x[pooled], angles.select(pooled)
        queries = q(rows, x.dtype).view(-1, s.heads, s.head_size)
        queries = rope(queries, *angles, norm_weight=self.norms.get("self_attn.q_norm"), eps=s.eps)
        if pooled is not None:  # the kernel takes a query for each key
            queries = queries.new_zeros(tokens, *queries.shape[1:]).index_copy_(0, pooled, queries)
        out = shared_prefix_attention(
            queries,
            keys,
            values,
            layout,
            scale=s.scaling,
            softcap=s.softcap,
            window=s.windows[self.index],
        )
        assert isinstance(out, Tensor)
        rows = Rows((out if pooled is None else out[pooled]).flatten(1), None)
        self._watch(observe, rows, "self_attn.o_proj")
        delta = o(rows, x.dtype)
        before_mlp = "post_attention_layernorm"
        if s.sandwich:
            delta, _ = rmsnorm(delta, self.norms["post_attention_layernorm"], eps=s.eps)
            before_mlp = "pre_feedforward_layernorm"
        rows, x = norm_rows(x, delta, self.norms[before_mlp], s.eps, (gate, up))
        self._watch(observe, rows, "mlp.gate_proj", "mlp.up_proj")
        room = (None, None) if wide is None else wide[:, : len(x)]
        gated, upper = (f(rows, x.dtype, to) for f, to in zip((gate, up), room, strict=True))
        rows = glu_rows(gated, upper, s.activation, down)
        self._watch(observe, rows, "mlp.down_proj")
        delta = down(rows, x.dtype)
        if s.sandwich:
            delta, _ = rmsnorm(delta, self.norms["post_feedforward_layernorm"], eps=s.eps)
        return x, delta

    def _watch(self, observe: Observe | None, rows: Rows, *names: str) -> None:
        if observe is not None:
            assert rows.plain is not None, "only unquantized layers are observed"
            for name in names:
                observe(f"layers.{self.index}.{name}", rows.plain)


@dataclass(frozen=True)
class Ends:
    """What is before and after the layers: embedding `[V, H]`, final norm `[H]`, head `[K, H]`."""

    embedding: Tensor
    norm: Tensor
    head: Tensor

    @classmethod
    def read(cls, checkpoint: Checkpoint, device: torch.device) -> "Ends":
        spec = checkpoint.spec
        norm = checkpoint.norm("norm", spec.hidden)
        embedding = checkpoint.get("embed_tokens.weight", (spec.vocabulary, spec.hidden))
        head = checkpoint.get("score.weight").float()
        return cls(embedding.to(device), norm.to(device), head.to(device))


class Rotary:
    """Cosines and sines of positions, in a table that grows."""

    def __init__(self, config: Any, device: torch.device):
        self._config, self._device = config, device
        self._table = (torch.empty(0), torch.empty(0))

    def __call__(self, positions: Tensor) -> Angles:
        needed = int(positions.max()) + 1
        if needed > len(self._table[0]):
            count = max(256, 1 << (needed - 1).bit_length())
            cos, sin = rotary(self._config, count)
            half = cos.shape[1] // 2
            self._table = (cos[:, :half].to(self._device), sin[:, :half].to(self._device))
        return Angles(*(x[positions] for x in self._table))


def embed(embedding: Tensor, batch: Batch, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The states `[T, H]` that enter the first layer."""
    x = embedding[batch.ids].to(dtype)
    return x if spec.embedding_scale == 1.0 else x * torch.tensor(spec.embedding_scale).to(x)
