"""Models that score completions: critics, discriminators and reward models."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fastrl.kernels import LogProbs
from fastrl.models.head import as_forward, backbone, unwrap
from fastrl.models.load import _check_path
from fastrl.models.logprobs import completion_states, pad_rows, state_logprobs

Level = Literal["sequence", "token", "state"]


def scorer_class(model: nn.Module) -> Any:
    """The sequence classifier that transformers pairs with a model's config.

    Raises `ValueError` for a model that has none.
    """
    inner = unwrap(model)
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(inner.config), None)
    if kind is None:
        raise ValueError(
            f"{type(inner).__name__} has no sequence classifier in transformers, so no reward "
            "model, critic or discriminator can start from it"
        )
    return kind


def build_scorer(model: nn.Module, pad_token_id: int, *, heads: int = 1, seed: int = 0) -> Any:
    """A sequence classifier that starts from a copy of a causal LM's backbone, with a new head.

    Its `score` maps the last hidden states `[..., H]` to `[..., heads]`, drawn from N(0, 1/H) by
    seed, so that heads of an ensemble differ. Adapters are merged into the copy. Of the class that
    transformers pairs with the model's config, so that it saves and loads in Hugging Face format.
    Raises `ValueError` for a model that has no such class and for heads below 1.
    """
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1")
    inner, kind = unwrap(model), scorer_class(model)
    config = copy.deepcopy(inner.config)
    config.num_labels, config.pad_token_id = heads, pad_token_id
    parameter = next(inner.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer: Any = kind(config)
        scorer.score.weight.data.normal_(std=scorer.score.weight.shape[1] ** -0.5)
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    scorer.base_model.load_state_dict(backbone(model).state_dict())
    scorer.to(parameter.device)
    for p in scorer.parameters():  # buffers, such as rotary frequencies, stay float32
        p.data = p.data.to(parameter.dtype)
    return scorer


class ValueHead(nn.Linear):
    """Values `[..., 1]` of the hidden states `[..., H]` of a causal LM, 0 to begin with."""

    def __init__(self, model: nn.Module):
        parameter = next(model.parameters())
        size = unwrap(model).get_input_embeddings().weight.shape[1]
        super().__init__(size, 1, bias=False, device=parameter.device, dtype=torch.float32)
        nn.init.zeros_(self.weight)

    def values(self, states: Tensor, completion_mask: Tensor) -> Tensor:
        """Values `[B, T]` float32 of the states before each completion token; 0 where masked."""
        return torch.where(completion_mask, self(states.float()).squeeze(-1), 0.0)


@as_forward
def logprobs_and_values(
    model: nn.Module,
    head: ValueHead,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[LogProbs, Tensor]:
    """`completion_logprobs`, and a value head's `[B, T]` values, of one pass through the model."""
    states = completion_states(model, prompt_ids, completion_ids, completion_mask)
    logprobs = state_logprobs(
        model, states, completion_ids, completion_mask, temperature=temperature, entropy=entropy
    )
    return logprobs, head.values(states, completion_mask)


def load_scorer(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A sequence classifier from a local directory or hub id, from safetensors only."""
    _check_path(path)
    return AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, use_safetensors=True
    )


@as_forward
def completion_scores(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    level: Level = "sequence",
) -> Tensor:
    """What a sequence classifier's head makes of each completion, or of each of its tokens.

    Level "sequence": `[B]`, read at the last real token (the prompt's where a completion is
    empty), as a reward model does. "token": `[B, T]`, read at each completion token, so that it
    sees the token, as a token-level discriminator does. "state": `[B, T]`, read one token earlier,
    before the token is chosen, as a value function does. With K > 1 heads a last dimension of K.
    prompt_ids holds B non-empty lists; completion_ids `[B, T]` int64 and completion_mask `[B, T]`
    bool are right-padded, and may hold anything where the mask is false. Float32; 0 where the mask
    is false. Raises `ValueError` for an empty prompt and an unknown level.
    """
    if level not in ("sequence", "token", "state"):
        raise ValueError(f"level={level!r} is unknown; use sequence, token or state")
    ids, at = pad_rows(prompt_ids, completion_ids, completion_mask)
    hidden = backbone_of_scorer(model)(input_ids=ids, use_cache=False).last_hidden_state
    if level == "sequence":
        at = at[:, :1] + completion_mask.sum(-1, keepdim=True) - 1
    elif level == "state":
        at = at - 1
    states = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    scores = unwrap(model).score(states).float()
    scores = scores.squeeze(-1) if scores.shape[-1] == 1 else scores
    if level == "sequence":
        return scores[:, 0]
    mask = completion_mask if scores.dim() == 2 else completion_mask.unsqueeze(-1)
    return torch.where(mask, scores, 0.0)


def backbone_of_scorer(model: nn.Module) -> Any:
    """The part of a sequence classifier that returns `last_hidden_state`."""
    return unwrap(model).base_model
