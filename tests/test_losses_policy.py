"""Policy losses, KL, entropy, value and mismatch against hand-computed numbers."""

import math

import pytest
import torch

from fastrl import losses
from fastrl.losses import POLICY_LOSSES


def one_row(*ratios, advantage=1.0):
    """logprobs with a gradient, zero old_logprobs, the advantage, a full mask, unit weights."""
    logprobs = torch.log(torch.tensor([ratios], dtype=torch.float64)).requires_grad_()
    ones = torch.ones(1, len(ratios), dtype=torch.float64)
    return (logprobs, 0 * ones, torch.tensor([advantage], dtype=torch.float64), ones.bool(), ones)


def close(x, want):
    torch.testing.assert_close(
        x.detach().double().flatten(),
        torch.as_tensor(want, dtype=torch.float64).flatten(),
        rtol=1e-6,
        atol=1e-6,
    )


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


def test_gspo_by_hand():
    # s = sqrt(2 * 0.5) = 1 for the row, whatever the tokens.
    row = one_row(2.0, 0.5)
    loss, metrics = losses.gspo_loss(*row)
    close(loss, -2.0)
    close(metrics["ratio"], 1.0)
    close(gradient(loss, row[0]), [-1.0, -1.0])  # two tokens, each d s / d logprob = s / 2
    # s = 1.2 is above the clip: the loss is the bound, and there is no gradient.
    row = one_row(1.44, 1.0)
    loss, metrics = losses.gspo_loss(*row)
    close(loss, -2 * (1 + 4e-4))
    close(metrics["clip_fraction"], 1.0)
    close(gradient(loss, row[0]), [0.0, 0.0])


def test_gspo_token_has_the_same_value_and_token_gradients():
    row = one_row(2.0, 0.6, advantage=-1.0)
    wide = {"eps_low": 0.5, "eps_high": 0.5}
    loss, _ = losses.gspo_loss(*row, **wide)
    token, _ = losses.gspo_loss(*row, token_level=True, **wide)
    close(token, loss)
    s = math.sqrt(1.2)
    close(gradient(token, row[0]), [s, s])
    logprobs, old, _, mask, weights = row
    per_token = torch.tensor([[1.0, -2.0]])
    loss, _ = losses.gspo_loss(logprobs, old, per_token, mask, weights, token_level=True, **wide)
    close(gradient(loss, logprobs), [-s, 2 * s])


def test_sequence_sum_ratio_is_the_completions():
    row = one_row(2.0, 0.6, advantage=-1.0)
    loss, _ = losses.policy_loss(*row, ratio_level="sequence_sum")
    close(loss, 2 * 1.2)
    close(gradient(loss, row[0]), [2.4, 2.4])


def test_cispo_by_hand():
    row = one_row(3.0, 0.5, advantage=2.0)
    loss, metrics = losses.cispo_loss(*row, max_ratio=1.5)
    close(loss, -2 * (1.5 * math.log(3) + 0.5 * math.log(0.5)))
    close(gradient(loss, row[0]), [-3.0, -1.0])  # the clipped token keeps its gradient
    close(metrics["clip_fraction"], 0.5)
    loss, _ = losses.cispo_loss(*row, max_ratio=1.5, min_ratio=0.8)
    close(gradient(loss, row[0]), [-3.0, -1.6])


def test_sapo_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    loss, _ = losses.sapo_loss(*one_row(1.5, 1.0))
    close(loss, -4 * (sigmoid(0.5) + 0.5))
    row = one_row(1.5, 1.0, advantage=-2.0)
    loss, _ = losses.sapo_loss(*row, tau_neg=2.0)
    close(loss, 2 * 2 * (sigmoid(1.0) + 0.5))
    close(gradient(loss, row[0])[0, 1], 2.0)  # on policy, REINFORCE's, for any tau


def test_gmpo_by_hand():
    # A > 0: min(log rho, clip) = (0.4, log 0.5); the mean is (0.4 + log 0.5) / 2.
    row = one_row(2.0, 0.5)
    loss, metrics = losses.gmpo_loss(*row)
    close(loss, -2 * math.exp((0.4 + math.log(0.5)) / 2))
    close(metrics["clip_fraction"], 0.5)
    # A < 0: max(log rho, clip) = (log 2, -0.4).
    loss, _ = losses.gmpo_loss(*one_row(2.0, 0.5, advantage=-1.0))
    close(loss, 2 * math.exp((math.log(2) - 0.4) / 2))


