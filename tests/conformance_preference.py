"""Preference, reward-model and distillation losses beside TRL's code."""

import math

import torch
import trl_reference as theirs
from conformance_data import CASES, Case, Pairs, Rollouts, case

from fastrl import losses


def _dpo(ours, loss_types, **settings) -> Case:
    def run(seed):
        p = Pairs.random(seed)
        return ours(p)[0], theirs.dpo(p, loss_types, **settings), [p.chosen, p.rejected]

    return run


for _variant, _name, _options in (
    ("sigmoid", "sigmoid", {}),
    ("robust", "robust", {"label_smoothing": 0.1}),
    ("hinge", "hinge", {}),
    ("exo", "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", "nca_pair", {}),
    ("bco", "bco_pair", {}),
    ("sppo", "sppo_hard", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("discopop", "discopop", {}),
):
    CASES[f"dpo_loss, {_variant}"] = _dpo(
        lambda p, v=_variant, o=_options: losses.dpo_loss(*p.sums(), variant=v, **o),
        [_name],
        **_options,
    )
for _divergence, _name in (
    ("forward_kl", "forward_kl"),
    ("js", "js_divergence"),
    ("alpha", "alpha_divergence"),
):
    CASES[f"dpo_loss, divergence {_divergence}"] = _dpo(
        lambda p, d=_divergence: losses.dpo_loss(*p.sums(), divergence=d),
        ["sigmoid"],
        f_divergence_type=_name,
    )
CASES["dpo_loss, ipo, averaged log-probs"] = _dpo(
    lambda p: losses.dpo_loss(*p.sums(average=True), variant="ipo"), ["ipo"]
)
CASES["dpo_loss, averaged log-probs"] = _dpo(
    lambda p: losses.dpo_loss(*p.sums(average=True)), ["sigmoid_norm"]
)
CASES["dpo_loss + sft_loss (RPO)"] = _dpo(
    lambda p: (
        losses.dpo_loss(*p.sums())[0]
        + losses.sft_loss(p.chosen, p.chosen_mask, losses.token_weights(p.chosen_mask, "dapo"))[0],
        {},
    ),
    ["sigmoid", "sft"],
)


@case("kto_loss, kto_reference_point")
def _(seed):
    p = Pairs.random(seed)
    g = torch.Generator().manual_seed(seed)
    other, ref_other = torch.randn(8, generator=g) + 0.5, torch.randn(8, generator=g)
    chosen, rejected, ref_chosen, ref_rejected = p.sums()
    ours, _ = losses.kto_loss(
        torch.cat([chosen, rejected]),
        torch.cat([ref_chosen, ref_rejected]),
        torch.arange(8) < 4,
        losses.kto_reference_point(other, ref_other),
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    want = theirs.kto(p, other, ref_other, desirable_weight=1.3, undesirable_weight=0.7)
    return ours, want, [p.chosen, p.rejected]


@case("kto_loss, reference point 0 (APO-zero unpaired)")
def _(seed):
    p = Pairs.random(seed)
    chosen, rejected, ref_chosen, ref_rejected = p.sums()
    ours, _ = losses.kto_loss(
        torch.cat([chosen, rejected]),
        torch.cat([ref_chosen, ref_rejected]),
        torch.arange(8) < 4,
        0.0,
    )
    want = theirs.kto(p, None, None, loss_type="apo_zero_unpaired", calculate_KL=False)
    return ours, want, [p.chosen, p.rejected]


@case("simpo_loss")
def _(seed):
    p = Pairs.random(seed)
    w, l, *_ = p.sums(average=True)  # noqa: E741
    ours, _ = losses.simpo_loss(w, l, beta=2.0, gamma=0.7, label_smoothing=0.1)
    return ours, theirs.cpo(w, l, "simpo", 2.0, 0.1, simpo_gamma=0.7), [p.chosen, p.rejected]


@case("cpo_loss")
def _(seed):
    p = Pairs.random(seed)
    w, l, *_ = p.sums()  # noqa: E741
    ours, _ = losses.cpo_loss(w, l, label_smoothing=0.1)
    return ours, theirs.cpo(w, l, "sigmoid", 0.1, 0.1), [p.chosen, p.rejected]


@case("orpo_loss, nll_coef=0")
def _(seed):
    p = Pairs.random(seed)
    w, l, *_ = p.sums(average=True)  # noqa: E741
    ours, _ = losses.orpo_loss(w, l, nll_coef=0.0)
    return ours, theirs.orpo_odds(w, l, 0.1), [p.chosen, p.rejected]


for _margin in (False, True):

    @case(f"bradley_terry_loss{', margin and centring' if _margin else ''}")
    def _(seed, with_margin=_margin):
        g = torch.Generator().manual_seed(seed)
        chosen, rejected = (torch.randn(5, generator=g).requires_grad_() for _ in range(2))
        margin = torch.rand(5, generator=g) if with_margin else None
        ours, _ = losses.bradley_terry_loss(
            chosen, rejected, margin=margin, centering=0.01 * with_margin
        )
        want = theirs.reward(chosen, rejected, margin, 0.01 if with_margin else None)
        return ours, want, [chosen, rejected]


for _beta, _what in ((0.0, "forward KL"), (0.3, "JSD"), (1.0, "reverse KL")):

    @case(f"distillation_loss, {_what}")
    def _(seed, beta=_beta):
        g = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(6, 7, 13, generator=g) for _ in range(2))
        mask = Rollouts.random(seed).mask
        student.requires_grad_()
        weights = losses.token_weights(mask, "dapo")
        ours, _ = losses.distillation_loss(student, teacher, weights, beta=beta, temperature=1.7)
        return ours, theirs.gkd(student, teacher, mask, beta, 1.7), [student]

    @case(f"linear_distillation_loss, {_what}")
    def _(seed, beta=_beta):
        g = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(6, 7, n, generator=g) for n in (8, 5))
        heads = [torch.randn(151, n, generator=g) / math.sqrt(n) for n in (8, 5)]
        mask = Rollouts.random(seed).mask
        leaves = [student.requires_grad_(), heads[0].requires_grad_()]
        ours, _ = losses.linear_distillation_loss(
            student,
            {"weight": heads[0]},
            teacher,
            {"weight": heads[1]},
            losses.token_weights(mask, "dapo"),
            beta=beta,
            temperature=1.7,
            chunk=5,
        )
        want = theirs.distillation(student, heads[0], teacher, heads[1], mask, beta, 1.7)
        return ours, want, leaves
