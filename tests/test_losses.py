"""Losses against hand-computed numbers, their invariances, and TRL's own code."""

import math

import pytest
import torch

from fastrl import losses
from fastrl.losses import REDUCTIONS


def batch(rows=6, steps=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 1, 0, 5, 2])[:rows]
    mask = torch.arange(steps) < lengths.unsqueeze(1)
    logprobs = -torch.rand(rows, steps, generator=g)
    old = logprobs + 0.4 * torch.randn(rows, steps, generator=g)
    ref = logprobs + 0.4 * torch.randn(rows, steps, generator=g)
    advantages = torch.randn(rows, generator=g)
    return logprobs.requires_grad_(), old, ref, advantages, mask


def test_clipping_by_hand():
    logprobs = torch.log(torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]]))
    zero = torch.zeros(1, 5)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    ones = torch.ones(1, 5)
    # min(rho A, clip(rho) A): 1.2, 0.5, -1.5, -0.8, 2.2.
    loss, metrics = losses.policy_loss(logprobs, zero, advantages, mask, ones)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2), abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 5)
    assert metrics["ratio"].item() == pytest.approx((1.5 + 0.5 + 1.5 + 0.5 + 1.1) / 5)
    loss, _ = losses.policy_loss(logprobs, zero, advantages, mask, ones, eps_high=0.28)
    assert loss.item() == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8 + 2.2), abs=1e-6)
    loss, _ = losses.policy_loss(logprobs, zero, advantages, mask, ones, dual_clip=1.3)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.3 - 0.8 + 2.2), abs=1e-6)


def test_kl_by_hand():
    a, b = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    d = math.log(2)
    for name, want in (("k1", d), ("k2", d * d / 2), ("k3", 0.5 + d - 1)):
        assert losses.kl_estimate(a, b, name).item() == pytest.approx(want, abs=1e-6)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = losses.policy_loss(
        a, a, torch.zeros(1), mask, torch.ones(1, 1), ref_logprobs=b, kl_coef=0.1
    )
    assert loss.item() == pytest.approx(0.1 * (0.5 + d - 1), abs=1e-6)
    assert metrics["kl"].item() == pytest.approx(0.5 + d - 1, abs=1e-6)


def test_on_policy_gradient_is_reinforce():
    logprobs, _, _, advantages, mask = batch()
    weights = losses.token_weights(mask, "dapo")
    loss, _ = losses.policy_loss(logprobs, logprobs.detach(), advantages, mask, weights)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages.unsqueeze(1) * weights)