def test_reinforce_by_hand():
    logprobs, _, _, mask, weights = one_row(0.5, 0.25)
    advantages = torch.tensor([[2.0, -1.0]])
    loss, metrics = losses.reinforce_loss(logprobs, advantages, mask, weights)
    close(loss, -2 * math.log(0.5) + math.log(0.25))
    close(gradient(loss, logprobs), [-2.0, 1.0])
    close(metrics["nll"], (math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_gradient_is_reinforce(name):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    logprobs = -torch.rand(3, 5, generator=g)
    logprobs.requires_grad_()
    advantages = torch.randn(3, generator=g)
    weights = losses.token_weights(mask, "grpo")
    loss, _ = POLICY_LOSSES[name](logprobs, logprobs.detach(), advantages, mask, weights)
    torch.testing.assert_close(gradient(loss, logprobs), -advantages.unsqueeze(1) * weights)


def test_covariance_selection_by_hand():
    # Over the tokens of the mask the means are 0 and -2, the covariances 2, -1, 2, -1.
    logprobs = torch.tensor([[-1.0, -3.0], [-3.0, -1.0], [9.0, 9.0]])
    advantages = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [7.0, 7.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    top = losses.kl_cov_mask(logprobs, advantages, mask, fraction=0.5)
    assert top.tolist() == [[True, False], [True, False], [False, False]]
    band = losses.clip_cov_mask(logprobs, logprobs, advantages, mask, fraction=1.0)
    assert band.tolist() == top.tolist()
    far = logprobs - torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # The first token's ratio is e > 1.2 with A > 0: already clipped, so not drawn.
    band = losses.clip_cov_mask(logprobs, far, advantages, mask, fraction=1.0)
    assert band.tolist() == [[False, False], [True, False], [False, False]]
    one = [
        losses.clip_cov_mask(
            logprobs, logprobs, advantages, mask, generator=torch.Generator().manual_seed(i)
        )
        for i in range(8)
    ]
    assert all(x.sum() == 1 for x in one) and len({tuple(x.flatten().tolist()) for x in one}) == 2


def test_covariance_losses_by_hand():
    row = one_row(1.1, 0.9, advantage=2.0)
    selected = torch.tensor([[True, False]])
    loss, metrics = losses.clip_cov_loss(*row, selected=selected)
    close(loss, -1.8)
    close(gradient(loss, row[0]), [0.0, -1.8])
    close(metrics["selected"], 0.5)
    loss, _ = losses.kl_cov_loss(*row, selected=selected, kl_coef=0.5)
    close(loss, -4.0 + 0.5 * math.log(1.1))
    close(gradient(loss, row[0]), [-2.2 + 0.5, -1.8])


def test_importance_weights_scale_the_loss_and_get_no_gradient():
    row = one_row(1.1, 0.9)
    w = torch.tensor([[0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = losses.policy_loss(*row, importance_weights=w)
    close(loss, -0.55)
    assert torch.autograd.grad(loss, w, allow_unused=True) == (None,)
    loss, _ = losses.policy_loss(*row, importance_weights=torch.tensor([[3.0]]))
    close(loss, -6.0)


def test_kl_gradients():
    # d = log 2: the gradients are 1, d, 1 - exp(-d); with "+" that of k2.
    logprobs, ref, _, mask, weights = one_row(2.0)
    d = math.log(2)
    for name, value, slope in (
        ("k1", d, 1.0),
        ("k2", d * d / 2, d),
        ("k3", 0.5 + d - 1, 0.5),
        ("k1+", d, d),
        ("k3+", 0.5 + d - 1, d),
    ):
        loss, metrics = losses.kl_loss(logprobs, ref, mask, weights, coef=2.0, estimator=name)
        close(loss, 2 * value)
        close(metrics["kl"], value)
        close(gradient(loss, logprobs), 2 * slope)
    # Times rho = 2: the value doubles, and d (rho k3) = rho k3 + rho k3'.
    loss, _ = losses.kl_loss(logprobs, ref, mask, weights, coef=1.0, old_logprobs=ref)
    close(loss, 2 * (0.5 + d - 1))
    close(gradient(loss, logprobs), 2 * (0.5 + d - 1) + 1.0)


def test_entropy_bonus_has_a_gradient():
    entropy = torch.tensor([[0.5, 1.5, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    weights = losses.token_weights(mask, "dapo")
    loss, metrics = losses.entropy_loss(entropy, mask, weights, coef=0.1)
    close(loss, -0.1)
    close(metrics["entropy"], 1.0)
    close(gradient(loss, entropy), [-0.05, -0.05, 0.0])


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 2.0, 0.0, 9.0]], requires_grad=True)
    old = torch.tensor([[0.5, 2.1, 0.0, 9.0]])
    returns = torch.tensor([[2.0, 2.0, 1.0, float("nan")]])
    mask = torch.tensor([[True, True, True, False]])
    ones = torch.ones(1, 4) * mask
    # Clipped values 0.7, 2, 0: the worst squares are 1.69, 0, 1.
    loss, metrics = losses.value_loss(values, old, returns, mask, ones)
    close(loss, (1.69 + 0 + 1) / 2)
    close(metrics["value_clip_fraction"], 1 / 3)
    close(metrics["value_error"], (1 + 0 + 1) / 3)
    close(gradient(loss, values), [0.0, 0.0, -1.0, 0.0])
    loss, _ = losses.value_loss(values, old, returns, mask, ones, clip=None)
    close(loss, (1 + 0 + 1) / 2)


def test_mismatch_weights_by_hand():
    # w = 2, 0.25 | 1.2, 1; products 0.5 and 1.2; geometric means sqrt 0.5 and sqrt 1.2.
    old = torch.log(torch.tensor([[2.0, 0.25, 5.0], [1.2, 1.0, 9.0]]))
    mask = torch.tensor([[True, True, False], [True, True, False]])

    def at(kind, **options):
        got = losses.mismatch_weights(old, torch.zeros(2, 3), mask, kind, **options)
        assert not got[:, 2].any()
        return got[:, :2]

    close(at("token_truncate", high=1.5), [1.5, 0.25, 1.2, 1.0])
    close(at("token_mask", high=1.5), [0.0, 0.25, 1.2, 1.0])
    close(at("icepop"), [2.0, 0.0, 1.2, 1.0])
    close(at("sequence_truncate", high=1.0), [0.5, 0.5, 1.0, 1.0])
    close(at("sequence_mask", low=0.6), [0.0, 0.0, 1.2, 1.2])
    close(at("geometric_mask", low=0.8), [0.0, 0.0, math.sqrt(1.2), math.sqrt(1.2)])
    close(at("token_mask", high=math.inf), [2.0, 0.25, 1.2, 1.0])
    nan = torch.full((2, 3), float("nan"))
    close(losses.mismatch_weights(old, nan, mask)[:, :2], [1.0] * 4)


def test_mismatch_metrics_by_hand():
    old = torch.tensor([[math.log(2), -math.log(2), float("nan")]])
    mask = torch.tensor([[True, True, False]])
    got = losses.mismatch_metrics(old, torch.zeros(1, 3), mask)
    close(got["mismatch_mean"], math.log(2))
    close(got["mismatch_max"], math.log(2))
    close(got["mismatch_k3"], (2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / 2)
    nothing = losses.mismatch_metrics(old, old, torch.zeros(1, 3, dtype=torch.bool))
    assert all(x == 0 for x in nothing.values())


def test_rows_and_tokens_to_leave_out():
    logprobs = torch.tensor([[-3.0, -3.0], [-3.0, -3.0], [-1.0, -1.0]])
    sampler = torch.tensor([[-1.0, -1.0]] * 3)
    mask = torch.ones(3, 2, dtype=torch.bool)
    keep = losses.off_policy_mask(logprobs, sampler, torch.tensor([-1.0, 1.0, -1.0]), mask, 1.9)
    assert keep.tolist() == [[0.0], [1.0], [1.0]]
    entropy = torch.tensor([[0.1, 0.4, 9.0], [0.2, 0.3, 0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    high = losses.high_entropy_mask(entropy, mask, 0.5)  # the median of five is 0.3
    assert high.tolist() == [[False, True, False], [False, True, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: losses.policy_loss(*r, eps_low=1.5), "eps_low=1.5"),
        (lambda r: losses.policy_loss(*r, dual_clip=1.0), "dual_clip=1.0"),
        (lambda r: losses.policy_loss(*r, kl_coef=0.1), "kl_coef=0.1 needs ref_logprobs"),
        (lambda r: losses.policy_loss(*r, ratio_level="row"), "ratio_level='row'"),
        (lambda r: losses.policy_loss(*r, log_ratio_clamp=0.0), "log_ratio_clamp=0.0"),
        (lambda r: losses.policy_loss(*r[:3], r[4], r[4]), "completion_mask must be bool"),
        (lambda r: losses.policy_loss(r[0], r[1][:, :1], *r[2:]), "old_logprobs"),
        (lambda r: losses.policy_loss(*r, importance_weights=r[2]), "importance_weights"),
        (lambda r: losses.cispo_loss(*r, max_ratio=0.5, min_ratio=0.6), "max_ratio=0.5"),
        (lambda r: losses.sapo_loss(*r, tau_pos=0.0), "tau_pos=0.0"),
        (lambda r: losses.gmpo_loss(*r, eps_low=-1.0), "eps_low=-1.0"),
        (lambda r: losses.kl_cov_mask(r[0], r[2], r[3], fraction=0.0), "fraction=0.0"),
        (lambda r: losses.value_loss(*r[:2], r[0], r[3], r[4], clip=0.0), "clip=0.0"),
        (lambda r: losses.mismatch_weights(r[0], r[1], r[3], "tis"), "kind='tis'"),
        (lambda r: losses.mismatch_weights(r[0], r[1], r[3], low=4.0), "low=4.0"),
        (lambda r: losses.high_entropy_mask(r[0], r[3], 2.0), "quantile=2.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(one_row(1.0, 1.0))
