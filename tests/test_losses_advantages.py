"""Advantages and token rewards against hand-computed numbers and their identities."""

import math

import pytest
import torch

from fastrl import losses


def close(x, want):
    torch.testing.assert_close(x, torch.tensor(want), rtol=1e-6, atol=1e-6)


def test_group_baselines_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0, 3.0])
    close(losses.rloo_advantages(rewards, 3), [0.0, -1.5, 1.5, 0.0, 0.0, 0.0])
    close(losses.maxrl_advantages(rewards, 3), [0.0, -1.0, 1.0, 0.0, 0.0, 0.0])
    lengths = torch.tensor([1, 2, 5, 4, 1, 1])
    b = (1 + 10) / 8
    close(losses.opo_advantages(rewards, lengths, 3), [1 - b, -b, 2 - b, 0.0, 0.0, 0.0])
    greedy = torch.tensor([1.0, 5.0])
    close(losses.remax_advantages(rewards, greedy, 3), [0.0, -1.0, 1.0, -2.0, -2.0, -2.0])
    close(losses.remax_advantages(greedy, greedy.flip(0)), [-4.0, 4.0])
    assert losses.informative_groups(rewards, 3).tolist() == [True] * 3 + [False] * 3
    batch = losses.grpo_advantages(rewards, 3, scale="batch")
    std = math.sqrt(((rewards - 2).square().sum() / 5).item())
    close(batch, [0.0, -1 / (std + 1e-4), 1 / (std + 1e-4), 0.0, 0.0, 0.0])


def test_rloo_is_a_multiple_of_dr_grpo():
    rewards = torch.randn(40, dtype=torch.float64)
    dr = losses.grpo_advantages(rewards, 8, scale=False)
    torch.testing.assert_close(losses.rloo_advantages(rewards, 8), dr * 8 / 7)


def test_a_group_that_always_fails_teaches_maxrl_nothing():
    close(losses.maxrl_advantages(torch.zeros(4), 4), [0.0] * 4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_equal_rewards_have_exactly_no_advantage(value):
    rewards = torch.full((6,), value)
    for name in ("grpo", "rloo", "maxrl"):
        assert not getattr(losses, f"{name}_advantages")(rewards, 3).any()
    assert not losses.opo_advantages(rewards, torch.tensor([1, 2, 3, 4, 5, 6]), 3).any()
    assert not losses.normalize_advantages(rewards).any()
    mask = torch.ones(6, 2, dtype=torch.bool)
    token = torch.stack([torch.zeros(6), rewards], 1)
    for group_size in (None, 3):
        got = losses.reinforce_plus_plus_advantages(token, mask, group_size=group_size)
        assert not got.any()


def test_normalized_advantages():
    x = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    close(losses.normalize_advantages(x, mask), [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert not losses.normalize_advantages(x, torch.zeros_like(mask)).any()


def test_reinforce_plus_plus_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    # Returns to go 1, 1, 2: mean 4/3, unbiased variance 1/3.
    got = losses.reinforce_plus_plus_advantages(rewards, mask)
    s = math.sqrt(1 / 3)
    close(got, [[-1 / 3 / s, -1 / 3 / s], [2 / 3 / s, 0.0]])
    # Baseline: scores 1 and 2 less 1.5; over three tokens mean -1/6, variance 1/3.
    got = losses.reinforce_plus_plus_advantages(rewards, mask, group_size=2)
    close(got, [[-1 / 3 / s, -1 / 3 / s], [2 / 3 / s, 0.0]])


def test_token_rewards_by_hand():
    old = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, float("nan"), 7.0]])
    ref = torch.tensor([[-1.5, -1.0, -1.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    got = losses.token_rewards(torch.tensor([5.0, 7.0]), old, ref, mask, kl_coef=0.1)
    close(got, [[-0.05, 0.0, 5.0], [-0.2 + 7.0, 0.0, 0.0]])
    got = losses.token_rewards(
        torch.tensor([5.0, 7.0]), old, ref, mask, kl_coef=0.1, estimator="k2"
    )
    close(got, [[-0.1 * 0.125, 0.0, 5.0], [-0.2 + 7.0, 0.0, 0.0]])


def test_a_terminal_reward_is_discounted_to_the_first_token():
    mask = torch.ones(1, 4, dtype=torch.bool)
    zeros = torch.zeros(1, 4)
    token = losses.token_rewards(torch.tensor([8.0]), zeros, zeros, mask, kl_coef=0.1)
    _, returns = losses.gae_advantages(token, zeros, mask, gamma=0.5, lam=1.0)
    close(returns, [[1.0, 2.0, 4.0, 8.0]])


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 9.0, 0.25]])
    mask = torch.tensor([[True, False, True]])
    options = {"gamma": 0.5, "lam": 0.5, "normalize": False}
    # Carried across the middle token: delta_0 = 0.5 * 0.25 - 0.5, A_0 = delta_0 + 0.25 * 0.75.
    a, returns = losses.gae_advantages(rewards, values, mask, **options)
    close(a, [[-0.375 + 0.1875, 0.0, 0.75]])
    close(returns, [[0.3125, 0.0, 1.0]])
    # As a step of reward and value 0, its delta is 0.5 * 0.25.
    a, _ = losses.gae_advantages(rewards, values, mask, masked_tokens="step", **options)
    close(a, [[-0.5 + 0.25 * (0.125 + 0.25 * 0.75), 0.0, 0.75]])
    a, _ = losses.gae_advantages(
        rewards, values, mask, bootstrap=torch.tensor([2.0]), masked_tokens="step", **options
    )
    close(a, [[-0.5 + 0.25 * (0.125 + 0.25 * 1.75), 0.0, 1.75]])


