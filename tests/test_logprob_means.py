"""linear_logprob where hidden's gradient alone is wanted: its forward sums what that is made of."""

import math

import pytest
import torch
from lm_head import needs_cpu, problem

from fastrl.kernels import linear_logprob

pytestmark = needs_cpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient(hidden, weight, target, upstream, frozen=True, **options):
    """hidden's gradient, the weight frozen or not; upstream is by output."""
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    out = linear_logprob(x, w, target, **({"impl": "cpu"} | options))
    loss = sum((g * getattr(out, part)).sum() for part, g in upstream.items())
    return torch.autograd.grad(loss, x)[0]


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def warped(n, v, dtype=torch.float32):
    return {
        "bias": torch.randn(v, dtype=dtype),
        "temperature": torch.rand(n) + 0.5,
        "softcap": 6.0,
        "logit_scale": 1.5,
    }


def test_hand_computed():
    # Logits (log 1, log 2, log 5): d logprob / dx = w[target] - sum_v p_v w_v.
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    mean = 2 / 8 * math.log(2) + 5 / 8 * math.log(5)
    for target, wanted in ((0, -mean), (1, math.log(2) - mean), (2, math.log(5) - mean)):
        one = (torch.ones(1, 1), weight, torch.tensor([target]))
        assert gradient(*one, {"logprob": torch.ones(1)}).item() == pytest.approx(wanted, abs=1e-6)
        assert gradient(*one, {"lse": torch.ones(1)}).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [
        (1, 32, 151),
        (17, 33, 151),
        (333, 64, 1009),
        (20, 130, 32003),
        (65, 70, 5003),
        (2100, 10, 77),
    ],
)
def test_error_is_at_most_twice_the_references(dtype, n, h, v):
    hidden, weight, target = problem(n, h, v, dtype)
    weight = weight * (2 / h**0.5)
    for parts in (("logprob",), ("lse",), ("logprob", "lse")):
        upstream = {part: torch.randn(n) for part in parts}
        for options in ({}, warped(n, v, dtype)):
            exact = {k: x.double() if k == "bias" else x for k, x in options.items()}
            exact["impl"] = "reference"
            truth = gradient(hidden.double(), weight.double(), target, upstream, **exact)
            theirs = gradient(hidden, weight, target, upstream, **options | {"impl": "reference"})
            mine = gradient(hidden, weight, target, upstream, **options)
            assert mine.dtype == dtype
            assert far(mine, truth) <= 2 * far(theirs, truth) + 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_batch_nor_threads_nor_ignored_rows(dtype):
    hidden, weight, target = problem(200, 333, 2351, dtype)
    weight, upstream = weight / 9, torch.randn(200)
    target[2::9] = -100
    options = warped(200, 2351)

    def run(rows, **change):
        some = {k: x[rows] if k == "temperature" else x for k, x in (options | change).items()}
        return gradient(hidden[rows], weight, target[rows], {"logprob": upstream[rows]}, **some)

    whole = run(slice(None))
    assert not whole[2::9].any() and whole[0].any()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(slice(None)), whole)
            for rows in (0, 5, 7), (40, 57), (3, 67), (60, 160):
                assert torch.equal(run(slice(*rows[:2])), whole[slice(*rows[:2])])
    finally:
        torch.set_num_threads(threads)
    for megabytes in (0, 1000):
        assert torch.equal(run(slice(None), workspace_mb=megabytes), whole)


def test_results_are_those_without_a_gradient():
    hidden, weight, target = problem(90, 64, 5003)
    without = linear_logprob(hidden, weight, target, entropy=True, impl="cpu")
    with_it = linear_logprob(hidden.requires_grad_(), weight, target, entropy=True, impl="cpu")
    for a, b in zip(without, with_it, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unlikely_targets_are_computed_again(dtype):
    """Bit for bit what a backward of both gradients gives hidden."""
    hidden, weight, target = problem(80, 32, 999, dtype)
    hidden[3] = weight[5] * 40  # its target is about e^-1000
    hidden[70] = weight[6] * 3
    target[[3, 70]] = 7
    upstream = {"logprob": torch.randn(80)}
    again = linear_logprob(hidden, weight, target, impl="cpu").logprob < -60
    assert again[3] and again.sum() < 40
    got = gradient(hidden, weight, target, upstream)
    want = gradient(hidden, weight, target, upstream, frozen=False)
    assert torch.equal(got[again], want[again]) and torch.isfinite(got).all()
    assert far(got, want) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_with_an_entropy_nothing_is_summed_ahead():
    """The bits of a trained weight's backward, which takes a product less than to sum in vain."""
    hidden, weight, target = problem(80, 32, 999)
    upstream = {"logprob": torch.randn(80), "entropy": torch.randn(80)}
    got, want = (
        gradient(hidden, weight, target, upstream, frozen=f, entropy=True) for f in (True, False)
    )
    assert torch.equal(got, want)
    # Who calls the op itself, and asks for both, gets both.
    x = hidden.clone().requires_grad_()
    out = torch.ops.fastrl.linear_logprob(
        x, weight, target, None, None, 1.0, 0.0, 1.0, -100, "cpu", 0, "means"
    )
    loss = (upstream["logprob"] * out[0]).sum() + (upstream["entropy"] * out[2]).sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)


