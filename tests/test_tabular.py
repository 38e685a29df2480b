"""Optima on an enumerable token MDP against closed forms: preferences and policy optimisation."""

from itertools import permutations

import pytest
import token_mdp as mdp
import torch
from token_mdp import BATCH_MASK, COUNT, PROMPTS, same

from fastrl import losses

FIRST, SECOND = torch.triu_indices(COUNT, COUNT, 1)


def pairs(table):
    """Both sides of all comparisons within a prompt, in both orders, flat."""
    one, other = table[:, FIRST].flatten(), table[:, SECOND].flatten()
    return torch.cat([one, other]), torch.cat([other, one])


def preferences(reward):
    """Weights of those comparisons: how often the first beats the second, summing to 1."""
    better, worse = pairs(reward)
    p = torch.sigmoid(better - worse)
    return p / p.sum()


def up_to_a_constant(table):
    """Per prompt."""
    return table - table.mean(-1, keepdim=True)


def test_the_mdp():
    p = mdp.sequence(mdp.policy(0)).exp()
    same(p.sum(-1), torch.ones(PROMPTS, dtype=torch.float64), 1e-12)
    assert len({tuple(c) for c in mdp.COMPLETIONS}) == COUNT == 15
    assert all(mdp.EOS not in c[:-1] for c in mdp.COMPLETIONS)  # EOS absorbs


# Rewards from preferences


def test_bradley_terry_recovers_the_reward():
    reward = mdp.rewards(0)
    weights = preferences(reward)
    (got,) = mdp.minimise(
        lambda r: losses.bradley_terry_loss(*pairs(r), weights=weights)[0], torch.zeros_like(reward)
    )
    same(up_to_a_constant(got), up_to_a_constant(reward))


def test_centring_makes_the_reward_unique():
    reward = mdp.rewards(0)
    weights = preferences(reward)
    (got,) = mdp.minimise(
        lambda r: losses.bradley_terry_loss(*pairs(r), weights=weights, centering=1e-4)[0],
        torch.ones_like(reward),
    )
    assert got.mean(-1).abs().max() < 0.05
    same(up_to_a_constant(got), up_to_a_constant(reward), 0.02)


def test_plackett_luce_recovers_the_reward():
    reward = mdp.rewards(1)[:, :4]
    orders = torch.tensor(list(permutations(range(4))))
    ranked = reward[:, orders].flatten(0, 1)  # [X * 24, 4]
    nll = [losses.plackett_luce_loss(row[None])[0] for row in ranked]
    weights = torch.exp(-torch.stack(nll)) / PROMPTS
    same(weights.sum(), torch.tensor(1.0, dtype=torch.float64), 1e-12)
    (got,) = mdp.minimise(
        lambda r: losses.plackett_luce_loss(r[:, orders].flatten(0, 1), weights=weights)[0],
        torch.zeros_like(reward),
    )
    same(up_to_a_constant(got), up_to_a_constant(reward))


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_noisy_labels_keep_the_order(noise):
    """Bradley-Terry and classification rank as the reward does, though a share of labels lie."""
    reward = mdp.rewards(2)
    better, worse = pairs(reward)
    p = torch.sigmoid(better - worse)
    p = (1 - noise) * p + noise * (1 - p)
    weights = p / p.sum()
    zeros = torch.zeros_like(reward)
    (bt,) = mdp.minimise(lambda r: losses.bradley_terry_loss(*pairs(r), weights=weights)[0], zeros)
    labels = torch.cat([torch.ones_like(p), torch.zeros_like(p)])

    def classify(r):
        items = torch.cat(pairs(r))
        return losses.classification_loss(items, labels, weights=weights.repeat(2) / 2)[0]

    (bce,) = mdp.minimise(classify, zeros)
    for got in (bt, bce):
        assert torch.equal(got.argsort(-1), reward.argsort(-1))


def implied_reward(variant, weights, reference, beta, smoothing=0.0):
    ref = pairs(mdp.sequence(reference))

    def loss(logits):
        return losses.dpo_loss(
            *pairs(mdp.sequence(logits)),
            *ref,
            beta=beta,
            variant=variant,
            label_smoothing=smoothing,
            weights=weights,
        )[0]

    (logits,) = mdp.minimise(loss, reference, steps=400)
    return beta * (mdp.sequence(logits) - mdp.sequence(reference)), mdp.sequence(logits)


