"""Imitation and distillation losses against hand-computed numbers and their identities."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastrl import losses


def close(x, want, tolerance=1e-6):
    torch.testing.assert_close(
        x.detach().double().flatten(),
        torch.as_tensor(want, dtype=torch.float64).flatten(),
        rtol=tolerance,
        atol=tolerance,
    )


def softplus(x):
    return math.log1p(math.exp(x))


def test_discriminator_by_hand():
    demo, policy = torch.tensor([1.0, -2.0]), torch.tensor([0.5])
    loss, metrics = losses.discriminator_loss(demo, policy)
    close(loss, ((softplus(-1) + softplus(2)) / 2 + softplus(0.5)) / 2)
    assert metrics["demo_accuracy"] == 0.5 and metrics["policy_accuracy"] == 0
    close(metrics["demo_logit"], -0.5)
    # Token level, two sides of unequal shape, one masked NaN.
    demo = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    policy = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    demo_mask = torch.tensor([[True, False]])
    policy_mask = torch.tensor([[True, True, True], [False, False, False]])
    loss, metrics = losses.discriminator_loss(
        demo,
        policy,
        losses.token_weights(demo_mask, "dapo"),
        losses.token_weights(policy_mask, "dapo"),
        demo_mask=demo_mask,
        policy_mask=policy_mask,
    )
    close(loss, (softplus(-1) + (softplus(0.5) + softplus(-1) + softplus(2)) / 3) / 2)
    close(torch.autograd.grad(loss, demo)[0], [-0.5 / (1 + math.e), 0.0])
    close(metrics["policy_accuracy"], 1 / 3)


def test_discriminator_is_binary_cross_entropy():
    demo, policy = torch.randn(7), torch.randn(7)
    labels = torch.cat([torch.ones(7), torch.zeros(7)])
    want = F.binary_cross_entropy_with_logits(torch.cat([demo, policy]), labels)
    torch.testing.assert_close(losses.discriminator_loss(demo, policy)[0], want)


def test_imitation_rewards_by_hand():
    f = torch.tensor([1.0, -1.0, 1e9])
    at = lambda kind: losses.imitation_rewards(f, kind)  # noqa: E731
    close(at("airl"), [1.0, -1.0, 20.0])
    close(at("gail"), [softplus(1), softplus(-1), softplus(20)])
    close(at("gail_saturating"), [-softplus(-1), -softplus(1), -softplus(-20)])
    close(at("forward_kl"), [math.e, math.exp(-1), math.exp(20)])
    close(at("fairl"), [-math.e, math.exp(-1), -20 * math.exp(20)])
    # gail less gail_saturating is airl: log D - log(1 - D) is the logit.
    close(at("gail") + at("gail_saturating"), at("airl"))


def test_spin_is_dpo_on_demonstrations_and_samples():
    four = [torch.randn(5) for _ in range(4)]
    spin, _ = losses.spin_loss(*four, lam=0.3)
    dpo, _ = losses.dpo_loss(*four, beta=0.3)
    assert spin == dpo
    d = four[0] - four[2] - four[1] + four[3]
    torch.testing.assert_close(spin, F.softplus(-0.3 * d).mean())


def test_iqlearn_by_hand():
    logprobs = torch.tensor([[-1.0, 7.0, -2.0, float("nan")]], requires_grad=True)
    lse = torch.tensor([[3.0, 9.0, 4.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False]])
    weights = mask.float()
    # Q = 2 and 2; V' is 4, across the masked token, and 0: rewards 2 - 0.5 * 4 = 0 and 2.
    loss, metrics = losses.iqlearn_loss(logprobs, lse, mask, weights, alpha=0.5, gamma=0.5)
    close(loss, 1 + 2 + (0 + 4) / 2)
    close(metrics["iq_reward"], 1.0)
    close(metrics["nll"], 1.5)
    grad = torch.autograd.grad(loss, [logprobs, lse], retain_graph=True)
    close(grad[0], [-1.0, 0.0, -1.0 + 2 * 2 / 2, 0.0])
    close(grad[1], [0.0, 0.0, 2.0, 0.0])
    # With 3 as the value after the last token its reward is 2 - 1.5.
    loss, _ = losses.iqlearn_loss(
        logprobs, lse, mask, weights, alpha=0.5, gamma=0.5, bootstrap=torch.tensor([3.0])
    )
    close(loss, 3 + 0.25 / 2)


def test_iqlearn_with_large_alpha_is_sft():
    logprobs = -torch.rand(3, 4, dtype=torch.float64)
    logprobs.requires_grad_()
    lse = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    weights = losses.token_weights(mask, "dapo")
    sft = torch.autograd.grad(losses.sft_loss(logprobs, mask, weights)[0], logprobs)[0]
    apart = []
    for alpha in (1e3, 1e6):
        loss, _ = losses.iqlearn_loss(logprobs, lse, mask, weights, alpha=alpha)
        apart.append((torch.autograd.grad(loss, logprobs)[0] - sft).abs().max().item())
    assert apart[1] < 1e-6
    assert apart[0] / apart[1] == pytest.approx(1000, rel=1e-3)


def test_distillation_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    one = torch.ones(1)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    close(losses.distillation_loss(p.log(), q.log(), one)[0], reverse)
    close(losses.distillation_loss(p.log(), q.log(), one, beta=0.0)[0], forward)
    m = [0.3 * 0.5 + 0.7 * 0.75, 0.3 * 0.5 + 0.7 * 0.25]
    jsd = 0.3 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    jsd += 0.7 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    loss, metrics = losses.distillation_loss(p.log(), q.log(), 2 * one, beta=0.3)
    close(loss, 2 * jsd)
    close(metrics["distillation"], jsd)
    tempered, _ = losses.distillation_loss(2 * p.log(), 2 * q.log(), one, temperature=2.0)
    close(tempered, reverse)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_distillation_in_chunks_and_with_poisoned_tokens(beta):
    student = torch.randn(3, 4, 151, dtype=torch.float64)
    teacher = torch.randn(3, 4, 151, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    weights = losses.token_weights(mask, "grpo").double()
    student[~mask] = teacher[~mask] = float("nan")
    student.requires_grad_()
    whole, _ = losses.distillation_loss(student, teacher, weights, beta=beta)
    chunks = zip(*(t.flatten(0, 1).split(5) for t in (student, teacher)), strict=True)
    parts = [
        losses.distillation_loss(s, t, w, beta=beta)[0]
        for (s, t), w in zip(chunks, weights.flatten().split(5), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    grads = [torch.autograd.grad(x, student)[0] for x in (sum(parts), whole)]
    torch.testing.assert_close(*grads)
    assert torch.isfinite(grads[1]).all() and not grads[1][~mask].any()


def test_linear_distillation_equals_distillation_of_its_logits():
    hidden, wide = torch.randn(2, 7, 6, requires_grad=True), torch.randn(2, 7, 9)
    weight, bias = torch.randn(32, 6, requires_grad=True), torch.randn(32, requires_grad=True)
    head = {"weight": weight, "bias": bias, "softcap": 4.0, "logit_scale": 0.5}
    teacher = {"weight": torch.randn(32, 9)}
    weights = torch.rand(2, 7)
    weights[0, 3] = 0
    options = {"beta": 0.6, "temperature": 1.3}
    logits = 4 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4)
    want, _ = losses.distillation_loss(logits, wide @ teacher["weight"].T, weights, **options)
    want_grads = torch.autograd.grad(want, [hidden, weight, bias])
    for chunk in (1, 4, 512):
        got, _ = losses.linear_distillation_loss(
            hidden, head, wide, teacher, weights, chunk=chunk, **options
        )
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, [hidden, weight, bias]), want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    nothing, _ = losses.linear_distillation_loss(hidden, head, wide, teacher, 0 * weights)
    assert nothing == 0 and not torch.autograd.grad(nothing, hidden)[0].any()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_excluded_tokens_and_extreme_logits(beta):
    """A vocabulary that both models exclude in part, and probabilities far below float32."""
    student = torch.tensor([[0.0, 300.0, -torch.inf, -1e4]], requires_grad=True)
    teacher = torch.tensor([[5.0, 0.0, -torch.inf, -300.0]])
    loss, _ = losses.distillation_loss(student, teacher, torch.ones(1), beta=beta)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_sampled_distillation_has_the_gradient_of_the_reverse_kl():
    """In expectation over the student's own tokens."""
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(0)
    full, _ = losses.distillation_loss(
        logits[None], teacher[None], torch.ones(1, dtype=torch.float64)
    )
    want = torch.autograd.grad(full, logits)[0]
    # Each token is one row, weighted by its probability.
    logprobs = logits.log_softmax(0)
    now = logprobs.detach().unsqueeze(1)
    mask = torch.ones(9, 1, dtype=torch.bool)
    advantages = losses.distillation_advantages(now, teacher.unsqueeze(1), mask)
    loss, _ = losses.policy_loss(logprobs.unsqueeze(1), now, advantages, mask, now.exp())
    got = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: losses.discriminator_loss(x, x), "demo_mask and demo_weights"),
        (lambda x, m: losses.discriminator_loss(x[0], x[0], demo_mask=m), "demo_mask is for"),
        (lambda x, m: losses.imitation_rewards(x, "bc"), "kind='bc'"),
        (lambda x, m: losses.imitation_rewards(x, max_logit=0.0), "max_logit=0.0"),
        (lambda x, m: losses.iqlearn_loss(x, x, m, x, alpha=0.0), "alpha=0.0"),
        (lambda x, m: losses.iqlearn_loss(x, x, m, x, gamma=1.1), "gamma=1.1"),
        (lambda x, m: losses.iqlearn_loss(x, x[:, :1], m, x), "lse must"),
        (lambda x, m: losses.iqlearn_loss(x, x, m, x, bootstrap=x[0]), "bootstrap"),
        (lambda x, m: losses.distillation_loss(x, x, x), r"\[..., V\]"),
        (lambda x, m: losses.distillation_loss(x, x, x[:, 0], beta=2.0), "beta=2.0"),
        (lambda x, m: losses.distillation_loss(x, x, x[:, 0], temperature=0.0), "temperature"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