def test_a_cap_at_a_high_temperature():
    hidden, weight, target = problem(9, 32, 999)
    hidden, upstream = 3 * hidden, {"logprob": torch.ones(9)}
    options = {"softcap": 5.0, "temperature": 1e6}
    exact = (hidden.double(), weight.double(), target, upstream)
    truth = gradient(*exact, **options, impl="reference")
    assert far(gradient(hidden, weight, target, upstream, **options), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_target_keeps_its_small_gradient(dtype):
    """1 - p is 0.01 to 1e-7, and p in bf16 has 8 bits: as exact as a backward of its own."""
    hidden, weight, target = problem(6, 64, 300, dtype)
    weight = weight / 16
    for i, distance in enumerate((5, 8, 10, 12, 14, 18)):
        weight[target[i]] /= 8
        weight[target[i]] += hidden[i] * (distance / hidden[i].square().sum())
    upstream = {"logprob": torch.ones(6)}
    truth = gradient(hidden.double(), weight.double(), target, upstream, impl="reference")
    own = gradient(hidden, weight, target, upstream, frozen=False)
    got = gradient(hidden, weight, target, upstream)
    for row, other, wanted in zip(got, own, truth, strict=True):
        assert far(row, wanted) <= 1.5 * far(other, wanted) + 1e-6


def test_more_tokens_than_are_taken_at_once_some_ignored():
    hidden, weight, target = problem(5000, 8, 77)
    upstream, keep = torch.randn(5000), torch.arange(5000) % 3 > 0
    some = gradient(hidden[keep], weight, target[keep], {"logprob": upstream[keep]})
    got = gradient(hidden, weight, target.where(keep, -100), {"logprob": upstream})
    assert torch.equal(got[keep], some) and not got[~keep].any()


def test_nan_and_infinite_logits_stay_in_their_rows():
    hidden, weight, target = problem(70, 16, 300)
    clean = gradient(hidden, weight, target, {"logprob": torch.ones(70)})
    hidden[5, 2], hidden[9, 1] = float("nan"), float("inf")
    got = gradient(hidden, weight, target, {"logprob": torch.ones(70)})
    assert not torch.isfinite(got[[5, 9]]).any()
    others = torch.ones(70, dtype=torch.bool)
    others[[5, 9]] = False
    assert torch.equal(got[others], clean[others])


def test_backward_twice_in_parts_and_compiled():
    hidden, weight, target = problem(40, 32, 300)
    target[::4] = -100
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, impl="cpu")
    first = torch.autograd.grad(out.logprob.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.logprob.sum(), x)[0], first)
    batch = hidden.view(5, 8, 32).clone().requires_grad_()
    linear_logprob(batch, weight, target.view(5, 8), impl="cpu").logprob.sum().backward()
    assert torch.equal(batch.grad.view(40, 32), first)
    compiled = torch.compile(
        lambda y: linear_logprob(y, weight, target, impl="cpu").logprob.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    y = hidden.clone().requires_grad_()
    compiled(y).backward()
    assert torch.equal(y.grad, first)
    empty = hidden[:0].clone().requires_grad_()
    linear_logprob(empty, weight, target[:0], impl="cpu").logprob.sum().backward()
    assert empty.grad.shape == (0, 32)


def test_what_is_kept_is_a_row_for_each_token():
    hidden, weight, target = problem(12, 32, 300)
    arguments = (hidden.requires_grad_(), weight, target, None, None, 0.8, 4.0, 1.5, -100, "cpu")
    *_, kept = torch.ops.fastrl.linear_logprob(*arguments, 0, "means")
    assert kept.shape == (12, 32) and kept.dtype == torch.float32
    z = 4 * torch.tanh(1.5 * hidden.double() @ weight.double().T / 4)
    p = torch.softmax(z / 0.8, -1) * (1 - (z / 4).square())
    p[torch.arange(12), target] = 0
    torch.testing.assert_close(kept.double(), p @ weight.double(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.fastrl.linear_logprob, (*arguments, 0, "means"))
