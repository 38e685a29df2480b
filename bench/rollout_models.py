"""The models of the race of rollouts: their shapes, and what of them a step reads."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

COMMON = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True}
TINY = {
    "vocab_size": 17,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
}
HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MODELS = {
    "tiny": (Qwen3ForCausalLM, Qwen3Config, TINY),
    "387m": (Qwen2ForCausalLM, Qwen2Config, HALF_B | {"vocab_size": 32000}),
    "0.5b": (Qwen2ForCausalLM, Qwen2Config, HALF_B),
}


def build(shape):
    """The model of a shape's name, layers and dtype, with random weights."""
    if shape["model"] not in MODELS:
        raise ValueError(f"model={shape['model']!r} is not one of {', '.join(MODELS)}")
    kind, config, sizes = MODELS[shape["model"]]
    torch.manual_seed(0)
    # Weights so large that what is greedy does not only repeat the last token.
    spread = sizes["hidden_size"] ** -0.5
    depth = {"num_hidden_layers": shape["layers"], "initializer_range": spread, **COMMON}
    return kind(config(**sizes | depth)).to(getattr(torch, shape["dtype"])).eval()


def weights(shape):
    """Parameters of the layers and of the lm-head, and their bytes each."""
    sizes = MODELS[shape["model"]][2]
    heads = 2 * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    wide = heads * sizes["head_dim"] + 3 * sizes["intermediate_size"]
    layers = shape["layers"] * sizes["hidden_size"] * wide
    return layers, sizes["hidden_size"] * sizes["vocab_size"], itemsize(shape)


def itemsize(shape):
    return getattr(torch, shape["dtype"]).itemsize


def cached(shape):
    """Bytes of the keys and values of a token."""
    sizes = MODELS[shape["model"]][2]
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    return 2 * shape["layers"] * width * itemsize(shape)
