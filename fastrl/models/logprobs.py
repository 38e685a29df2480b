"""Per-token log-probs of completions under a model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrl.kernels import LogProbs, linear_logprob
from fastrl.models.head import as_forward, backbone, lm_head

IGNORED = -100


@as_forward
def completion_logprobs(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> LogProbs:
    """Log-prob, logsumexp and entropy of each completion token, given all that came before.

    prompt_ids holds B non-empty lists; completion_ids `[B, T]` int64 and completion_mask `[B, T]`
    bool are right-padded. Rows are packed to the right-padded `prompt | completion`, so that causal
    attention needs no padding mask. Returns `LogProbs` of `[B, T]` float32 in nats, 0 where the
    mask is false. Raises `ValueError` for an empty prompt.
    """
    device = completion_ids.device
    lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    if (lengths == 0).any():
        raise ValueError(
            "prompt_ids holds an empty prompt; a completion needs at least one token before it"
        )
    rows, steps = completion_ids.shape
    ids = torch.zeros(rows, int(lengths.max()) + steps, dtype=torch.int64)
    for row, prompt in enumerate(prompt_ids):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    at = lengths.unsqueeze(1) + torch.arange(steps, device=device)
    ids.scatter_(1, at, completion_ids.masked_fill(~completion_mask, 0))
    # The last column is predicted, never read.
    hidden = backbone(model)(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    hidden = hidden.gather(1, (at - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    head = lm_head(model)
    return linear_logprob(
        hidden,
        head.weight,
        completion_ids.masked_fill(~completion_mask, IGNORED),
        temperature=temperature,
        ignore_index=IGNORED,
        entropy=entropy,
        **head.arguments(),
    )
