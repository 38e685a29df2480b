"""Optima on an enumerable token MDP against closed forms: learning from demonstrations."""

import pytest
import token_mdp as mdp
import torch
from token_mdp import BATCH_MASK, COUNT, PROMPTS, same

from fastrl import losses


def discriminator(demo, logits, start, steps=None):
    """Sequence-level logits `[X, 15]`, trained on exact samples of both."""
    sides = [(x.exp() / PROMPTS).flatten() for x in (demo, mdp.sequence(logits).detach())]

    def loss(f):
        return losses.discriminator_loss(f.flatten(), f.flatten(), *sides)[0]

    return mdp.minimise(loss, start, steps=steps or 300)[0]


def test_the_optimal_logit_is_the_log_density_ratio():
    demo, logits = mdp.sequence(mdp.policy(7)), mdp.policy(8)
    f = discriminator(demo, logits, torch.zeros(PROMPTS, COUNT, dtype=torch.float64))
    same(f, demo - mdp.sequence(logits), 1e-3)


def token_discriminator(demo, policy, start, steps):
    """Logits of each prefix and token, `[X, 7, 3]`, trained on exact samples of both."""
    sides = [mdp.expectation(x) for x in (demo, policy)]

    def loss(table):
        f = mdp.at_tokens(table)
        masks = {"demo_mask": BATCH_MASK, "policy_mask": BATCH_MASK}
        return losses.discriminator_loss(f, f, *sides, **masks)[0]

    return mdp.minimise(loss, start, steps=steps)[0]


def test_the_optimal_token_logit_is_the_ratio_of_occupancies():
    demo, other = mdp.policy(7), mdp.policy(8)
    table = token_discriminator(demo, other, torch.zeros_like(demo), steps=300)
    seen, own = (mdp.expectation(x).view(PROMPTS, -1) @ mdp.CHOICES.T for x in (demo, other))
    same(table.view(PROMPTS, -1), seen.log() - own.log(), 2e-3)


def imitation_gradient(kind, f, logits):
    """Of the loss whose descent raises the expected reward, at a fixed discriminator."""
    reward = losses.imitation_rewards(f, kind).flatten()
    now, weights = mdp.logprobs(logits), mdp.expectation(logits)
    loss, _ = losses.reinforce_loss(now, reward, BATCH_MASK, weights)
    return torch.autograd.grad(loss, logits)[0]


def test_which_divergence_each_imitation_reward_descends():
    """With the optimal discriminator: the gradient is that of the divergence itself."""
    demo, logits = mdp.sequence(mdp.policy(9)), mdp.policy(10).requires_grad_()
    now = mdp.sequence(logits)
    middle = torch.logaddexp(demo, now) - torch.tensor(2.0).log()

    def kl(p, q):
        return (p.exp() * (p - q)).sum() / PROMPTS

    f = (demo - now).detach()
    for kind, divergence in (
        ("airl", kl(now, demo)),
        ("gail", kl(demo, middle) + kl(now, middle)),
        ("forward_kl", kl(demo, now)),
    ):
        want = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
        same(imitation_gradient(kind, f, logits), want, 1e-12)


def test_the_published_fairl_reward_leaves_the_demonstrations():
    """Near them f exp(f) is f: its gradient is that of airl, upside down."""
    demo = mdp.policy(9)
    logits = (demo + 1e-4 * mdp.policy(10)).requires_grad_()
    f = (mdp.sequence(demo) - mdp.sequence(logits)).detach()
    away, back = (imitation_gradient(k, f, logits) for k in ("fairl", "airl"))
    same(away / back.abs().max(), -back / back.abs().max(), 1e-2)


@pytest.mark.parametrize("kind", ["airl", "gail", "gail_saturating", "forward_kl"])
def test_adversarial_imitation_converges_to_the_demonstrations(kind):
    demo, start = mdp.sequence(mdp.policy(9, 0.7)), mdp.policy(10)
    f = torch.zeros(PROMPTS, COUNT, dtype=torch.float64)

    def step(logits):
        nonlocal f
        f = discriminator(demo, logits, f, steps=8)
        reward = losses.imitation_rewards(f, kind)
        mean = (reward * mdp.sequence(logits).detach().exp()).sum(-1, keepdim=True)
        return losses.reinforce_loss(
            mdp.logprobs(logits), (reward - mean).flatten(), BATCH_MASK, mdp.expectation(logits)
        )[0]

    assert mdp.distance(mdp.sequence(start), demo) > 0.3
    got = mdp.sequence(mdp.descend(step, start, 200, 0.2))
    assert mdp.distance(got, demo) < 1e-2
    assert (got.exp() * f.abs()).sum(-1).max() < 2e-2  # nothing left to tell them apart by


def test_token_level_airl_converges_to_the_demonstrations():
    demo, start = mdp.policy(9, 0.7), mdp.policy(10)
    table = torch.zeros_like(demo)

    def step(logits):
        nonlocal table
        table = token_discriminator(demo, logits.detach(), table, steps=8)
        reward = losses.imitation_rewards(mdp.at_tokens(table), "airl")
        to_go = reward.flip(-1).cumsum(-1).flip(-1)
        weights = mdp.expectation(logits)
        return losses.reinforce_loss(mdp.logprobs(logits), to_go, BATCH_MASK, weights)[0]

    got = mdp.sequence(mdp.descend(step, start, 200, 0.2))
    assert mdp.distance(got, mdp.sequence(demo)) < 1e-2