@pytest.mark.parametrize("masked_tokens", ["carry", "step"])
def test_lambda_and_gamma_one_give_return_minus_value(masked_tokens):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(4, 9, generator=g), torch.randn(4, 9, generator=g)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [0]])
    mask[0, 3:5] = False
    a, returns = losses.gae_advantages(
        rewards, values, mask, lam=1.0, normalize=False, masked_tokens=masked_tokens
    )
    kept = torch.where(mask, rewards, 0.0)
    to_go = kept.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(a, torch.where(mask, to_go - values, 0.0))
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))
    for i in range(4):  # a batch equals its rows one by one
        row = slice(i, i + 1)
        one, _ = losses.gae_advantages(
            rewards[row],
            values[row],
            mask[row],
            lam=1.0,
            normalize=False,
            masked_tokens=masked_tokens,
        )
        assert torch.equal(one, a[row])


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 80, 85, 100, 120])
    close(losses.overlong_penalty(lengths, 100, 20), [0.0, 0.0, -0.25, -1.0, -1.0])


def test_distillation_advantages_by_hand():
    old = torch.tensor([[-1.0, 5.0, -2.0]])
    teacher = torch.tensor([[-2.0, float("nan"), -1.0]])
    mask = torch.tensor([[True, False, True]])
    close(losses.distillation_advantages(old, teacher, mask), [[-1.0, 0.0, 1.0]])
    close(losses.distillation_advantages(old, teacher, mask, gamma=1.0), [[0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.rloo_advantages(torch.zeros(4), 1), "group_size=1"),
        (lambda: losses.maxrl_advantages(torch.tensor([1.0, -1.0]), 2), "at least 0"),
        (lambda: losses.opo_advantages(torch.zeros(4), torch.zeros(3), 2), "lengths"),
        (lambda: losses.remax_advantages(torch.zeros(4), torch.zeros(4), 2), "greedy_rewards"),
        (lambda: losses.grpo_advantages(torch.zeros(4), 2, scale="row"), "scale='row'"),
        (lambda: losses.overlong_penalty(torch.zeros(1), 10, 0), "cache_length=0"),
        (
            lambda: losses.token_rewards(
                torch.zeros(3), *[torch.zeros(2, 2)] * 2, torch.ones(2, 2).bool(), kl_coef=0.1
            ),
            "rewards must be",
        ),
        (
            lambda: losses.gae_advantages(
                *[torch.zeros(1, 1)] * 2, torch.ones(1, 1).bool(), masked_tokens="zero"
            ),
            "masked_tokens='zero'",
        ),
        (
            lambda: losses.reinforce_plus_plus_advantages(
                torch.zeros(2, 1), torch.ones(2, 1).bool(), gamma=0.9, group_size=2
            ),
            "gamma=0.9",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
