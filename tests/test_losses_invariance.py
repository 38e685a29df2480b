"""What every token loss keeps: micro-batches, padding, empty batches and extreme ratios.

Weights and selections are of the whole step, so a rank's rows are one more way to split it.
"""

import pytest
import torch
import torch.distributed as dist

from fastrl import losses
from fastrl.losses import REDUCTIONS

ROWS, STEPS = 6, 7
NAN = float("nan")


def batch(dtype=torch.float32):
    """Tensors by row: `[B, T]` and `[B]`; x is the one that has a gradient."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(STEPS) < torch.tensor([[7], [3], [1], [0], [5], [2]])
    mask[0, 2:4] = mask[4, 0] = False  # a tool's tokens
    x = -2 * torch.rand(ROWS, STEPS, generator=g, dtype=dtype)
    near = lambda: x + 0.4 * torch.randn(ROWS, STEPS, generator=g, dtype=dtype)  # noqa: E731
    tensors = {"old": near(), "ref": near(), "sampler": near(), "mask": mask}
    tensors["advantages"] = torch.randn(ROWS, generator=g, dtype=dtype)
    tensors["token_advantages"] = torch.randn(ROWS, STEPS, generator=g, dtype=dtype)
    tensors["x"] = x.requires_grad_()
    return tensors


def prepared(tensors, reduction):
    """What is computed once over the whole step."""
    mask, x = tensors["mask"], tensors["x"].detach()
    four = (x, tensors["old"], tensors["advantages"], mask)
    return tensors | {
        "weights": losses.token_weights(mask, reduction, max_completion_length=STEPS),
        "clip_cov": losses.clip_cov_mask(
            *four, fraction=0.3, low=0.0, generator=torch.Generator().manual_seed(0)
        ),
        "kl_cov": losses.kl_cov_mask(x, tensors["advantages"], mask, fraction=0.3),
        "mismatch": losses.mismatch_weights(
            tensors["old"], tensors["sampler"], mask, "sequence_truncate"
        ),
    }


def policy(b, function=losses.policy_loss, advantages="advantages", **options):
    five = b["x"], b["old"], b[advantages], b["mask"], b["weights"]
    return function(*five, **options)


LOSSES = {
    "clip": lambda b: policy(b, eps_high=0.28, dual_clip=3.0, ref_logprobs=b["ref"], kl_coef=0.1),
    "clip, token advantages": lambda b: policy(b, advantages="token_advantages"),
    "clip, mismatch": lambda b: policy(b, importance_weights=b["mismatch"]),
    "sequence_sum": lambda b: policy(b, ratio_level="sequence_sum"),
    "gspo": lambda b: policy(b, losses.gspo_loss, eps_low=0.1, eps_high=0.1),
    "gspo-token": lambda b: policy(b, losses.gspo_loss, eps_low=0.1, token_level=True),
    "cispo": lambda b: policy(b, losses.cispo_loss, max_ratio=1.2),
    "sapo": lambda b: policy(b, losses.sapo_loss),
    "gmpo": lambda b: policy(b, losses.gmpo_loss),
    "gmpo, token advantages": lambda b: policy(b, losses.gmpo_loss, "token_advantages"),
    "clip_cov": lambda b: policy(b, losses.clip_cov_loss, selected=b["clip_cov"]),
    "kl_cov": lambda b: policy(b, losses.kl_cov_loss, selected=b["kl_cov"]),
    "reinforce": lambda b: losses.reinforce_loss(b["x"], b["advantages"], b["mask"], b["weights"]),
    "kl": lambda b: losses.kl_loss(
        b["x"], b["ref"], b["mask"], b["weights"], coef=0.3, old_logprobs=b["old"]
    ),
    "kl, k3+": lambda b: losses.kl_loss(
        b["x"], b["ref"], b["mask"], b["weights"], coef=0.3, estimator="k3+"
    ),
    "entropy": lambda b: losses.entropy_loss(b["x"], b["mask"], b["weights"], coef=0.3),
    "value": lambda b: losses.value_loss(b["x"], b["old"], b["ref"], b["mask"], b["weights"]),
    "sft": lambda b: losses.sft_loss(b["x"], b["mask"], b["weights"]),
    "iqlearn": lambda b: losses.iqlearn_loss(
        b["x"], b["old"], b["mask"], b["weights"], bootstrap=b["advantages"]
    ),
    "discriminator": lambda b: losses.discriminator_loss(
        b["x"],
        b["ref"],
        b["weights"],
        b["weights"],
        demo_mask=b["mask"],
        policy_mask=b["mask"],
    ),
}


def split(b, rows, steps=slice(None)):
    return {k: v[rows] if v.dim() == 1 else v[rows, steps] for k, v in b.items()}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_padding_change_nothing(name, reduction):
    b = prepared(batch(), reduction)
    whole, metrics = LOSSES[name](b)
    (gradient,) = torch.autograd.grad(whole, b["x"], retain_graph=True)
    assert gradient.any()

    # Micro-batches, each cut to its own longest row.
    pieces = ((slice(0, 1), 7), (slice(1, 4), 3), (slice(4, 6), 5))
    parts = [LOSSES[name](split(b, rows, slice(0, n)))[0] for rows, n in pieces]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(sum(parts), b["x"], retain_graph=True)
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)

    # Wider, with NaN wherever nothing is.
    wide = batch()
    mask = wide["mask"]
    for key, value in wide.items():
        if value.dim() == 2:
            fill = False if key == "mask" else NAN
            value = value.detach() if key == "mask" else value.detach().masked_fill(~mask, NAN)
            wide[key] = torch.nn.functional.pad(value, (0, 3), value=fill)
    wide["x"].requires_grad_()
    padded, padded_metrics = LOSSES[name](prepared(wide, reduction))
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(padded, wide["x"])
    torch.testing.assert_close(got[:, :STEPS], gradient, rtol=1e-5, atol=1e-6)
    assert not got[:, STEPS:].any()
    for key in metrics:
        torch.testing.assert_close(padded_metrics[key], metrics[key], rtol=1e-5, atol=1e-6)


def _ranks_share(rank):
    """Loss and gradient of every loss, from rows of this rank alone and one all-reduce."""
    out = {}
    for name, loss_of in LOSSES.items():
        b = prepared(batch(), "dapo")
        rows = slice(0, 2) if rank == 0 else slice(2, ROWS)
        loss, _ = loss_of(split(b, rows))
        (gradient,) = torch.autograd.grad(loss, b["x"])
        both = torch.cat([loss.detach().view(1), gradient.flatten()])
        dist.all_reduce(both)
        out[name] = both.tolist()
    return out


def test_two_processes_are_one(ranks):
    for got in ranks.run(_ranks_share):
        for name, loss_of in LOSSES.items():
            b = prepared(batch(), "dapo")
            loss, _ = loss_of(b)
            (gradient,) = torch.autograd.grad(loss, b["x"])
            want = torch.cat([loss.detach().view(1), gradient.flatten()])
            torch.testing.assert_close(torch.tensor(got[name]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_fully_masked_and_empty_batches_are_zero(name):
    b = batch()
    for key, value in b.items():
        b[key] = torch.zeros_like(value) if key == "mask" else torch.full_like(value, NAN)
    b["x"].requires_grad_()
    b["advantages"] = torch.ones(ROWS)
    b = prepared(b, "dapo")
    for part in (b, split(b, slice(0, 0))):
        loss, metrics = LOSSES[name](part)
        assert loss == 0 and all(torch.isfinite(m) for m in metrics.values())
        (gradient,) = torch.autograd.grad(loss, part["x"], allow_unused=True)
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("size", [50.0, 1e3, 1e6])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_have_finite_gradients(name, size):
    b = batch()
    sign = torch.where(torch.arange(STEPS) % 2 == 0, 1.0, -1.0)
    b["x"] = (b["x"].detach() + size * sign).requires_grad_()
    loss, metrics = LOSSES[name](prepared(b, "dapo"))
    (gradient,) = torch.autograd.grad(loss, b["x"])
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert all(torch.isfinite(m) for m in metrics.values())
    assert torch.isfinite(gradient.square().sum())  # so is its norm


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    """In float64, at a point away from kinks; terms under a stop-gradient are left to the rest."""
    if name in ("gspo-token", "cispo", "kl, k3+"):
        pytest.skip("its gradient is not the derivative of its value, by design")
    b = prepared(batch(torch.float64), "grpo")
    loss, _ = LOSSES[name](b)
    (gradient,) = torch.autograd.grad(loss, b["x"])
    direction = torch.randn(ROWS, STEPS, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        up, down = (LOSSES[name](b | {"x": b["x"] + s * h * direction})[0] for s in (1, -1))
    want = (up - down) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), want, rtol=1e-5, atol=1e-7)