@pytest.mark.parametrize("mode", ["demos against initial", "SFT samples against initial"])
def test_afd_recovers_the_expert(mode):
    """RL on the one-shot logit with KL of weight 1 to the initial policy."""
    expert, initial = mdp.policy(11), mdp.policy(12)
    positive = mdp.sequence(expert)
    if mode.startswith("SFT"):
        weights = mdp.expectation(expert)
        (sft,) = mdp.minimise(
            lambda x: losses.sft_loss(mdp.logprobs(x), BATCH_MASK, weights)[0], initial
        )
        positive = mdp.sequence(sft)
    reward = discriminator(positive, initial, torch.zeros_like(positive))
    assert mdp.distance(mdp.tilted(initial, reward, 1.0), mdp.sequence(expert)) < 1e-3

    def step(logits):
        advantages = mdp.kl_rewards(logits, initial, reward, 1.0)
        now, weights = mdp.logprobs(logits), mdp.expectation(logits)
        return losses.policy_loss(now, now.detach(), advantages, BATCH_MASK, weights)[0]

    got = mdp.descend(step, initial, 400, 0.1)
    assert mdp.distance(mdp.sequence(got), mdp.sequence(expert)) < 2e-3


def test_spin_stops_at_the_demonstrations_and_only_there():
    demo, logits = mdp.policy(13), mdp.policy(14)
    one, other = torch.cartesian_prod(torch.arange(COUNT), torch.arange(COUNT)).unbind(-1)

    def loss(now, prev):
        weights = mdp.sequence(demo)[:, one] + mdp.sequence(prev)[:, other]
        four = [
            mdp.sequence(x)[:, side].flatten()
            for x, side in ((now, one), (now, other), (prev, one), (prev, other))
        ]
        return losses.spin_loss(*four, lam=1.0, weights=weights.exp().flatten() / PROMPTS)[0]

    def slope(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(loss(at, at.detach()), at)[0].abs().max().item()

    assert slope(demo) < 1e-12 < 1e-3 < slope(logits)
    apart = [mdp.distance(mdp.sequence(logits), mdp.sequence(demo))]
    for _ in range(12):
        prev = logits
        (logits,) = mdp.minimise(lambda x, prev=prev: loss(x, prev), prev, steps=25)
        apart.append(mdp.distance(mdp.sequence(logits), mdp.sequence(demo)))
    assert apart[0] > 0.3 and apart[-1] < 5e-3


def iqlearn(demo, alpha, gamma):
    weights = mdp.expectation(demo)

    def loss(logits):
        pieces = mdp.logprobs(logits), mdp.lse(logits), BATCH_MASK, weights
        return losses.iqlearn_loss(*pieces, alpha=alpha, gamma=gamma)[0]

    return mdp.minimise(loss, torch.zeros_like(demo), steps=800)[0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_iqlearn_optimum(gamma):
    """Setting the derivative by Q(s, a) to 0, with r = Q - gamma V' and r_0 that of the token that
    led to s (0 at the root): r(s, a) = 2 alpha - (pi / pi_demo)(2 alpha - gamma r_0)."""
    demo, alpha = mdp.policy(15, scale=0.5), 1.0
    q = iqlearn(demo, alpha, gamma)
    v = torch.nn.functional.pad(mdp.lse(q), (0, 1))[:, 1:]
    reward = torch.where(BATCH_MASK, mdp.logprobs(q) + mdp.lse(q) - gamma * v, 0.0)
    before = torch.nn.functional.pad(reward, (1, 0))[:, :-1]
    ratio = (mdp.logprobs(q) - mdp.logprobs(demo)).exp()
    want = 2 * alpha - ratio * (2 * alpha - gamma * before)
    same(reward[BATCH_MASK], want[BATCH_MASK], 1e-3)


def test_iqlearn_with_large_alpha_is_behaviour_cloning():
    demo = mdp.policy(15)
    apart = [
        mdp.distance(mdp.sequence(iqlearn(demo, alpha, 1.0)), mdp.sequence(demo))
        for alpha in (1.0, 100.0)
    ]
    assert apart[0] > 10 * apart[1] and apart[1] < 1e-2


def test_forward_kl_covers_and_reverse_kl_seeks():
    """A model of one mode, two parameters, and a target of two."""
    bins = torch.arange(12, dtype=torch.float64)
    target = torch.logaddexp(-((bins - 2) ** 2), -((bins - 8) ** 2)).log_softmax(0)
    weight = torch.ones(1, dtype=torch.float64)

    def fitted(beta):
        def loss(mean, scale):
            logits = -((bins - mean) ** 2) / (2 * scale.exp() ** 2)
            return losses.distillation_loss(logits[None], target[None], weight, beta=beta)[0]

        mean, scale = mdp.minimise(
            loss, torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        )
        return (-((bins - mean) ** 2) / (2 * scale.exp() ** 2)).softmax(0)

    covering, seeking = fitted(0.0), fitted(1.0)
    left, right = bins < 5, bins > 5
    assert covering[left].sum() > 0.3 and covering[right].sum() > 0.3
    assert covering[5] > 50 * target[5].exp()  # the price: mass where the target has none
    assert seeking[left].sum() > 0.99 and seeking[5] < 2 * target[5].exp()
