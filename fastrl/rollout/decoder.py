"""The native decoder: what csrc/cpu/decode.cpp is called with for a Hugging Face model."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from fastrl.kernels import Samples
from fastrl.kernels.checks import FLOATS
from fastrl.kernels.logprob.cpu import Drawing, sample
from fastrl.kernels.logprob.draws import Draws
from fastrl.kernels.logprob.parallel import is_dtensor
from fastrl.kernels.native import float_kind, module, pointer, threads, unavailable
from fastrl.kernels.quant.cpu import Int8Rows
from fastrl.models.adapters import LowRank, low_rank
from fastrl.models.head import LmHead, lm_head, unwrap
from fastrl.rollout.cache import CHUNK, Branch, Layout, Node
from fastrl.rollout.generation import Drawn, Turn, draw
from fastrl.rollout.int8 import Int8Linears
from fastrl.rollout.sampling import SamplingParams

FAMILIES = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma2ForCausalLM,
)
ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}
PREFILL_ROWS = 256  # in one call, and fewer where their attention would hold more floats than
PREFILL_FLOATS = 16 << 20
SLAB_BYTES = 16 << 20  # of nodes allocated together: a row that goes on alone keeps so much


class UnsupportedModel(Exception):
    """Why a model cannot be decoded natively."""


def need(condition: bool, why: str) -> None:
    if not condition:
        raise UnsupportedModel(why)


def reads_head(head: LmHead) -> bool:
    """Whether `Decoder.generate` can draw from an lm-head."""
    parts = [x for x in (head.weight, head.bias) if x is not None]
    return head.weight.dtype in FLOATS and not any(map(is_dtensor, parts))


def _matrix(m: nn.Linear, int8: Int8Rows | None = None) -> Any:
    weight, scale, sums = int8 or (m.weight, None, None)
    return module().decode_matrix(
        pointer(weight),
        *m.weight.shape,
        weight.stride(0),
        pointer(m.bias),
        float_kind(m.weight.dtype),
        pointer(scale),
        pointer(sums),
    )


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


def _base(layer: nn.Module) -> tuple[nn.Linear, list[LowRank]]:
    try:
        base, adapters = low_rank(layer)
    except ValueError as error:
        raise UnsupportedModel(str(error)) from error
    need(type(base) is nn.Linear, f"it has a projection of another type, {type(base).__name__}")
    assert isinstance(base, nn.Linear)
    return base, adapters


def _scaling(config: Any, head_size: int) -> float:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return (head_size if scalar is None else scalar) ** -0.5


class Decoder:
    """A causal LM's layers on the CPU, on its own parameters and those of its LoRA adapters.

    With `int8` its projections, but adapters, and its lm-head are multiplied as they are copied
    there.
    Raises `UnsupportedModel` for what it does not know. It holds addresses of parameters and what
    adapters there are, so it has to be made anew where the `places` of `fingerprint` change.
    """

    def __init__(self, model: nn.Module, int8: Int8Linears | None = None):
        model = unwrap(model)
        need(type(model) in FAMILIES, f"{type(model).__name__} is not one of the known families")
        self._inner = model.get_decoder()  # type: ignore[operator]
        self._config = c = self._inner.config
        embedding = self._inner.embed_tokens
        need(isinstance(embedding, nn.Embedding), "its embedding is of another type")
        for part in self._inner.modules():
            need(not isinstance(part, AuxiliaryTrainingWrapper), "peft has replaced a module of it")
        self._dtype = embedding.weight.dtype
        for name, p in self._inner.named_parameters():
            alike = p.dtype in FLOATS if ".lora_" in name else p.dtype == self._dtype
            need(alike, f"{name} is {p.dtype}, the embedding {self._dtype}")
            need(p.device.type == "cpu" and type(p) is nn.Parameter, f"{name} is no CPU tensor")
            need(p.dim() == 1 or p.stride(1) == 1, f"{name} is not stored row by row")
        need(
            self._dtype in (torch.float32, torch.bfloat16, torch.float16),
            f"its parameters are {self._dtype}",
        )
        missing = unavailable("cpu", embedding.weight.device)
        need(missing is None, missing or "")
        rope = c.rope_parameters["rope_type"]
        need(rope not in ("dynamic", "longrope"), f"its {rope} angles depend on the length")
        need(not getattr(c, "use_bidirectional_attention", False), "its attention is not causal")
        activation = getattr(c, "hidden_activation", None) or c.hidden_act
        need(activation in ACTIVATIONS, f"its activation is {activation}")

        self._layers = self._inner.layers[: c.num_hidden_layers]
        self.head_size = self._layers[0].self_attn.head_dim
        self.kv_heads = c.num_key_value_heads
        even = c.hidden_size, c.intermediate_size, self.head_size
        need(all(n % 2 == 0 for n in even), "a size of it is odd")
        self._angles = (torch.empty(0), torch.empty(0))
        self._grow_angles(1)
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        self._int8 = int8
        self._head: Int8Rows | None = None
        if int8:
            need(reads_head(lm_head(model)), "its lm-head is of another type")
            self._head = int8.copy(model.get_output_embeddings(), "lm_head")  # type: ignore[operator]
        native = module()
        self._model = native.decode_model(
            c.hidden_size,
            c.num_attention_heads,
            self.kv_heads,
            self.head_size,
            float_kind(self._dtype),
            pointer(embedding.weight),
            embedding.weight.stride(0),
            torch.tensor(scale).to(self._dtype).item(),
            pointer(self._inner.norm.weight),
            c.rms_norm_eps,
            1.0 if isinstance(model, Gemma2ForCausalLM) else 0.0,
            _scaling(c, self.head_size),
            getattr(c, "attn_logit_softcapping", None) or 0.0,
            ACTIVATIONS[activation],
            int8 is not None,
            [self._layer(i, layer) for i, layer in enumerate(self._layers)],
        )

    def _layer(self, i: int, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        linears = [
            *(self._linear(attention, f"{name}_proj", f"layers.{i}.self_attn") for name in "qkvo"),
            *(self._linear(mlp, f"{n}_proj", f"layers.{i}.mlp") for n in ("gate", "up", "down")),
        ]
        # Gemma 2 calls the norm before its MLP differently, and has one after attention and MLP.
        extra = hasattr(layer, "pre_feedforward_layernorm")
        norms = (
            layer.input_layernorm,
            layer.pre_feedforward_layernorm if extra else layer.post_attention_layernorm,
            layer.post_attention_layernorm if extra else None,
            layer.post_feedforward_layernorm if extra else None,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
        )
        window = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window"):  # Mistral has it for all layers
            window = getattr(self._config, "sliding_window", None)
        return module().decode_layer(
            linears,
            [0 if n is None else pointer(n.weight) for n in norms],
            window or 0,
        )

    def _linear(self, parent: nn.Module, name: str, where: str):
        base, adapters = _base(getattr(parent, name))
        native = module()
        added = [native.low_rank(_matrix(a), _matrix(b), scaling) for a, b, scaling in adapters]
        int8 = self._int8.copy(base, f"{where}.{name}") if self._int8 else None
        return native.decode_linear(_matrix(base, int8), added)

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
        return len(self._layers), 2, self.kv_heads, capacity, self.head_size

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
        return Samples(*sample(_draws(hidden, head, sampling, seeds, at), self._head))

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
