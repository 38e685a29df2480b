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

from fastrl.hub import find_model
from fastrl.kernels import LogProbs
from fastrl.models.head import as_forward, backbone, unwrap
from fastrl.models.logprobs import (
    completion_states,
    pack_groups,
    packed_states,
    pad_rows,
    row_states,
    state_logprobs,
)

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


class ScoreHead(nn.Linear):
    """Scores `[..., K]` of the hidden states `[..., H]` of a causal LM.

    One head is 0 to begin with; those of an ensemble are drawn from N(0, 1/H) by seed, so that they
    differ. float32.
    """

    def __init__(self, model: nn.Module, heads: int = 1, seed: int = 0):
        parameter = next(model.parameters())
        size = unwrap(model).get_input_embeddings().weight.shape[1]
        super().__init__(size, heads, bias=False, device=parameter.device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        if heads > 1:
            generator = torch.Generator().manual_seed(seed)
            self.weight.data.copy_(torch.randn(heads, size, generator=generator) * size**-0.5)

    def values(self, states: Tensor, completion_mask: Tensor) -> Tensor:
        """Values `[B, T]` float32 of the states before each completion token; 0 where masked."""
        return torch.where(completion_mask, self(states.float()).squeeze(-1), 0.0)


def join_head(model: nn.Module, head: ScoreHead, pad_token_id: int) -> Any:
    """The sequence classifier that a causal LM's backbone and a head on it are together; a copy."""
    scorer = build_scorer(model, pad_token_id, heads=head.out_features)
    scorer.score.weight.data.copy_(head.weight.data)
    return scorer


@as_forward
def logprobs_and_values(
    model: nn.Module,
    head: ScoreHead,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> tuple[LogProbs, Tensor]:
    """`completion_logprobs`, and a head's `[B, T]` values, of one pass through the model."""
    states = completion_states(model, prompt_ids, completion_ids, completion_mask)
    logprobs = state_logprobs(
        model,
        states,
        completion_ids,
        completion_mask,
        temperature=temperature,
        entropy=entropy,
        inplace_backward=inplace_backward,
    )
    return logprobs, head.values(states, completion_mask)


def load_scorer(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A sequence classifier from a local directory or hub id, from safetensors only.

    Raises `ValueError` where it is not to be had.
    """
    return AutoModelForSequenceClassification.from_pretrained(
        find_model(path), dtype=dtype, use_safetensors=True
    )


@as_forward
def completion_scores(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    level: Level = "sequence",
    shared_prefix: bool = False,
) -> Tensor:
    """What a sequence classifier's head makes of each completion, or of each of its tokens.

    Level "sequence": `[B]`, read at the last real token (the prompt's where a completion is
    empty), as a reward model does. "token": `[B, T]`, read at each completion token, so that it
    sees the token, as a token-level discriminator does. "state": `[B, T]`, read one token earlier,
    before the token is chosen, as a value function does. With K > 1 heads a last dimension of K.
    prompt_ids holds B non-empty lists; completion_ids `[B, T]` int64 and completion_mask `[B, T]`
    bool are right-padded, and may hold anything where the mask is false. With shared_prefix the
    prompt that neighbouring rows have in common is computed once, as in `group_logprobs`, to the
    same scores but for rounding. Float32; 0 where the mask is false. Raises `ValueError` for an
    empty prompt and an unknown level; with shared_prefix, for a model that cannot.
    """
    completions = prompt_ids, completion_ids, completion_mask
    states = scored_states(model, *completions, level=level, shared_prefix=shared_prefix)
    return spread(unwrap(model).score(states).float(), completion_mask, level)


@as_forward
def head_scores(
    model: nn.Module,
    head: ScoreHead,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    level: Level = "sequence",
    shared_prefix: bool = False,
) -> Tensor:
    """`completion_scores` of a head on a causal LM's hidden states.

    The model computes them without dropout, and no gradient reaches it.
    """
    was_training = model.training
    model.eval()
    completions = prompt_ids, completion_ids, completion_mask
    try:
        with torch.no_grad():
            states = scored_states(model, *completions, level=level, shared_prefix=shared_prefix)
    finally:
        model.train(was_training)
    return spread(head(states.float()), completion_mask, level)


def scored_states(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    level: Level,
    shared_prefix: bool,
) -> Tensor:
    """The last hidden states `[N, H]` that a head reads, in the order of rows and their tokens.

    N is B, or at the levels of tokens the number of those that the mask has.
    """
    if level not in ("sequence", "token", "state"):
        raise ValueError(f"level={level!r} is unknown; use sequence, token or state")
    lengths = completion_mask.sum(-1, keepdim=True)
    steps = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    if shared_prefix:
        packed = pack_groups(prompt_ids, completion_ids, completion_mask, whole=True)
        hidden = packed_states(model, packed)
        starts, before = packed.starts.unsqueeze(-1), packed.before.unsqueeze(-1)
    else:
        ids, at = pad_rows(prompt_ids, completion_ids, completion_mask)
        hidden = row_states(model, ids)
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(-1) * ids.shape[1]
        hidden, starts = hidden.flatten(0, 1), rows + at[:, :1]
        before = starts - 1
    if level == "sequence":
        return hidden.index_select(0, torch.where(lengths > 0, starts + lengths - 1, before)[:, 0])
    if level == "token":
        return hidden.index_select(0, (starts + steps)[completion_mask])
    # A prompt's last state is read by all its completions: their gradients are summed before they
    # are rounded to the dtype of the states, and in order, which those of indexing are not.
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    at = torch.where(steps > 0, starts + steps - 1, before)[completion_mask]
    return wide.index_select(0, at).to(hidden.dtype)


def spread(scores: Tensor, completion_mask: Tensor, level: Level) -> Tensor:
    """Scores `[N, K]` of `scored_states` as `[B, K]`, or at the levels of tokens `[B, T, K]`.

    Without the last dimension where K is 1.
    """
    if level != "sequence":
        out = scores.new_zeros(*completion_mask.shape, scores.shape[-1])
        scores = out.index_put(torch.nonzero(completion_mask).unbind(1), scores)
    return scores.squeeze(-1) if scores.shape[-1] == 1 else scores
