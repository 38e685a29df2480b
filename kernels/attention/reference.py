"""The plain PyTorch truth for attention: a dense mask over the packed tokens."""

import torch
from torch import Tensor

from fastrl.kernels.attention.layout import GroupLayout


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def shared_prefix_attention(
    q, k, v, layout: GroupLayout, *, scale, softcap=None, window=None
) -> tuple[Tensor, Tensor]:
    """The output in the dtype of the inputs, and the logsumexp of each query's scores."""
    share = q.shape[1] // k.shape[1]
    keys, values = (_wide(x).repeat_interleave(share, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", _wide(q), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.mask(window, len(q)), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out.to(q.dtype), scores.logsumexp(-1).T
