"""What csrc/cpu/decode.h is told of a Hugging Face model."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from fastrl.kernels.checks import FLOATS
from fastrl.kernels.native import float_kind, module, pointer, unavailable
from fastrl.kernels.quant.cpu import Int8Rows
from fastrl.models.adapters import low_rank
from fastrl.models.head import unwrap
from fastrl.rollout.int8 import Int8Linears

FAMILIES = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma2ForCausalLM,
)
ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}


class UnsupportedModel(Exception):
    """Why a model cannot be decoded natively."""


def need(condition: bool, why: str) -> None:
    if not condition:
        raise UnsupportedModel(why)


@dataclass(frozen=True)
class Architecture:
    """A causal LM of a known family, by the addresses of its parameters."""

    inner: Any  # its backbone
    dtype: torch.dtype
    layers: int
    head_size: int
    native: Any  # `fastrl._C.decode_model`
    head: Int8Rows | None  # the lm-head's copy, if there are copies


def describe(model: nn.Module, int8: Int8Linears | None = None) -> Architecture:
    """A model as the native code reads it, with projections and lm-head as copied in `int8`.

    Raises `UnsupportedModel` for what that does not know.
    """
    model = unwrap(model)
    need(type(model) in FAMILIES, f"{type(model).__name__} is not one of the known families")
    inner = model.get_decoder()  # type: ignore[operator]
    c, embedding = inner.config, inner.embed_tokens
    need(isinstance(embedding, nn.Embedding), "its embedding is of another type")
    for part in inner.modules():
        need(not isinstance(part, AuxiliaryTrainingWrapper), "peft has replaced a module of it")
    dtype = embedding.weight.dtype
    for name, p in inner.named_parameters():
        alike = p.dtype in FLOATS if ".lora_" in name else p.dtype == dtype
        need(alike, f"{name} is {p.dtype}, the embedding {dtype}")
        need(p.device.type == "cpu" and type(p) is nn.Parameter, f"{name} is no CPU tensor")
        need(p.dim() == 1 or p.stride(1) == 1, f"{name} is not stored row by row")
    need(dtype in (torch.float32, torch.bfloat16, torch.float16), f"its parameters are {dtype}")
    missing = unavailable("cpu", embedding.weight.device)
    need(missing is None, missing or "")
    rope = c.rope_parameters["rope_type"]
    need(rope not in ("dynamic", "longrope"), f"its {rope} angles depend on the length")
    need(not getattr(c, "use_bidirectional_attention", False), "its attention is not causal")
    activation = getattr(c, "hidden_activation", None) or c.hidden_act
    need(activation in ACTIVATIONS, f"its activation is {activation}")
    layers = inner.layers[: c.num_hidden_layers]
    head_size = layers[0].self_attn.head_dim
    need(
        all(n % 2 == 0 for n in (c.hidden_size, c.intermediate_size, head_size)),
        "a size of it is odd",
    )
    scalar = getattr(c, "query_pre_attn_scalar", None)
    native = module().decode_model(
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        head_size,
        float_kind(dtype),
        pointer(embedding.weight),
        embedding.weight.stride(0),
        torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0)).to(dtype).item(),
        pointer(inner.norm.weight),
        c.rms_norm_eps,
        1.0 if isinstance(model, Gemma2ForCausalLM) else 0.0,
        (head_size if scalar is None else scalar) ** -0.5,
        getattr(c, "attn_logit_softcapping", None) or 0.0,
        ACTIVATIONS[activation],
        int8 is not None,
        [_layer(f"layers.{i}", layer, c, int8) for i, layer in enumerate(layers)],
    )
    head = int8.copy(model.get_output_embeddings(), "lm_head") if int8 else None  # type: ignore[operator]
    return Architecture(inner, dtype, len(layers), head_size, native, head)


def _layer(name: str, layer: Any, config: Any, int8: Int8Linears | None):
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        *(_linear(attention, f"{x}_proj", f"{name}.self_attn", int8) for x in "qkvo"),
        *(_linear(mlp, f"{x}_proj", f"{name}.mlp", int8) for x in ("gate", "up", "down")),
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
        window = getattr(config, "sliding_window", None)
    return module().decode_layer(
        linears, [0 if n is None else pointer(n.weight) for n in norms], window or 0
    )


def _linear(parent: nn.Module, name: str, where: str, int8: Int8Linears | None):
    try:
        base, adapters = low_rank(getattr(parent, name))
    except ValueError as error:
        raise UnsupportedModel(str(error)) from error
    need(type(base) is nn.Linear, f"it has a projection of another type, {type(base).__name__}")
    assert isinstance(base, nn.Linear)
    native = module()
    added = [native.low_rank(_matrix(a), _matrix(b), scaling) for a, b, scaling in adapters]
    copy = int8.copy(base, f"{where}.{name}") if int8 else None
    return native.decode_linear(_matrix(base, copy), added)


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
