"""How per-token losses become one number: explicit weights, computed once over the global batch."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["grpo", "dapo", "bnpo", "dr_grpo"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def token_weights(
    completion_mask: Tensor, reduction: Reduction, *, max_completion_length: int | None = None
) -> Tensor:
    """Weight of each token in the loss, so that `loss = sum(weights * per_token_loss)`.

    With m the mask, n_i the tokens of row i, B rows, N = sum n_i:
    grpo `m / (n_i B)` (2402.03300); dapo and bnpo `m / N` (2503.14476); dr_grpo `m / (B L_max)`
    (2503.20783). Computed over all rows of an optimizer step before they are split into
    micro-batches, the sum over micro-batches equals the whole batch exactly; that also makes bnpo,
    which other trainers normalise per micro-batch, the same as dapo.

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
    return mask / mask.sum().clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the true entries of mask, 0 where there are none.

    Masked entries may hold NaN.
    """
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
