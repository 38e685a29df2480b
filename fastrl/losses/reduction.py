"""How per-token losses become one number: explicit weights, computed once over the global batch."""

from typing import get_args

import torch
from torch import Tensor

from fastrl.choices import Reduction

REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def token_weights(
    completion_mask: Tensor, reduction: Reduction, *, max_completion_length: int | None = None
) -> Tensor:
    """Weight of each token in the loss, so that `loss = sum(weights * per_token_loss)`.

    With m the mask, n_i the tokens of row i, B rows, N = sum n_i:
    grpo `m / (n_i B)` (2402.03300); dapo and bnpo `m / N` (2503.14476); dr_grpo `m / (B L_max)`
    (2503.20783); sequence_sum `m / B`, under which REINFORCE is unbiased. Computed over all rows of
    an optimizer step before they are split into micro-batches, the sum over micro-batches equals
    the whole batch exactly; that also makes bnpo, which other trainers normalise per micro-batch,
    the same as dapo.

    completion_mask `[B, T]` bool. Returns `[B, T]` float32; rows and batches without tokens weigh
    0. Raises `ValueError` for an unknown reduction and for dr_grpo without a positive
    max_completion_length.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    mask = completion_mask.float()
    rows = max(mask.shape[0], 1)
    if reduction == "grpo":
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * rows)
    if reduction == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(
                f"max_completion_length={max_completion_length} must be positive for "
                f"reduction='dr_grpo'"
            )
        return mask / (rows * max_completion_length)
    if reduction == "sequence_sum":
        return mask / rows
    return mask / mask.sum().clamp(min=1)


def sequence_logprobs(
    logprobs: Tensor, completion_mask: Tensor, *, average: bool = False
) -> Tensor:
    """Log-prob of each completion, the sum over its tokens; with average their mean.

    logprobs and completion_mask (bool) `[B, T]`; returns `[B]`, 0 for a row without tokens. Masked
    entries may hold anything. This is what the preference losses take.
    """
    check_tokens(completion_mask, logprobs=logprobs)
    total = torch.where(completion_mask, logprobs, 0.0).sum(-1)
    return total / completion_mask.sum(-1).clamp(min=1) if average else total


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the true entries of mask, 0 where there are none.

    Masked entries may hold NaN.
    """
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def weighted_rows(per_row: Tensor, weights: Tensor | None) -> Tensor:
    """`sum(weights * per_row)`, or without weights the mean (0 of no rows); both `[B]`."""
    if weights is None:
        return per_row.sum() / max(per_row.shape[0], 1)
    if weights.shape != per_row.shape:
        raise ValueError(f"weights must be {tuple(per_row.shape)}, got {tuple(weights.shape)}")
    return (weights * per_row).sum()


def check_tokens(mask: Tensor, **tensors: Tensor | None) -> None:
    """Raise `ValueError` for a mask that is not bool `[B, T]` and for tensors of another shape."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(
            f"completion_mask must be bool [B, T], got {mask.dtype} {tuple(mask.shape)}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(
                f"{name} must have the shape of completion_mask, {tuple(mask.shape)}, got "
                f"{tuple(tensor.shape)}"
            )


def check_rows(**tensors: Tensor | None) -> None:
    """Raise `ValueError` for tensors that are not `[B]` with one B for all."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    for name, tensor in given.items():
        if tensor.dim() != 1 or tensor.shape != first.shape:
            raise ValueError(
                f"{name} must be [B] like {next(iter(given))} with shape {tuple(first.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