def test_token_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    at = lambda name, **k: losses.token_weights(mask, name, **k)[:, 0].tolist()  # noqa: E731
    assert at("grpo") == pytest.approx([1 / 8, 1 / 2])
    assert at("dapo") == at("bnpo") == pytest.approx([1 / 5, 1 / 5])
    assert at("dr_grpo", max_completion_length=10) == pytest.approx([1 / 20, 1 / 20])
    assert at("sequence_sum") == pytest.approx([1 / 2, 1 / 2])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_invariant_to_micro_batches_and_padding(reduction):
    logprobs, old, ref, advantages, mask = batch()
    options = {"kl_coef": 0.1, "eps_high": 0.28}
    weights = losses.token_weights(mask, reduction, max_completion_length=7)
    whole, _ = losses.policy_loss(
        logprobs, old, advantages, mask, weights, ref_logprobs=ref, **options
    )
    (gradient,) = torch.autograd.grad(whole, logprobs)
    parts = [
        losses.policy_loss(
            logprobs[s], old[s], advantages[s], mask[s], weights[s], ref_logprobs=ref[s], **options
        )[0]
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logprobs)[0], gradient)

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 3), value=value)

    wide_mask = pad(mask, False)
    wide, _ = losses.policy_loss(
        pad(logprobs, float("nan")),
        pad(old, float("nan")),
        advantages,
        wide_mask,
        losses.token_weights(wide_mask, reduction, max_completion_length=7),
        ref_logprobs=pad(ref, float("nan")),
        **options,
    )
    torch.testing.assert_close(wide, whole)
    torch.testing.assert_close(torch.autograd.grad(wide, logprobs)[0], gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fully_masked_batch_is_zero_not_nan(reduction):
    logprobs = torch.full((2, 3), float("nan"), requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    weights = losses.token_weights(mask, reduction, max_completion_length=3)
    for loss, metrics in (
        losses.policy_loss(logprobs, logprobs.detach(), torch.ones(2), mask, weights),
        losses.sft_loss(logprobs, mask, weights),
    ):
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.item() == 0 and torch.equal(gradient, torch.zeros(2, 3))
        assert all(torch.isfinite(m) for m in metrics.values())


def test_sft_is_the_mean_negative_log_likelihood():
    logprobs, _, _, _, mask = batch()
    loss, metrics = losses.sft_loss(logprobs, mask, losses.token_weights(mask, "dapo"))
    torch.testing.assert_close(loss, -logprobs[mask].mean())
    torch.testing.assert_close(metrics["nll"], loss.detach())


def test_grpo_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    std = math.sqrt(4 * 0.25 / 3)
    a = 0.5 / (std + 1e-4)
    got = losses.grpo_advantages(rewards, 4)
    torch.testing.assert_close(got, torch.tensor([a, -a, -a, a, 0, 0, 0, 0]))
    got = losses.grpo_advantages(rewards, 4, scale=False)
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]))
    # A group of equal rewards that no float represents stays exactly zero.
    assert not losses.grpo_advantages(torch.full((3,), 0.1), 3).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.grpo_advantages(torch.zeros(4), 1), "group_size=1"),
        (lambda: losses.grpo_advantages(torch.zeros(5), 2), "multiple of group_size=2"),
        (lambda: losses.grpo_advantages(torch.tensor([0.0, float("nan")]), 2), "finite"),
        (lambda: losses.token_weights(torch.ones(1, 1).bool(), "mean"), "reduction='mean'"),
        (lambda: losses.token_weights(torch.ones(1, 1).bool(), "dr_grpo"), "max_completion_length"),
        (lambda: losses.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4"), "estimator='k4'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def trl_trainer(tokenizer, tmp_path_factory):
    trl = pytest.importorskip("trl")
    from conftest import TINY
    from datasets import Dataset

    from fastrl.models import build_model, load_model

    model = build_model(
        tokenizer, **TINY["model"]["architecture"], tie_embeddings=True, vocab_size=None, seed=0
    )
    # TRL makes its reference model from the policy's path.
    folder = tmp_path_factory.mktemp("trl")
    model.save_pretrained(folder / "model")
    model = load_model(str(folder / "model"))
    args = trl.GRPOConfig(
        output_dir=str(folder),
        num_generations=3,
        per_device_train_batch_size=6,
        max_completion_length=11,
        temperature=0.7,
        epsilon_high=0.28,
        beta=0.05,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 8),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r != "sequence_sum"])
def test_agrees_with_trl_on_a_fixed_batch(reduction, trl_trainer):
    from fastrl.models import completion_logprobs

    _, noise, ref_noise, advantages, mask = batch()
    prompts = [[5, 6], [7, 8, 9], [4], [5, 5, 5, 5], [6], [7, 3]]
    ids = torch.randint(3, 17, mask.shape).masked_fill(~mask, 0)
    model = trl_trainer.model
    width = max(map(len, prompts))
    left = [[0] * (width - len(p)) + p for p in prompts]
    with torch.no_grad():
        now = completion_logprobs(model, prompts, ids, mask, temperature=0.7).logprob
    old, ref = now + 0.1 * noise, now + 0.1 * ref_noise
    trl_trainer.loss_type = reduction
    trl_trainer.current_gradient_accumulation_steps = 1
    theirs = trl_trainer._compute_loss(
        model,
        {
            "prompt_ids": torch.tensor(left),
            "prompt_mask": (torch.tensor(left) != 0).long(),
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )
    weights = losses.token_weights(mask, reduction, max_completion_length=11)
    logprobs = completion_logprobs(model, prompts, ids, mask, temperature=0.7).logprob
    ours, _ = losses.policy_loss(
        logprobs, old, advantages, mask, weights, eps_high=0.28, ref_logprobs=ref, kl_coef=0.05
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (ours, theirs)), strict=True):
        # TRL rounds the gradient of the logits to bf16 on its way back.
        assert (a - b).norm() < 2e-3 * b.norm()
