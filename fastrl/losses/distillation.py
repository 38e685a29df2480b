"""Distillation from a teacher, on the policy's own samples or on any other tokens."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrl.kernels import discounted_returns
from fastrl.kernels.logprob.reference import project
from fastrl.losses.reduction import check_tokens


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of student and teacher over the whole vocabulary: `sum(weights * per_token)`.

    beta = 1 is the reverse KL(student || teacher), beta = 0 the forward KL(teacher || student), and
    between them the generalised JSD `beta KL(teacher || m) + (1 - beta) KL(student || m)` with
    `m = beta teacher + (1 - beta) student`, as in TRL. Logits `[..., V]`, divided by the
    temperature; weights `[...]`, of which a chunk of tokens takes its part; a token of weight 0
    may hold anything. Metric `distillation`, the mean over tokens with weight, in nats. Sources:
    2306.13649, 2306.08543.
    """
    _check(beta, temperature)
    if student_logits.shape != teacher_logits.shape or weights.shape != student_logits.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must be [..., V] and weights [...], got "
            f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}, {tuple(weights.shape)}"
        )
    kept = weights != 0
    per_token = _divergence(student_logits[kept], teacher_logits[kept], beta, temperature)
    loss = (weights[kept] * per_token).sum()
    return loss, {"distillation": per_token.detach().sum() / kept.sum().clamp(min=1)}


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Mapping[str, Any],
    teacher_hidden: Tensor,
    teacher_head: Mapping[str, Any],
    weights: Tensor,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    chunk: int = 128,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distillation_loss` from hidden states, `chunk` tokens at a time, never holding `[N, V]`.

    student_hidden `[..., H]`, teacher_hidden `[..., H']`, weights `[...]`; heads are
    `{"weight": [V, H], ...}` with bias, softcap and logit_scale as `LmHead.arguments()` gives
    them. The logits of a chunk are computed again in the backward pass; those of tokens with weight
    0 never.
    """
    _check(beta, temperature)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if hidden.shape[:-1] != weights.shape:
            raise ValueError(
                f"{name} must be {[*weights.shape, 'H']} for the weights given, got "
                f"{tuple(hidden.shape)}"
            )
    kept = weights != 0
    student, teacher = student_hidden[kept], teacher_hidden[kept].detach()

    def piece(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = project(y, **teacher_head)
        return _divergence(project(x, **student_head), target, beta, temperature)

    # An empty batch keeps its place in the graph.
    total, mean = student.sum() * 0.0, student.new_zeros((), dtype=torch.float32)
    for x, y, w in zip(*(t.split(chunk) for t in (student, teacher, weights[kept])), strict=True):
        per_token = checkpoint(piece, x, y, use_reentrant=False)
        total, mean = total + (w * per_token).sum(), mean + per_token.detach().sum()
    return total, {"distillation": mean / kept.sum().clamp(min=1)}


def distillation_advantages(
    old_logprobs: Tensor, teacher_logprobs: Tensor, completion_mask: Tensor, *, gamma: float = 0.0
) -> Tensor:
    """Advantages whose policy gradient is that of the reverse KL to a teacher, from sampled tokens.

    The reward of a token is `teacher_logprobs - old_logprobs`; its advantage is the discounted sum
    from there on. gamma = 0 takes each token's own KL, given its prefix, as `distillation_loss`
    with beta = 1 does for the whole vocabulary; gamma = 1 is the KL between distributions over
    whole completions. All `[B, T]`, completion_mask bool; returns `[B, T]`, for `policy_loss` or
    `reinforce_loss`. Source: 2306.08543.
    """
    check_tokens(completion_mask, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs)
    gap = torch.where(completion_mask, teacher_logprobs - old_logprobs, 0.0).detach()
    return discounted_returns(gap, gamma=gamma, mask=completion_mask)


def _check(beta: float, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie in [0, 1]: 0 forward KL, 1 reverse KL")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def _divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Per-token divergence `[N]` of logits `[N, V]`."""
    p, q = (
        torch.log_softmax((x if x.dtype == torch.float64 else x.float()) / temperature, -1)
        for x in (student, teacher)
    )
    if beta == 0:
        return _kl(q, p)
    if beta == 1:
        return _kl(p, q)
    # logaddexp of two -inf has no gradient.
    floor = torch.finfo(p.dtype).min / 2
    mixture = torch.logaddexp(
        p.clamp(min=floor) + math.log1p(-beta), q.clamp(min=floor) + math.log(beta)
    )
    return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs; a token that p excludes contributes nothing, to the gradient too."""
    excluded = p == -torch.inf
    gap = p.masked_fill(excluded, 0.0) - q.masked_fill(excluded, 0.0)
    return (p.exp() * gap).sum(-1)
