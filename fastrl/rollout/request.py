"""What is asked of an engine, checked before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrl.models import backbone, lm_head
from fastrl.rollout.sampling import SamplingParams

Prompts = Sequence[str | Sequence[int]]


@dataclass(frozen=True)
class Request:
    """Groups to sample: token ids of each prompt, its limit, and what ends a completion."""

    prompts: list[list[int]]
    limits: list[int]
    group_size: int
    sampling: SamplingParams
    stop_tokens: list[int]


def context_length(model: nn.Module) -> int | None:
    """How many tokens a sequence may have, None where the model does not say."""
    return getattr(backbone(model).config, "max_position_embeddings", None)


def check_request(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Prompts,
    group_size: int,
    sampling: SamplingParams,
    max_new_tokens: Sequence[int] | None,
) -> Request:
    """The request in token ids; raises `ValueError` as `RolloutEngine.generate` says."""
    ids = encode(tokenizer, prompts, sampling)
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    if not ids:
        raise ValueError("prompts is empty; give at least one")
    limits = [sampling.max_new_tokens] * len(ids)
    if max_new_tokens is not None:
        limits = list(max_new_tokens)
        if min(limits, default=1) < 1:
            raise ValueError(f"max_new_tokens={limits} must each be at least 1")
    check_prompts(model, ids, limits)
    return Request(ids, limits, group_size, sampling, _stop_tokens(model, tokenizer, sampling))


def encode(
    tokenizer: PreTrainedTokenizerBase | None, prompts: Prompts, sampling: SamplingParams
) -> list[list[int]]:
    """Token ids of prompts that are strings or token ids."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings or of token ids, got one string")
    if tokenizer is None and (sampling.stop or any(isinstance(p, str) for p in prompts)):
        raise ValueError(
            "text prompts and stop strings need a tokenizer: RolloutEngine(model, tokenizer)"
        )
    return [
        tokenizer(p, add_special_tokens=True)["input_ids"]  # type: ignore[misc]
        if isinstance(p, str)
        else list(p)
        for p in prompts
    ]


def check_prompts(model: nn.Module, prompts: list[list[int]], limits: Sequence[int]) -> None:
    """Raise `ValueError` for what the model cannot read or has no room for."""
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens holds {len(limits)} limits for {len(prompts)} prompts")
    context, vocab = context_length(model), lm_head(model).weight.shape[0]
    for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not ids:
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"prompt {i} holds token ids outside the vocabulary of {vocab}")
        if context is not None and len(ids) + limit > context:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and max_new_tokens={limit}: "
                f"more than the model's context of {context}"
            )


def _stop_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, sampling: SamplingParams
) -> list[int]:
    eos = sampling.eos_token_id
    if sampling.ignore_eos:
        return []
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        eos = backbone(model).config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
