"""Losses that fit a policy to preferences directly.

Log-probs are of whole completions, `[B]`, from `sequence_logprobs`: sums, or means over the tokens
where the argument is called an average. Per-row losses are averaged, or weighted by `weights` `[B]`
(1 / B of the whole step, under micro-batches). Implied rewards in the metrics are
`beta log pi / pi_ref`; metrics are means over the rows. Raises `ValueError` for tensors of unequal
shape and options that do not fit.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.losses.kl import LOG_RATIO_CLAMP
from fastrl.losses.reduction import check_rows, weighted_rows

DPOVariant = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo",
    "nca",
    "bco",
    "sppo",
    "apo_zero",
    "apo_down",
    "discopop",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Loss = tuple[Tensor, dict[str, Tensor]]

# The variants that see the pair only through the difference of its two scores, and of these the
# ones with label smoothing.
_PAIRED = ("sigmoid", "robust", "hinge", "ipo", "exo", "discopop")
_SMOOTHED = ("sigmoid", "robust", "exo")


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    variant: DPOVariant = "sigmoid",
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
    weights: Tensor | None = None,
) -> Loss:
    """DPO and its relatives, on `w = log pi/pi_ref (y+)`, `l = log pi/pi_ref (y-)`, `D = w - l`.

    With s the logistic sigmoid, e the label_smoothing, b the beta:
    sigmoid `-(1 - e) log s(b D) - e log s(-b D)` (2305.18290; e > 0 is cDPO);
    robust `(-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2 e)` (2403.00409);
    hinge `max(0, 1 - b D)` (SLiC, 2305.10425);
    ipo `(D - 1 / (2 b))^2` (2310.12036), of averaged log-probs in TRL;
    exo `KL(s(+-b D) || (1 - e, e))`, e > 0 (2402.00856);
    nca `-log s(b w) - log s(-b w) / 2 - log s(-b l) / 2` (2402.05369);
    bco `-log s(b w) - log s(-b l)` (2404.04656, without its reference point);
    sppo `(w - 1 / (2 b))^2 + (l + 1 / (2 b))^2` (2405.00675);
    apo_zero `1 - s(b w) + s(b l)`, apo_down `s(b w) + 1 - s(b D)` (2408.06266);
    discopop `-(1 - g) log s(b D) + g exp(-b D)`, g = s(b D / discopop_tau) (2406.08414).

    divergence replaces w and l, in those that use D, by f'(pi / pi_ref): forward_kl `1 - 1/t`, js
    `log 2t/(t + 1)`, alpha `(t^(a-1) - 1) / (a - 1)` (2309.16240). Log-probs `[B]`. Metrics
    `accuracy`, `margin`, `chosen_reward`, `rejected_reward`.
    """
    if variant not in get_args(DPOVariant):
        raise ValueError(
            f"variant={variant!r} is unknown; use one of {', '.join(get_args(DPOVariant))}"
        )
    check_beta(beta)
    _check_smoothing(label_smoothing, variant)
    if divergence != "reverse_kl" and variant not in _PAIRED:
        raise ValueError(f"divergence={divergence!r} has no meaning with variant={variant!r}")
    check_rows(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    chosen = chosen_logprobs - ref_chosen_logprobs
    rejected = rejected_logprobs - ref_rejected_logprobs
    if variant in _PAIRED:
        gap = _score(chosen, divergence, alpha) - _score(rejected, divergence, alpha)
        per_pair = _paired(gap, beta, variant, label_smoothing, discopop_tau)
    else:
        per_pair = _separate(chosen, rejected, beta, variant)
    return weighted_rows(per_pair, weights), _metrics(beta * chosen, beta * rejected)


def rpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    weights: Tensor | None = None,
) -> Loss:
    """Iterative RPO: DPO plus `alpha` times the chosen completion's NLL per token.

    chosen_lengths `[B]` in tokens. TRL averages the NLL over the batch's tokens: that is
    `dpo_loss` plus alpha times `sft_loss` with the weights of reduction dapo. Source: 2404.19733.
    """
    check_rows(chosen_logprobs=chosen_logprobs, chosen_lengths=chosen_lengths)
    loss, metrics = dpo_loss(
        chosen_logprobs,
        rejected_logprobs,
        ref_chosen_logprobs,
        ref_rejected_logprobs,
        beta=beta,
        weights=weights,
    )
    nll = -chosen_logprobs / chosen_lengths.clamp(min=1)
    metrics["nll"] = weighted_rows(nll.detach(), None)
    return loss + alpha * weighted_rows(nll, weights), metrics


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
) -> Loss:
    """KTO: unpaired completions, each judged desirable or not, against the reference point z0.

    With `h = log pi/pi_ref`: `desirable_weight (1 - s(beta (h - z0)))` for the desirable,
    `undesirable_weight (1 - s(beta (z0 - h)))` for the others. reference_point is a scalar (see
    `kto_reference_point`); 0 gives the unpaired APO-zero. logprobs, ref_logprobs and desirable
    (bool) `[B]`. Metrics `desirable_reward`, `undesirable_reward`, `reference_point`. Source:
    2402.01306.
    """
    check_beta(beta)
    check_rows(logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    z0 = torch.as_tensor(reference_point, dtype=logprobs.dtype, device=logprobs.device).detach()
    ratio = logprobs - ref_logprobs
    # 1 - s(x) = s(-x), which does not cancel.
    good, bad = torch.sigmoid(beta * (z0 - ratio)), torch.sigmoid(beta * (ratio - z0))
    per_row = torch.where(desirable, desirable_weight * good, undesirable_weight * bad)
    rewards = (beta * ratio).detach()
    metrics = {
        "desirable_reward": _mean_of(rewards, desirable),
        "undesirable_reward": _mean_of(rewards, ~desirable),
        "reference_point": z0,
    }
    return weighted_rows(per_row, weights), metrics


@torch.no_grad()
def kto_reference_point(
    logprobs: Tensor, ref_logprobs: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """KTO's z0: the mean of `log pi/pi_ref`, at least 0, of prompts with others' completions.

    logprobs and ref_logprobs `[B]` of mismatched pairs (x_i, y_j), over the whole step. Returns a
    scalar without gradient. Source: 2402.01306.
    """
    check_rows(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return weighted_rows(logprobs - ref_logprobs, weights).clamp(min=0)


def simpo_loss(
    chosen_average: Tensor,
    rejected_average: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Loss:
    """SimPO: `-log s(beta (w - l) - gamma)` on averaged log-probs, without a reference.

    label_smoothing as in `dpo_loss`. Source: 2405.14734.
    """
    check_beta(beta)
    _check_smoothing(label_smoothing, "sigmoid")
    check_rows(chosen_average=chosen_average, rejected_average=rejected_average)
    gap = chosen_average - rejected_average - gamma / beta
    per_pair = _paired(gap, beta, "sigmoid", label_smoothing, 1.0)
    metrics = _metrics(beta * chosen_average, beta * rejected_average)
    return weighted_rows(per_pair, weights), metrics


def cpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Loss:
    """CPO's preference term, `-log s(beta (log pi(y+) - log pi(y-)))`.

    The whole of CPO adds `sft_loss` on the chosen completions. Source: 2401.08417.
    """
    check_beta(beta)
    _check_smoothing(label_smoothing, "sigmoid")
    check_rows(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    gap = chosen_logprobs - rejected_logprobs
    per_pair = _paired(gap, beta, "sigmoid", label_smoothing, 1.0)
    metrics = _metrics(beta * chosen_logprobs, beta * rejected_logprobs)
    return weighted_rows(per_pair, weights), metrics


def orpo_loss(
    chosen_average: Tensor,
    rejected_average: Tensor,
    *,
    beta: float = 0.1,
    nll_coef: float = 1.0,
    weights: Tensor | None = None,
) -> Loss:
    """ORPO: `-nll_coef w - beta log s(log odds(w) - log odds(l))`, `odds(p) = p / (1 - p)`.

    w and l are averaged log-probs `[B]`, at most 0. TRL's NLL runs over prompt and completion and
    is a mean over the batch's tokens: for it pass nll_coef=0 and add `sft_loss`. Metrics those of
    `dpo_loss` and `log_odds_ratio`. Source: 2403.07691.
    """
    check_beta(beta)
    check_rows(chosen_average=chosen_average, rejected_average=rejected_average)
    log_odds = (chosen_average - rejected_average) - (
        _log1mexp(chosen_average) - _log1mexp(rejected_average)
    )
    per_pair = -nll_coef * chosen_average - beta * F.logsigmoid(log_odds)
    metrics = _metrics(beta * chosen_average, beta * rejected_average)
    metrics["log_odds_ratio"] = weighted_rows(log_odds.detach(), None)
    return weighted_rows(per_pair, weights), metrics


def check_beta(beta: float) -> None:
    """Raise `ValueError` unless positive."""
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")


def _check_smoothing(label_smoothing: float, variant: str) -> None:
    if label_smoothing and variant not in _SMOOTHED:
        raise ValueError(f"label_smoothing={label_smoothing} has no meaning with {variant!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 0.5)")
    if variant == "exo" and label_smoothing == 0:
        raise ValueError("variant='exo' needs a label_smoothing above 0; its paper uses 1e-3")


def _score(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return log_ratio
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=LOG_RATIO_CLAMP))
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "alpha":
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=LOG_RATIO_CLAMP)) / (alpha - 1)
    raise ValueError(
        f"divergence={divergence!r} is unknown; use one of {', '.join(get_args(Divergence))}"
    )


def _paired(gap: Tensor, beta: float, variant: str, smoothing: float, tau: float) -> Tensor:
    x = beta * gap
    right, wrong = F.logsigmoid(x), F.logsigmoid(-x)
    if variant == "hinge":
        return torch.relu(1 - x)
    if variant == "ipo":
        return (gap - 1 / (2 * beta)).square()
    if variant == "exo":
        return right.exp() * (right - math.log1p(-smoothing)) + wrong.exp() * (
            wrong - math.log(smoothing)
        )
    if variant == "robust":
        return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)
    if variant == "discopop":
        # One exponential of the product: its second factor alone overflows where the first is 0.
        gate = F.logsigmoid(x / tau)
        return -F.logsigmoid(-x / tau).exp() * right + (gate - x).exp()
    return -(1 - smoothing) * right - smoothing * wrong


def _separate(chosen: Tensor, rejected: Tensor, beta: float, variant: str) -> Tensor:
    w, l = beta * chosen, beta * rejected  # noqa: E741
    if variant == "nca":
        return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)
    if variant == "bco":
        return -F.logsigmoid(w) - F.logsigmoid(-l)
    if variant == "sppo":
        return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    if variant == "apo_zero":
        return torch.sigmoid(-w) + torch.sigmoid(l)
    return torch.sigmoid(w) + torch.sigmoid(l - w)  # apo_down


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, the nearest negative number in place of 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # Each branch sees only arguments where its gradient is finite.
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "accuracy": weighted_rows((chosen > rejected).to(chosen.dtype), None),
        "margin": weighted_rows(chosen - rejected, None),
        "chosen_reward": weighted_rows(chosen, None),
        "rejected_reward": weighted_rows(rejected, None),
    }


def _mean_of(x: Tensor, which: Tensor) -> Tensor:
    return torch.where(which, x, 0.0).sum() / which.sum().clamp(min=1)
