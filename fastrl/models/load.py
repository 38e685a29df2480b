"""Models and tokenizers: from a directory or hub id, or small ones built from a recipe."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastrl.hub import find_model
from fastrl.models.head import unwrap

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, in Hugging Face format.

    Ids 0, 1, 2 are `<pad>`, `<eos>`, `<unk>`. Raises `ValueError` for an empty or repeating
    alphabet.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet={alphabet!r} must hold at least one character, each once")
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id.

    Raises `ValueError` where it is not to be had, and where it names no eos token.
    """
    tokenizer = AutoTokenizer.from_pretrained(find_model(path))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no eos token; completions would never end")
    return tokenizer


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    context_length: int,
    tie_embeddings: bool,
    vocab_size: int | None,
    seed: int,
) -> PreTrainedModel:
    """A Qwen3-type model with random float32 weights drawn from `seed` alone."""
    config = Qwen3Config(
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def load_model(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A decoder-only model from a local directory or hub id, from safetensors only.

    Raises `ValueError` where it is not to be had.
    """
    return AutoModelForCausalLM.from_pretrained(find_model(path), dtype=dtype, use_safetensors=True)


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where the tokenizer has ids that the model's embedding does not."""
    rows = unwrap(model).get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {rows}; "
            "they do not belong together"
        )


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Any,
    seed: int,
    scores: bool = False,
) -> nn.Module:
    """The model with LoRA adapters from peft; all else is frozen but a scoring model's head."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes floats
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_pretrained(model: Any, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format.

    LoRA adapters are saved beside the merged model.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / "adapter"))
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
