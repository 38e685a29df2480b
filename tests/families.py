"""A tiny model with random weights of each family that decodes natively."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 151
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
HEAD = {"head_dim": 20}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, HEAD | {"attention_bias": True, "mlp_bias": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, HEAD | {"sliding_window": 7}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, HEAD),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        # Softcaps that bite; every other layer has the window.
        HEAD
        | {
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes):
    """In eval mode, with no weight left at 0 or 1 and attention far from uniform."""
    model_type, config_type, options = FAMILIES[family]
    torch.manual_seed(0)
    model = model_type(config_type(**(SIZES | options | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "q_proj" in name or "k_proj" in name:
                p.mul_(10)
    return model.to(dtype)
