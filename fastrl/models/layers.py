"""The decoder layers of known families, run on packed tokens through our ops."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from fastrl.kernels import IMPLEMENTATIONS, GroupLayout, glu, rmsnorm, rope
from fastrl.kernels import shared_prefix_attention as attend
from fastrl.kernels.native import unavailable
from fastrl.models.head import backbone

LAYERS = {
    llama.LlamaModel: llama.LlamaDecoderLayer,
    mistral.MistralModel: mistral.MistralDecoderLayer,
    qwen2.Qwen2Model: qwen2.Qwen2DecoderLayer,
    qwen3.Qwen3Model: qwen3.Qwen3DecoderLayer,
    gemma2.Gemma2Model: gemma2.Gemma2DecoderLayer,
}
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",  # Gemma 2's, as the next
    "post_feedforward_layernorm",
)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Common(NamedTuple):
    """What all layers of a pass share."""

    layout: GroupLayout
    cos: Tensor  # [T, D / 2] float32
    sin: Tensor
    norm_offset: float
    activation: str
    windows: bool  # whether every layer has the config's sliding window


def runs_through_ops(model: nn.Module) -> bool:
    """Whether `layer_states` computes what the model's own backbone does, and has kernels for it.

    So it is for the families above as transformers has them: whoever changed a layer, or looks on
    by a hook, gets the model's own forward. Adapters on linear layers are no change.
    """
    decoder: Any = backbone(model)
    if type(decoder) not in LAYERS or torch.compiler.is_compiling():
        return False
    config = decoder.config
    embedding = decoder.embed_tokens.weight
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return (
        any(unavailable(impl, embedding.device) is None for impl in IMPLEMENTATIONS["rmsnorm"])
        and embedding.dtype != torch.float64
        and activation in ACTIVATIONS
        and not getattr(config, "use_bidirectional_attention", False)
        and not (getattr(config, "attention_dropout", 0.0) and decoder.training)
        and 2 * len(decoder.rotary_emb.inv_freq) == decoder.layers[0].self_attn.head_dim
        and all(type(layer) is LAYERS[type(decoder)] for layer in decoder.layers)
        and all(_untouched(module) for layer in decoder.layers for module in _parts(layer))
        and _untouched(decoder)
        and _untouched(decoder.norm)
    )


def _parts(layer: Any) -> list[nn.Module]:
    """The modules of a layer that `layer_states` does not call."""
    attention = layer.self_attn
    norms = [getattr(layer, name, None) for name in NORMS]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [layer, attention, layer.mlp, *(norm for norm in norms if norm is not None)]


def _untouched(module: nn.Module) -> bool:
    hooks: tuple[dict, ...] = (module._forward_hooks, module._forward_pre_hooks)
    hooks += (module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in vars(module) or not type(module).__module__.startswith("transformers.")
    own = module.parameters(recurse=False)
    return not replaced and not any(hooks) and all(type(p) is nn.Parameter for p in own)


def layer_states(
    model: nn.Module, input_ids: Tensor, positions: Tensor, layout: GroupLayout
) -> Tensor:
    """The last hidden states `[T, H]` of packed tokens, for a model that `runs_through_ops`.

    input_ids and positions are `[T]` int64, layout says which tokens see which. As the model's own
    backbone with `attn_implementation="fastrl"`, but that norms, rotations and activations are
    computed in float32 and rounded once.
    """
    decoder: Any = backbone(model)
    config = decoder.config
    x = decoder.embed_tokens(input_ids)
    angles = decoder.rotary_emb(x, positions.unsqueeze(0))
    half = angles[0].shape[-1] // 2
    cos, sin = (a[0, :, :half].float().contiguous() for a in angles)
    common = Common(
        *(layout, cos, sin, 1.0 if isinstance(decoder, gemma2.Gemma2Model) else 0.0),
        ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
        isinstance(decoder, mistral.MistralModel),
    )
    delta: Tensor | None = None
    for layer in decoder.layers[: config.num_hidden_layers]:
        run = partial(_layer, layer, common)
        if layer.gradient_checkpointing and layer.training:
            x, delta = layer._gradient_checkpointing_func(run, x, delta)
        else:
            x, delta = run(x, delta)
    return _norm(decoder.norm, common, x, delta)[0]


def _layer(layer: Any, common: Common, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta after this layer, as the two."""
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    h, x = _norm(layer.input_layernorm, common, x, delta)
    delta = _attention(layer.self_attn, common, h)
    before_mlp = layer.post_attention_layernorm
    if sandwich:
        delta, _ = _norm(layer.post_attention_layernorm, common, delta)
        before_mlp = layer.pre_feedforward_layernorm
    h, x = _norm(before_mlp, common, x, delta)
    mlp = layer.mlp
    delta = mlp.down_proj(glu(mlp.gate_proj(h), mlp.up_proj(h), activation=common.activation))
    if sandwich:
        delta, _ = _norm(layer.post_feedforward_layernorm, common, delta)
    return x, delta


def _norm(
    norm: Any, common: Common, x: Tensor, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    residual = None if delta is None else delta.to(x.dtype)
    return rmsnorm(x, norm.weight, residual=residual, eps=eps, weight_offset=common.norm_offset)


def _attention(attention: Any, common: Common, h: Tensor) -> Tensor:
    q, k, v = (
        project(h).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (
        rope(
            *(x, common.cos, common.sin),
            norm_weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.variance_epsilon,
        )
        for x, norm in (
            (q, getattr(attention, "q_norm", None)),
            (k, getattr(attention, "k_norm", None)),
        )
    )
    config = attention.config
    out = attend(
        *(q, k, v, common.layout),
        scale=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=config.sliding_window
        if common.windows
        else getattr(attention, "sliding_window", None),
    )
    assert isinstance(out, Tensor)
    return attention.o_proj(out.flatten(1))
