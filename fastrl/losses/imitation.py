"""Losses that learn from demonstrations."""

import torch
from torch import Tensor

from fastrl.losses.reduction import masked_mean


def sft_loss(
    logprobs: Tensor, completion_mask: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of demonstrations: `sum(weights * -logprobs)`.

    logprobs, completion_mask (bool) and weights (see `token_weights`) are `[B, T]`. Returns the
    scalar loss and, as means over the masked tokens, the metric `nll`, in nats.
    """
    nll = torch.where(completion_mask, -logprobs, 0.0)
    return (weights * nll).sum(), {"nll": masked_mean(nll.detach(), completion_mask)}
