"""Our losses beside TRL's own code on the same random tensors.

`python tests/conformance.py` prints the table of docs/conformance.md; test_losses_trl.py asserts
it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import trl_reference as theirs
from torch import Tensor

from fastrl import losses


@dataclass
class Rollouts:
    """Six completions of up to seven tokens; the leaves are those with gradients."""

    logprobs: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def random(cls, seed: int) -> "Rollouts":
        g = torch.Generator().manual_seed(seed)
        mask = torch.arange(7) < torch.tensor([[7], [3], [1], [6], [5], [2]])
        logprobs = -2 * torch.rand(6, 7, generator=g)
        near = [logprobs + 0.4 * torch.randn(6, 7, generator=g) for _ in range(3)]
        entropy = torch.rand(6, 7, generator=g)
        leaves = logprobs.requires_grad_(), entropy.requires_grad_()
        return cls(*leaves, *near_detached(near), torch.randn(6, generator=g), mask)

    @property
    def five(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logprobs, self.old, self.advantages, self.mask

    def weights(self, reduction: str) -> Tensor:
        return losses.token_weights(self.mask, reduction, max_completion_length=11)


def near_detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


@dataclass
class Pairs:
    """Four comparisons, per token; the leaves are those of the policy."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor

    @classmethod
    def random(cls, seed: int) -> "Pairs":
        g = torch.Generator().manual_seed(seed)
        masks = (
            torch.arange(7) < torch.tensor([[7], [3], [1], [6]]),
            torch.arange(7) < torch.tensor([[2], [5], [4], [7]]),
        )
        policy = [-2 * torch.rand(4, 7, generator=g) for _ in range(2)]
        ref = [p + torch.randn(4, 7, generator=g) for p in policy]
        return cls(*(p.requires_grad_() for p in policy), *near_detached(ref), *masks)

    def sums(self, average: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def total(x: Tensor, mask: Tensor) -> Tensor:
            return losses.sequence_logprobs(x, mask, average=average)

        return (
            total(self.chosen, self.chosen_mask),
            total(self.rejected, self.rejected_mask),
            total(self.ref_chosen, self.chosen_mask),
            total(self.ref_rejected, self.rejected_mask),
        )


# A case returns (ours, TRL's, the leaves to differentiate by).
Case = Callable[[int], tuple[Tensor, Tensor, list[Tensor]]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[name] = function
        return function

    return add


def _policy(reduction, ours, loss_type, **settings) -> Case:
    def run(seed):
        b = Rollouts.random(seed)
        mine = ours(b, b.weights(reduction))
        mine = mine[0] if isinstance(mine, tuple) else mine
        return mine, theirs.grpo(b, loss_type, **settings), [b.logprobs]

    return run


for _reduction in ("grpo", "dapo", "bnpo", "dr_grpo"):
    CASES[f"policy_loss, {_reduction}, KL k3"] = _policy(
        _reduction,
        lambda b, w: losses.policy_loss(
            *b.five, w, eps_high=0.28, ref_logprobs=b.ref, kl_coef=0.05
        ),
        _reduction,
        epsilon_high=0.28,
        beta=0.05,
    )
CASES["policy_loss, sequence_sum (TRL luspo)"] = _policy(
    "sequence_sum",
    lambda b, w: losses.policy_loss(*b.five, w, ratio_level="sequence"),
    "luspo",
    importance_sampling_level="sequence",
)
CASES["kl_loss, times rho"] = _policy(
    "dapo",
    lambda b, w: (
        losses.policy_loss(*b.five, w)[0]
        + losses.kl_loss(b.logprobs, b.ref, b.mask, w, coef=0.1, old_logprobs=b.old)[0]
    ),
    "dapo",
    beta=0.1,
    use_bias_correction_kl=True,
)
CASES["gspo_loss"] = _policy(
    "grpo",
    lambda b, w: losses.gspo_loss(*b.five, w, eps_low=0.05, eps_high=0.06),
    "grpo",
    importance_sampling_level="sequence",
    epsilon_low=0.05,
    epsilon_high=0.06,
)
CASES["cispo_loss"] = _policy(
    "dapo",
    lambda b, w: losses.cispo_loss(*b.five, w, max_ratio=1.2),
    "cispo",
    epsilon_high=1.2,
)
CASES["sapo_loss"] = _policy("grpo", lambda b, w: losses.sapo_loss(*b.five, w), "sapo")
CASES["policy_loss with off_policy_mask"] = _policy(
    "dapo",
    lambda b, w: losses.policy_loss(
        *b.five,
        w,
        importance_weights=losses.off_policy_mask(b.logprobs, b.sampler, b.advantages, b.mask, 0.0),
    ),
    "dapo",
    off_policy_mask_threshold=0.0,
)
CASES["policy_loss with high_entropy_mask"] = _policy(
    "dapo",
    lambda b, w: losses.policy_loss(
        *b.five, w, importance_weights=losses.high_entropy_mask(b.entropy, b.mask, 0.6).float()
    ),
    "dapo",
    top_entropy_quantile=0.4,
)


@case("policy_loss with mismatch_weights")
def _(seed):
    b = Rollouts.random(seed)
    factor = losses.mismatch_weights(b.old, b.sampler, b.mask, "token_truncate", high=1.1)
    ours, _ = losses.policy_loss(*b.five, b.weights("dapo"), importance_weights=factor)
    ratio = theirs.grpo_advantages(
        torch.zeros(6), 2, "group", (b.old, b.sampler, b.mask, "token_truncate", None, 1.1)
    )
    return ours, theirs.grpo(b, "dapo", importance_weights=ratio), [b.logprobs]


@case("policy_loss, sequence_sum ratio (TRL RLOO)")
def _(seed):
    b = Rollouts.random(seed)
    ours, _ = losses.policy_loss(*b.five, b.weights("grpo"), ratio_level="sequence_sum")
    return ours, theirs.rloo(b), [b.logprobs]


@case("gmpo_loss")
def _(seed):
    b = Rollouts.random(seed)
    ours, _ = losses.gmpo_loss(*b.five, b.weights("grpo"), eps_low=0.2, eps_high=0.3)
    return ours, theirs.gmpo(b, epsilon_low=0.2, epsilon_high=0.3), [b.logprobs]


@case("entropy_loss")
def _(seed):
    b = Rollouts.random(seed)
    w = b.weights("dapo")
    ours = (
        losses.policy_loss(*b.five, w)[0] + losses.entropy_loss(b.entropy, b.mask, w, coef=0.01)[0]
    )
    return ours, theirs.grpo(b, "dapo", entropy_coef=0.01), [b.logprobs, b.entropy]


for _scale, _theirs in ((True, "group"), (False, "none"), ("batch", "batch")):

    @case(f"grpo_advantages, scale={_scale}")
    def _(seed, scale=_scale, name=_theirs):
        rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        ours = losses.grpo_advantages(rewards, 4, scale=scale)
        return ours, theirs.grpo_advantages(rewards, 4, name), []


@case("rloo_advantages")
def _(seed):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    return losses.rloo_advantages(rewards, 4), theirs.rloo_advantages(rewards, 4), []


for _kind in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):

    @case(f"mismatch_weights, {_kind}")
    def _(seed, kind=_kind):
        b = Rollouts.random(seed)
        ours = losses.mismatch_weights(b.old, b.sampler, b.mask, kind, low=0.6, high=1.3)
        ratio = theirs.grpo_advantages(
            torch.zeros(6), 2, "group", (b.old, b.sampler, b.mask, kind, 0.6, 1.3)
        )
        return ours, torch.where(b.mask, ratio.expand(b.mask.shape), 0.0), []


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


def difference(name: str, seeds: int = 5) -> tuple[float, float]:
    """Largest absolute difference over random tensors, of the values and of the gradients."""
    value = gradient = 0.0
    for seed in range(seeds):
        ours, want, leaves = CASES[name](seed)
        value = max(value, (ours.detach() - want.detach()).abs().max().item())
        if leaves:
            pairs = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (ours, want))
            for a, b in zip(*pairs, strict=True):
                gradient = max(gradient, (a - b).abs().max().item())
    return value, gradient


if __name__ == "__main__":
    print("| ours | values | gradients |\n| --- | --- | --- |")
    for _name in CASES:
        _value, _gradient = difference(_name)
        print(f"| {_name} | {_value:.1e} | {_gradient:.1e} |")