def test_dpo_implies_the_reward_up_to_the_prompt():
    reward, reference, beta = mdp.rewards(3), mdp.policy(3), 0.5
    got, logprobs = implied_reward("sigmoid", preferences(reward), reference, beta)
    same(up_to_a_constant(got), up_to_a_constant(reward), 1e-3)
    assert mdp.distance(logprobs, mdp.tilted(reference, reward, beta)) < 1e-4
    # c(x) = beta log Z(x), which differs between prompts.
    c = beta * (mdp.sequence(reference) + reward / beta).logsumexp(-1, keepdim=True)
    same(got, reward - c, 1e-3)
    assert (c[0] - c[1]).abs() > 0.1


def test_robust_dpo_sees_through_flipped_labels():
    reward, reference, flipped = mdp.rewards(3), mdp.policy(3), 0.2
    clean = preferences(reward)
    both = clean.view(2, -1)
    weights = (1 - flipped) * clean + flipped * both.flip(0).flatten()
    got, _ = implied_reward("robust", weights, reference, 0.5, flipped)
    same(up_to_a_constant(got), up_to_a_constant(reward), 1e-3)


def test_ipo_has_its_own_optimum():
    """D = (2 p - 1) / (2 beta), here (score - score') / (2 beta)."""
    score, reference, beta = mdp.rewards(4).clamp(-0.9, 0.9) / 2, mdp.policy(4), 0.3
    better, worse = pairs(score)
    p = 0.5 + (better - worse) / 2
    assert ((p > 0) & (p < 1)).all()
    got, _ = implied_reward("ipo", p / p.sum(), reference, beta)
    same(up_to_a_constant(got), up_to_a_constant(score) / 2, 1e-4)


# Policy optimisation


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_kl_in_the_reward_leads_to_the_tilted_reference(name):
    reward, reference, beta = mdp.rewards(5), mdp.policy(5), 0.7

    def step(logits):
        advantages = mdp.kl_rewards(logits, reference, reward, beta)
        now, weights = mdp.logprobs(logits), mdp.expectation(logits)
        if name == "ppo":
            return losses.policy_loss(now, now.detach(), advantages, BATCH_MASK, weights)[0]
        return losses.reinforce_loss(now, advantages, BATCH_MASK, weights)[0]

    got = mdp.descend(step, reference, 400, 0.1)
    assert mdp.distance(mdp.sequence(got), mdp.tilted(reference, reward, beta)) < 1e-3


def test_ppo_with_several_updates_of_old_samples():
    reward, reference, beta = mdp.rewards(5), mdp.policy(5), 0.7
    old = {}

    def step(logits):
        if old.setdefault("age", 0) % 4 == 0:
            old["logits"] = logits.detach().clone()
        old["age"] += 1
        return losses.policy_loss(
            mdp.logprobs(logits),
            mdp.logprobs(old["logits"]),
            mdp.kl_rewards(old["logits"], reference, reward, beta),
            BATCH_MASK,
            mdp.expectation(old["logits"]),
        )[0]

    got = mdp.descend(step, reference, 600, 0.1)
    assert mdp.distance(mdp.sequence(got), mdp.tilted(reference, reward, beta)) < 2e-3


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_group_baselines_keep_the_policy_gradient(name):
    """Over all groups of two; Dr. GRPO's is half of it, (G - 1) / G."""
    reward, logits = mdp.rewards(6)[0], mdp.policy(6).requires_grad_()
    p = mdp.sequence(logits)[0].detach().exp()
    (want,) = torch.autograd.grad(-(mdp.sequence(logits)[0].exp() * reward).sum(), logits)
    group = torch.cartesian_prod(torch.arange(COUNT), torch.arange(COUNT))  # [225, 2]
    flat = reward[group].flatten()
    advantages = (
        losses.rloo_advantages(flat, 2)
        if name == "rloo"
        else losses.grpo_advantages(flat, 2, scale=False)
    )
    weights = (p[group].prod(-1, keepdim=True) / 2).expand(-1, 2).flatten()
    rows = group.flatten()
    mask = mdp.MASK[rows]
    loss, _ = losses.reinforce_loss(
        mdp.logprobs(logits)[:COUNT][rows], advantages, mask, weights.unsqueeze(-1) * mask
    )
    (got,) = torch.autograd.grad(loss, logits)
    same(got, want if name == "rloo" else want / 2, 1e-10)


def test_gradients_of_the_kl_estimators():
    """In expectation: k1 none, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    want = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, logits, retain_graph=True)[0],
    }
    want["k1+"] = want["k3+"] = want["k2"]
    for name, gradient in want.items():
        estimate = losses.kl_estimate(logp.unsqueeze(1), ref.unsqueeze(1), name).squeeze(1)
        loss = (logp.detach().exp() * estimate).sum()
        same(torch.autograd.grad(loss, logits, retain_graph=True)[0], gradient, 1e-12)
        if name != "k2":
            same(loss.detach(), reverse.detach(), 1e-12)
