"""`fastrl.patch("verl")` on verl's own modules; it is no part of the dev install."""

import math
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("verl", minversion="0.9")

from verl.trainer.ppo import core_algos
from verl.utils import torch_functional as verl_F
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import ActorConfig

import fastrl
from fastrl.integrations import PatchError
from fastrl.kernels import native

HAS_KERNELS = native.unavailable("cpu", torch.device("cpu")) is None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="without kernels verl keeps its own")


@pytest.fixture
def patched():
    with fastrl.patch("verl") as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        yield patch


def test_what_is_replaced_and_registered():
    from verl.workers.rollout.naive import naive_rollout

    before, gae = verl_F.logprobs_from_logits, core_algos.compute_gae_advantage_return
    with fastrl.patch("verl") as patch:
        assert naive_rollout.logprobs_from_logits is verl_F.logprobs_from_logits
        assert core_algos.get_adv_estimator_fn("gae") is core_algos.compute_gae_advantage_return
        assert core_algos.get_adv_estimator_fn("gae") is not gae
        core_algos.get_adv_estimator_fn("fastrl_grpo")
        core_algos.get_policy_loss_fn("fastrl")
        assert "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy" in patch.replaced
    assert naive_rollout.logprobs_from_logits is verl_F.logprobs_from_logits is before
    assert core_algos.get_adv_estimator_fn("gae") is gae
    for find, name in (
        (core_algos.get_adv_estimator_fn, "fastrl_grpo"),
        (core_algos.get_policy_loss_fn, "fastrl"),
    ):
        with pytest.raises(ValueError, match=name):
            find(name)


def test_a_renamed_function_raises(monkeypatch):
    monkeypatch.delattr(verl_F, "logprobs_from_logits")
    with pytest.raises(PatchError, match=r"logprobs_from_logits is not in verl"):
        fastrl.patch("verl")


@needs_kernels
@pytest.mark.parametrize("inplace", [True, False])
def test_logprobs_by_hand(patched, inplace):
    logits = torch.tensor([[1.0, 2.0, 1.0], [5.0, 5.0, 5.0]]).log().requires_grad_()
    labels = torch.tensor([1, 2])
    held = logits * 1.0
    got = verl_F.logprobs_from_logits(held, labels, inplace_backward=inplace)
    assert got.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 3)], abs=1e-6)
    got[0].backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.25, 0.5, -0.25], abs=1e-6)
    assert (held[0].tolist() == pytest.approx([-0.25, 0.5, -0.25], abs=1e-6)) == inplace
    entropy = [1.5 * math.log(2), math.log(3)]
    for function in (verl_F.entropy_from_logits, verl_F.entropy_from_logits_with_chunking):
        assert function(logits).tolist() == pytest.approx(entropy, abs=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear(patched, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 17, 32, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(151, 32, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(151, (2, 17), generator=g)
    name = "verl.utils.experimental.torch_functional.FusedLinearForPPO.forward"
    module = FusedLinearForPPO()
    want = patched.replaced[name].original(module, hidden, weight, labels, 0.7)
    got = module(hidden, weight, labels, 0.7)
    flat = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b, c in zip(want, got, flat, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, a.abs().max())
        assert torch.equal(b.flatten(), c)
    grads = [torch.autograd.grad((o[0] + o[1]).sum(), (hidden, weight)) for o in (want, got)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


@needs_kernels
def test_other_reductions_are_declined():
    with (
        fastrl.patch("verl"),
        pytest.warns(RuntimeWarning, match="reduction='mean'"),
        pytest.raises((RuntimeError, AssertionError, ImportError, ValueError)),  # needs a GPU
    ):
        kernel.linear_cross_entropy(
            torch.randn(4, 8), torch.randn(9, 8), torch.arange(4), 1.0, "mean"
        )


def responses():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 11, generator=g)
    mask = (torch.rand(6, 11, generator=g) > 0.3).float()  # a tool's tokens in between
    mask[1] = 1
    mask[2, 4:] = 0
    return rewards, values, mask


@needs_kernels
def test_gae(patched):
    rewards, values, mask = responses()
    name = "verl.trainer.ppo.core_algos.compute_gae_advantage_return"
    want = patched.replaced[name].original(rewards, values, mask, 0.99, 0.9)
    got = core_algos.compute_gae_advantage_return(
        token_level_rewards=rewards, values=values, response_mask=mask, gamma=0.99, lam=0.9
    )
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a[mask != 0], b[mask != 0], rtol=0, atol=1e-5)


def test_grpo_estimator(patched):
    rewards = torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 3.0], [2.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    index = np.array(["a", "b", "a", "b"], dtype=object)
    estimate = core_algos.get_adv_estimator_fn("fastrl_grpo")
    got, returns = estimate(token_level_rewards=rewards, response_mask=mask, index=index)
    half = math.sqrt(0.5)  # rewards 1, 3 and 5, 7: one below and one above the mean, std sqrt(2)
    assert got[:, 1].tolist() == pytest.approx([-half, -half, half, half], abs=1e-5)
    assert got[3, 0] == 0 and torch.equal(got, returns)
    want, _ = core_algos.compute_grpo_outcome_advantage(rewards * mask, mask, index)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"groups of one size, got sizes \[1, 3\]"):
        estimate(token_level_rewards=rewards, response_mask=mask, index=["a", "b", "b", "b"])


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss(patched, mode, weighted):
    g = torch.Generator().manual_seed(1)
    old, logprob, advantages = torch.randn(3, 6, 11, generator=g)
    logprob = (old + 0.5 * logprob).requires_grad_()
    mask = responses()[2]
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
    )
    config.global_batch_info.update(dp_size=2, batch_num_tokens=77, global_batch_size=12)
    extra = torch.rand(6, 11, generator=g) if weighted else None
    results = []
    for name in ("vanilla", "fastrl"):
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            *(old, logprob, advantages, mask),
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=extra,
        )
        results.append((loss, *torch.autograd.grad(loss, logprob)))
        assert all(isinstance(v, float) and k.startswith("actor/") for k, v in metrics.items())
    (want, want_grad), (got, got_grad) = results
    assert got.item() == pytest.approx(want.item(), abs=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-6)
