"""Per-token log-probs of completions under a model."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastrl.kernels import GroupLayout, LogProbs, linear_logprob
from fastrl.models.attention import INSTEAD, check_shared_prefix, shared_attention
from fastrl.models.head import as_forward, autocast_operands, backbone, lm_head, unwrap
from fastrl.models.layers import layer_states, runs_through_ops

IGNORED = -100


class Completions(Protocol):
    """B prompts and completions, as `fastrl.rollout.Rollouts` and a trainer's batch hold them."""

    @property
    def prompt_ids(self) -> Sequence[Sequence[int]]: ...
    @property
    def completion_ids(self) -> Tensor: ...
    @property
    def completion_mask(self) -> Tensor: ...


def group_rows(prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of each group: neighbours with equal prompts."""
    rows = range(len(prompt_ids))
    return [list(group) for _, group in groupby(rows, key=lambda row: prompt_ids[row])]


def _check_prompts(prompt_ids: Sequence[Sequence[int]]) -> None:
    if isinstance(prompt_ids, Tensor):
        raise ValueError(
            "prompt_ids must be a list with the token ids of each row, without padding, got a "
            f"tensor of shape {tuple(prompt_ids.shape)}; with its attention mask that list is "
            "[ids[mask].tolist() for ids, mask in zip(prompt_ids, attention_mask.bool())]"
        )
    if not all(map(len, prompt_ids)):
        raise ValueError(
            "prompt_ids holds an empty prompt; a completion needs at least one token before it"
        )


class Packed(NamedTuple):
    """Groups packed as `prompt | c_1 | ... | c_G`, and where each row's tokens are."""

    input_ids: Tensor  # [1, T]
    layout: GroupLayout
    before: Tensor  # [B] the last token of a row's prompt
    starts: Tensor  # [B] the first token of its completion


def pack_groups(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    whole: bool = False,
) -> Packed:
    """Completions packed behind the prompt that neighbouring rows share.

    Where log-probs are asked for, a completion's last token is predicted, never read, so its
    segment ends one token earlier; `whole` keeps it.

    Raises `ValueError` for prompts as a tensor, an empty prompt, a number other than B and a mask
    that is not `[B, T]` bool, right-padded.
    """
    _check_prompts(prompt_ids)
    rows, device = len(prompt_ids), completion_ids.device
    if completion_ids.dim() != 2 or len(completion_ids) != rows:
        raise ValueError(
            f"completion_ids must be [B={rows}, T] for {rows} prompts, "
            f"got shape {tuple(completion_ids.shape)}"
        )
    if completion_mask.dtype != torch.bool or completion_mask.shape != completion_ids.shape:
        raise ValueError(
            f"completion_mask must be bool of completion_ids' shape {tuple(completion_ids.shape)}, "
            f"got {completion_mask.dtype} of shape {tuple(completion_mask.shape)}"
        )
    if (completion_mask[:, 1:] & ~completion_mask[:, :-1]).any():
        raise ValueError("completion_mask must be right-padded: true up to a row's length")
    groups = group_rows(prompt_ids)
    lengths = [n if whole else max(n - 1, 0) for n in completion_mask.sum(-1).tolist()]
    layout = GroupLayout.from_lengths(
        [len(prompt_ids[g[0]]) for g in groups],
        [[lengths[row] for row in g] for g in groups],
        device,
    )
    read = completion_ids.split(1)
    ids = torch.cat(
        [
            piece
            for g in groups
            for piece in (
                torch.tensor(prompt_ids[g[0]], dtype=torch.int64, device=device),
                *(read[row][0, : lengths[row]] for row in g),
            )
        ]
        or [completion_ids.new_zeros(0)]
    )
    group_of_row = torch.tensor(
        [n for n, g in enumerate(groups) for _ in g], dtype=torch.int64, device=device
    )
    segment_of_row = group_of_row + torch.arange(1, rows + 1, device=device)
    ends = layout.offsets[layout.groups[:-1] + 1].long() - 1  # the prompts' last tokens
    starts = layout.offsets[segment_of_row].long()
    return Packed(ids.unsqueeze(0), layout, ends[group_of_row], starts)


def packed_states(model: nn.Module, packed: Packed) -> Tensor:
    """The last hidden states `[T, H]` of packed groups."""
    ids, layout = packed.input_ids, packed.layout
    positions = layout.positions(ids.shape[1])
    if runs_through_ops(model):
        return layer_states(model, ids[0], positions, layout)
    with shared_attention(model):
        return backbone(model)(
            input_ids=ids,
            position_ids=positions.unsqueeze(0),
            group_layout=layout,
            use_cache=False,
        ).last_hidden_state[0]


def row_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The last hidden states `[B, T, H]` of rows `[B, T]` that are padded on the right, if at all.

    Of what is padded they are whatever comes out.
    """
    if not runs_through_ops(model):
        return backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    layout = GroupLayout.of_rows(*input_ids.shape, input_ids.device)
    positions = layout.positions(input_ids.numel())
    states = layer_states(model, input_ids.flatten(), positions, layout)
    return states.view(*input_ids.shape, states.shape[-1])


@as_forward
def group_logprobs(
    model: nn.Module,
    rollouts: Completions | tuple[Sequence[Sequence[int]], Tensor, Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProbs:
    """`completion_logprobs` with the prompt of each group computed once, and no padding.

    rollouts is a `fastrl.rollout.Rollouts`, or a tuple of what `completion_logprobs` takes: B
    prompts, completion_ids and completion_mask `[B, T]`, right-padded. Neighbouring rows with equal
    prompts are a group; all groups run as one packed row of `sum(P + sum_g (C_g - 1))` tokens
    through `attn_implementation="fastrl"`, whatever the model was loaded with; the model is left as
    it was. Only completion tokens reach the lm-head. Returns `LogProbs` of `[B, T]` float32 in
    nats, 0 where the mask is false; as in `completion_logprobs`, to rounding, and so are the
    gradients. `inplace_backward` is linear_logprob's: faster, for one backward alone. Raises
    `ValueError` for a model that does not attend through transformers' attention interface, or has
    attention dropout while training, and for an empty prompt.
    """
    prompt_ids, ids, mask = (
        rollouts
        if isinstance(rollouts, tuple)
        else (rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask)
    )
    packed = pack_groups(prompt_ids, ids, mask)
    hidden = packed_states(model, packed)
    # A prompt's last state predicts the first token of all its completions: their gradients are
    # summed before they are rounded to the dtype of the states, and in order, which those of
    # indexing are not.
    before_first = packed.before[mask[:, :1].any(-1)]
    shared, owner = before_first.unique_consecutive(return_inverse=True)
    wide = hidden[shared].to(torch.promote_types(hidden.dtype, torch.float32))
    segment, prompt = packed.layout.segment_of_token(len(hidden))
    before_rest = torch.nonzero(segment != prompt).squeeze(-1)  # in the order of the rows
    states = torch.cat([wide.index_select(0, owner).to(hidden.dtype), hidden[before_rest]])
    first, rest = torch.nonzero(mask[:, :1]), torch.nonzero(mask[:, 1:])
    rest[:, 1] += 1
    at = torch.cat([first, rest]).unbind(1)
    head = lm_head(model)
    out = linear_logprob(
        *autocast_operands(states, head.weight),
        ids[at],
        temperature=temperature,
        entropy=entropy,
        inplace_backward=inplace_backward,
        **head.arguments(),
    )
    return LogProbs(*(None if x is None else x.new_zeros(ids.shape).index_put(at, x) for x in out))


def pad_rows(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Right-padded rows `prompt | completion`, and the column of each completion token `[B, T]`.

    Raises `ValueError` for prompts as a tensor and an empty prompt.
    """
    device = completion_ids.device
    _check_prompts(prompt_ids)
    lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    rows, steps = completion_ids.shape
    ids = torch.zeros(rows, int(lengths.max()) + steps, dtype=torch.int64)
    for row, prompt in enumerate(prompt_ids):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    at = lengths.unsqueeze(1) + torch.arange(steps, device=device)
    return ids.scatter_(1, at, completion_ids.masked_fill(~completion_mask, 0)), at


@as_forward
def completion_states(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor:
    """The last hidden states `[B, T, H]` that predict each completion token.

    Arguments and errors are those of `completion_logprobs`.
    """
    ids, at = pad_rows(prompt_ids, completion_ids, completion_mask)
    # The last column is predicted, never read.
    hidden = row_states(model, ids[:, :-1])
    return hidden.gather(1, (at - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


@as_forward
def completion_logprobs(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProbs:
    """Log-prob, logsumexp and entropy of each completion token, given all that came before.

    prompt_ids holds B non-empty lists; completion_ids `[B, T]` int64 and completion_mask `[B, T]`
    bool are right-padded. Rows are packed to the right-padded `prompt | completion`, so that causal
    attention needs no padding mask. Returns `LogProbs` of `[B, T]` float32 in nats, 0 where the
    mask is false. `inplace_backward` is linear_logprob's: faster, for one backward alone. Raises
    `ValueError` for an empty prompt.
    """
    states = completion_states(model, prompt_ids, completion_ids, completion_mask)
    return state_logprobs(
        model,
        states,
        completion_ids,
        completion_mask,
        temperature=temperature,
        entropy=entropy,
        inplace_backward=inplace_backward,
    )


def state_logprobs(
    model: nn.Module,
    states: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> LogProbs:
    """`completion_logprobs` of a model's `completion_states` `[B, T, H]`."""
    head = lm_head(model)
    return linear_logprob(
        *autocast_operands(states, head.weight),
        completion_ids.masked_fill(~completion_mask, IGNORED),
        temperature=temperature,
        ignore_index=IGNORED,
        entropy=entropy,
        inplace_backward=inplace_backward,
        **head.arguments(),
    )


@torch.no_grad()
def verify_shared_prefix(model: nn.Module) -> None:
    """Compare `group_logprobs` with `completion_logprobs` on two small groups.

    Raises `ValueError` where they differ: the model lets a token see more than its prompt and its
    own completion in a way that its class and config do not show; and as `group_logprobs` does.
    """
    check_shared_prefix(model)  # in its own mode: dropout of attention is off below
    rows = lm_head(model).weight.shape[0]
    device = next(model.parameters()).device
    prompts = [[i % rows for i in p] for p in ([1, 2, 3], [1, 2, 3], [4, 5], [4, 5])]
    ids = torch.arange(6, 18, device=device).view(4, 3) % rows
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 1:] = False
    was_training = model.training
    model.eval()
    try:
        want = completion_logprobs(model, prompts, ids, mask).logprob
        got = group_logprobs(model, (prompts, ids, mask)).logprob
    finally:
        model.train(was_training)
    tolerance = 1e-3 if lm_head(model).weight.dtype in (torch.float32, torch.float64) else 5e-2
    scale = want.abs().max().clamp(min=1.0)
    if not torch.allclose(got / scale, want / scale, atol=tolerance):
        raise ValueError(
            f"{type(unwrap(model)).__name__} computes other log-probs when the prompt is shared "
            f"(largest difference {(got - want).abs().max().item():.3g}); {INSTEAD}"
        )
