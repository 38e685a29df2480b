"""TRL's fused lm-head, and what it computes from logits, through fastrl's ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.kernels import entropy_of_logits, need_kernel
from fastrl.kernels import linear_logprob, linear_sample, logprob_from_logits
from fastrl.models.head import autocast_operands

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def chunked(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's fused lm-head, log-probs without logits, through `linear_logprob`."""

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = STATISTICS,
    ) -> tuple[Tensor | None, ...]:
        need_kernel("linear_logprob", hidden, weight)
        states, matrix = autocast_operands(hidden, weight)
        head: dict[str, Any] = {
            "bias": bias,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        out = linear_logprob(
            *(states, matrix, targets),
            temperature=temperature,
            entropy="entropy" in outputs,
            **head,
        )
        given: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
        given["entropy"] = out.entropy
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                # sum p^2 = sum exp(2 z) / (sum exp z)^2, and 2 z are the logits at T / 2
                squared = linear_logprob(
                    states, matrix, targets, temperature=temperature / 2, **head
                )
                given["log_sum_sq_probs"] = squared.lse - 2 * out.lse
            if "mean_logits" in outputs and final_logit_softcapping is None:
                # linear without a softcap, so one row stands for the vocabulary
                row = matrix.mean(0, dtype=torch.float32)
                offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
                with torch.autocast(hidden.device.type, enabled=False):
                    mean = states.float() @ row + offset
                given["mean_logits"] = mean * (logit_scale / temperature)
            if "is_top1" in outputs and not hidden.is_cuda:
                zeros = torch.zeros_like(targets)
                greedy = linear_sample(
                    states, matrix, seeds=zeros, positions=zeros, temperature=0.0, **head
                )
                given["is_top1"] = greedy.token == targets
            missing = tuple(name for name in outputs if given.get(name, out.logprob) is None)
            if missing:
                theirs = original(
                    *(hidden, weight, bias, targets, temperature, chunk_size),
                    *(final_logit_softcapping, logit_scale, missing),
                )
                given |= {n: theirs[1 + STATISTICS.index(n)] for n in missing}
        return out.logprob, *given.values()

    return apply


def labelled_tokens_only(original: Callable[[torch.device], bool]) -> Callable[..., bool]:
    """Whether TRL's lm-head drops the tokens without a label first: it always does on a GPU."""

    def _use_triton(device: torch.device) -> bool:
        return original(device) or device.type == "cpu"

    return _use_triton


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    need_kernel("logprob_from_logits", logits)
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, 0)
    logprob = logprob_from_logits(logits, index, temperature=temperature).logprob
    return logprob if row_mask is None else logprob.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return entropy_of_logits(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    need_kernel("logprob_from_logits", logits)
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, 0)
    logprob, _, entropy = logprob_from_logits(logits, index, temperature=temperature, entropy=True)
    assert entropy is not None
    if not entropy_requires_grad:
        entropy = entropy.detach()
    if row_mask is None:
        return logprob, entropy
    return logprob.masked_fill(row_mask == 0, 0.0), entropy.masked_fill(row_mask == 0, 0.0)
