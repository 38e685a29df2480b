"""Preference and reward-model losses against hand-computed numbers and their identities."""

import math

import pytest
import torch

from fastrl import losses
from fastrl.losses.preference import DPOVariant


def row(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(x, want):
    torch.testing.assert_close(
        x.detach().double().flatten(),
        torch.as_tensor(want, dtype=torch.float64).flatten(),
        rtol=1e-7,
        atol=1e-7,
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# w = log pi/pi_ref of the chosen, l of the rejected; beta 0.5, label smoothing 0.1.
W, L, B, E = 2.0, -1.0, 0.5, 0.1
X = B * (W - L)
BY_HAND = {
    "sigmoid": -0.9 * math.log(sigmoid(X)) - 0.1 * math.log(sigmoid(-X)),
    "robust": (-0.9 * math.log(sigmoid(X)) + 0.1 * math.log(sigmoid(-X))) / 0.8,
    "hinge": max(0.0, 1 - X),
    "ipo": (W - L - 1 / (2 * B)) ** 2,
    "exo": sigmoid(X) * math.log(sigmoid(X) / 0.9) + sigmoid(-X) * math.log(sigmoid(-X) / 0.1),
    "nca": -math.log(sigmoid(B * W)) - 0.5 * math.log(sigmoid(-B * W) * sigmoid(-B * L)),
    "bco": -math.log(sigmoid(B * W)) - math.log(sigmoid(-B * L)),
    "sppo": (W - 0.5 / B) ** 2 + (L + 0.5 / B) ** 2,
    "apo_zero": 1 - sigmoid(B * W) + sigmoid(B * L),
    "apo_down": sigmoid(B * W) + 1 - sigmoid(X),
    "discopop": -(1 - sigmoid(X / 0.05)) * math.log(sigmoid(X)) + sigmoid(X / 0.05) * math.exp(-X),
}


@pytest.mark.parametrize("variant", DPOVariant.__args__)
def test_dpo_by_hand(variant):
    smoothing = {"label_smoothing": E} if variant in ("sigmoid", "robust", "exo") else {}
    four = row(-3.0), row(-7.0), row(-3.0 - W), row(-7.0 - L)
    loss, metrics = losses.dpo_loss(*four, beta=B, variant=variant, **smoothing)
    close(loss, BY_HAND[variant])
    close(metrics["margin"], X)
    close(metrics["chosen_reward"], B * W)
    close(metrics["rejected_reward"], B * L)
    assert metrics["accuracy"] == 1


def test_dpo_gradient_by_hand():
    four = row(-3.0), row(-7.0), row(-3.0 - W), row(-7.0 - L)
    loss, _ = losses.dpo_loss(*four, beta=B)
    chosen, rejected = torch.autograd.grad(loss, four[:2])
    close(chosen, -B * sigmoid(-X))
    close(rejected, B * sigmoid(-X))


def test_dpo_needs_its_reference():
    """Without pi_ref the loss is another one; a reference is an argument, not an option."""
    with pytest.raises(TypeError):
        losses.dpo_loss(row(0.0), row(0.0))
    with_ref, _ = losses.dpo_loss(row(-3.0), row(-7.0), row(-5.0), row(-6.0))
    without, _ = losses.cpo_loss(row(-3.0), row(-7.0))
    assert with_ref != without


def test_divergences_by_hand():
    four = row(-3.0), row(-7.0), row(-3.0 - W), row(-7.0 - L)
    tw, tl = math.exp(W), math.exp(L)
    for divergence, f in (
        ("forward_kl", lambda t: 1 - 1 / t),
        ("js", lambda t: math.log(2 * t / (t + 1))),
        ("alpha", lambda t: (t**-0.5 - 1) / -0.5),
    ):
        loss, _ = losses.dpo_loss(*four, beta=B, divergence=divergence)
        close(loss, -math.log(sigmoid(B * (f(tw) - f(tl)))))
    plain, _ = losses.dpo_loss(*four, beta=B)
    close(losses.dpo_loss(*four, beta=B, divergence="alpha", alpha=1.0)[0], plain.item())


def test_rpo_by_hand():
    four = row(-3.0), row(-7.0), row(-3.0 - W), row(-7.0 - L)
    loss, metrics = losses.rpo_loss(*four, torch.tensor([6]), beta=B, alpha=2.0)
    close(loss, -math.log(sigmoid(X)) + 2 * 0.5)
    close(metrics["nll"], 0.5)


def test_kto_by_hand():
    logprobs, ref = row(-1.0, -4.0), row(-3.0, -3.0)  # log ratios 2 and -1
    desirable = torch.tensor([True, False])
    z0 = losses.kto_reference_point(row(1.0, 2.0), row(0.0, 1.0))
    close(z0, 1.0)
    close(losses.kto_reference_point(row(-1.0), row(0.0)), 0.0)
    loss, metrics = losses.kto_loss(
        logprobs, ref, desirable, z0, beta=B, desirable_weight=2.0, undesirable_weight=3.0
    )
    close(loss, (2 * (1 - sigmoid(B * (2 - 1))) + 3 * (1 - sigmoid(B * (1 + 1)))) / 2)
    close(metrics["desirable_reward"], 1.0)
    close(metrics["undesirable_reward"], -0.5)


def test_reference_free_losses_by_hand():
    w, l = row(-0.5), row(-1.5)  # noqa: E741
    close(
        losses.simpo_loss(w, l, beta=2.0, gamma=0.5)[0],
        -math.log(sigmoid(2 * (-0.5 + 1.5) - 0.5)),
    )
    close(losses.cpo_loss(w, l, beta=2.0)[0], -math.log(sigmoid(2.0)))

    def odds(x):
        return math.exp(x) / (1 - math.exp(x))

    loss, metrics = losses.orpo_loss(w, l, beta=0.2)
    ratio = math.log(odds(-0.5) / odds(-1.5))
    close(loss, 0.5 - 0.2 * math.log(sigmoid(ratio)))
    close(metrics["log_odds_ratio"], ratio)


def test_bradley_terry_by_hand():
    chosen, rejected = row(2.0, 0.0), row(1.0, 1.0)
    loss, metrics = losses.bradley_terry_loss(chosen, rejected)
    close(loss, -(math.log(sigmoid(1)) + math.log(sigmoid(-1))) / 2)
    assert loss > 0 and metrics["accuracy"] == 0.5
    grad = torch.autograd.grad(loss, chosen)[0]
    assert (grad < 0).all()  # a step down raises the chosen reward: the loss has its minus
    margin = torch.tensor([0.5, 0.0], dtype=torch.float64)
    loss, _ = losses.bradley_terry_loss(chosen, rejected, margin=margin, centering=0.1)
    close(
        loss,
        -(math.log(sigmoid(0.5)) + math.log(sigmoid(-1))) / 2 + 0.1 * (9 + 1) / 2,
    )
    loss, _ = losses.bradley_terry_loss(chosen, rejected, label_smoothing=0.2)
    both = math.log(sigmoid(1)) + math.log(sigmoid(-1))
    close(loss, -both / 2)  # the two pairs mirror each other, so smoothing changes nothing
    loss, _ = losses.bradley_terry_loss(row(1.0), row(0.0), label_smoothing=0.2)
    close(loss, -0.8 * math.log(sigmoid(1)) - 0.2 * math.log(sigmoid(-1)))


def test_classification_by_hand():
    labels = torch.tensor([1.0, 0.0, 0.5])
    loss, metrics = losses.classification_loss(row(1.0, 2.0, 0.0), labels)
    close(loss, -(math.log(sigmoid(1)) + math.log(sigmoid(-2)) + math.log(0.5)) / 3)
    close(metrics["accuracy"], 2 / 3)


def test_plackett_luce_by_hand():
    e = math.exp
    rewards = row(2.0, 0.0, 1.0).unsqueeze(0)
    first = -math.log(e(2) / (e(2) + e(0) + e(1)))
    second = -math.log(e(0) / (e(0) + e(1)))
    loss, metrics = losses.plackett_luce_loss(rewards)
    close(loss, first + second)
    close(metrics["accuracy"], 2 / 3)
    close(losses.plackett_luce_loss(rewards, top_k=1)[0], first)
    holes = torch.tensor([[True, True, False]])
    poisoned = rewards.detach().clone()
    poisoned[0, 2] = float("nan")
    poisoned.requires_grad_()
    loss, _ = losses.plackett_luce_loss(poisoned, holes)
    pair, _ = losses.bradley_terry_loss(row(2.0), row(0.0))
    close(loss, pair.item())
    grad = torch.autograd.grad(loss, poisoned)[0]
    close(grad, [-sigmoid(-2), sigmoid(-2), 0.0])


PAIRED = {
    **{
        f"dpo {v}": (
            lambda x, w, v=v: losses.dpo_loss(
                x[0],
                x[1],
                x[2],
                x[3],
                variant=v,
                weights=w,
                **({"label_smoothing": 0.1} if v == "exo" else {}),
            )
        )
        for v in DPOVariant.__args__
    },
    "dpo forward_kl": lambda x, w: losses.dpo_loss(*x[:4], divergence="forward_kl", weights=w),
    "rpo": lambda x, w: losses.rpo_loss(*x[:4], torch.full_like(x[0], 3.0), weights=w),
    "kto": lambda x, w: losses.kto_loss(x[0], x[1], x[2] > x[3], 0.3, weights=w),
    "simpo": lambda x, w: losses.simpo_loss(x[0], x[1], weights=w),
    "cpo": lambda x, w: losses.cpo_loss(x[0], x[1], weights=w),
    "orpo": lambda x, w: losses.orpo_loss(-x[0].abs(), -x[1].abs(), weights=w),
    "bradley_terry": lambda x, w: losses.bradley_terry_loss(x[0], x[1], centering=0.1, weights=w),
    "classification": lambda x, w: losses.classification_loss(x[0], (x[2] > 0).double(), weights=w),
    "plackett_luce": lambda x, w: losses.plackett_luce_loss(x.T, weights=w),
    "spin": lambda x, w: losses.spin_loss(*x[:4], weights=w),
}


@pytest.mark.parametrize("name", PAIRED)
def test_micro_batches_add_up(name):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    whole, _ = PAIRED[name](x, None)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    parts = sum(PAIRED[name](x[:, s], weights[s])[0] for s in (slice(0, 1), slice(1, 5)))
    torch.testing.assert_close(parts, whole)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("size", [0.0, 1e-9, 300.0, 1e6])
def test_extreme_log_probs_have_finite_gradients(name, size):
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    x = (size * signs).requires_grad_()
    loss, metrics = PAIRED[name](x, None)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()
    assert all(torch.isfinite(m) for m in metrics.values())


@pytest.mark.parametrize("name", PAIRED)
def test_no_rows_are_a_loss_of_zero(name):
    x = torch.zeros(4, 0, requires_grad=True)
    loss, metrics = PAIRED[name](x, None)
    assert loss == 0 and all(torch.isfinite(m) for m in metrics.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.dpo_loss(x, x, x, x, beta=0.0), "beta=0.0"),
        (lambda x: losses.dpo_loss(x, x, x, x, variant="dpo"), "variant='dpo'"),
        (lambda x: losses.dpo_loss(x, x, x, x[:1]), "ref_rejected_logprobs"),
        (lambda x: losses.dpo_loss(x, x, x, x, divergence="kl"), "divergence='kl'"),
        (lambda x: losses.dpo_loss(x, x, x, x, variant="nca", divergence="js"), "no meaning"),
        (lambda x: losses.dpo_loss(x, x, x, x, variant="ipo", label_smoothing=0.1), "no meaning"),
        (lambda x: losses.dpo_loss(x, x, x, x, variant="exo"), "label_smoothing above 0"),
        (lambda x: losses.dpo_loss(x, x, x, x, label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda x: losses.dpo_loss(x, x, x, x, weights=x[:1]), "weights"),
        (lambda x: losses.kto_loss(x, x, x, 0.0), "desirable must be bool"),
        (lambda x: losses.classification_loss(x, x + 5), "labels"),
        (lambda x: losses.plackett_luce_loss(x), r"\[B, K\]"),
        (lambda x: losses.plackett_luce_loss(x[None], top_k=0), "top_k=0"),
        (lambda x: losses.spin_loss(x, x, x, x, lam=0.0), "lam=0.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2))
