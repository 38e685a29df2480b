"""Log-probs and sampling against hand-computed numbers and float64."""

import math

import pytest
import torch

from fastrl.kernels import linear_logprob, linear_sample, logprob_from_logits
from fastrl.kernels.logprob.reference import gumbel, truncate


def problem(n=17, h=32, v=151, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64)
    target = torch.randint(v, (n,), generator=g)
    return hidden.to(dtype), weight.to(dtype), target


def test_hand_computed():
    # Logits (log 1, log 2, log 5): probabilities 1/8, 2/8, 5/8.
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    out = linear_logprob(hidden, weight, torch.tensor([2]), entropy=True)
    assert out.logprob.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    assert out.lse.item() == pytest.approx(math.log(8), abs=1e-6)
    expected = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    assert out.entropy.item() == pytest.approx(expected, abs=1e-6)
    # Bias, scale, softcap and temperature by hand: z = 3 tanh(2 (x w + b) / 3) / 0.5.
    bias = torch.tensor([0.1, -0.2, 0.3])
    z = [
        3 * math.tanh(2 * (w + b) / 3) / 0.5
        for w, b in zip(weight[:, 0].tolist(), bias.tolist(), strict=True)
    ]
    lse = math.log(sum(map(math.exp, z)))
    out = linear_logprob(
        hidden, weight, torch.tensor([1]), bias=bias, temperature=0.5, softcap=3.0, logit_scale=2.0
    )
    assert out.logprob.item() == pytest.approx(z[1] - lse, abs=1e-6)
    assert out.entropy is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32_and_close_to_float64(dtype):
    hidden, weight, target = problem(dtype=dtype)
    truth = linear_logprob(hidden.double(), weight.double(), target, entropy=True)
    out = linear_logprob(hidden, weight, target, entropy=True)
    for got, want in zip(out, truth, strict=True):
        assert got.dtype == torch.float32 and want.dtype == torch.float64
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-5)


def test_ignored_rows_are_zero_and_keep_nan_out_of_gradients():
    hidden, weight, target = problem()
    target[3:9] = -100
    hidden[4] = float("nan")
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_logprob(hidden, weight, target, temperature=torch.full((17,), 0.7), entropy=True)
    for x in out:
        assert torch.equal(x[3:9], torch.zeros(6)) and torch.isfinite(x).all()
    (out.logprob.sum() + out.entropy.sum() + out.lse.sum()).backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert torch.equal(hidden.grad[3:9], torch.zeros(6, 32))


@pytest.mark.parametrize("which", ["logprob", "lse", "entropy"])
def test_gradients(which):
    hidden, weight, target = problem(n=3, h=4, v=7, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def f(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, target, bias=bias, softcap=5.0, temperature=temperature, entropy=True
        )
        return getattr(out, which)

    assert torch.autograd.gradcheck(f, inputs)


def test_extreme_logits():
    weight = torch.tensor([[-150.0], [-120.0], [-200.0]])
    out = linear_logprob(torch.ones(1, 1), weight, torch.tensor([1]), entropy=True)
    assert out.lse.item() == pytest.approx(-120.0) and out.logprob.item() == pytest.approx(
        0.0, abs=1e-6
    )
    logits = torch.tensor([[float("-inf"), 80.0, -100.0]])
    out = logprob_from_logits(logits, torch.tensor([1]), entropy=True)
    assert out.logprob.item() == 0.0 and out.entropy.item() == 0.0


def test_logprob_from_logits_with_several_targets():
    logits = torch.randn(4, 5, 11)
    target = torch.randint(11, (4, 5, 3))
    out = logprob_from_logits(logits, target, temperature=0.7)
    want = torch.log_softmax(logits / 0.7, -1).gather(-1, target)
    torch.testing.assert_close(out.logprob, want)
    one = logprob_from_logits(logits, target[..., 0], temperature=0.7)
    torch.testing.assert_close(one.logprob, want[..., 0])


def test_works_compiled_and_under_autocast():
    hidden, weight, target = problem(dtype=torch.bfloat16)
    plain = linear_logprob(hidden, weight, target, entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_logprob(hidden, weight, target, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(hidden, weight, target, entropy=True)), tuple(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl='fast' is unknown"),
        ({"impl": "cuda"}, "impl='cuda' is unavailable"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"bias": torch.zeros(3)}, r"bias must be \[V\]"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have shape"),
        ({"target": torch.zeros(17)}, "target must be int64"),
        ({"weight": torch.zeros(5, 31)}, "hidden must end in weight's H=31"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, target = problem()
    arguments = {"hidden": hidden, "weight": weight, "target": target} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def sample(hidden, weight, rows, **options):
    return linear_sample(hidden, weight, seeds=rows, positions=torch.zeros_like(rows), **options)


def test_samples_follow_the_softmax():
    weight = torch.randn(13, 4)
    hidden = torch.randn(1, 4)
    n = 20_000
    drawn = sample(hidden.expand(n, -1), weight, torch.arange(n), temperature=0.8)
    p = torch.softmax((hidden @ weight.T)[0] / 0.8, -1).double()
    counts = torch.bincount(drawn.token, minlength=13).double()
    # 99.9% quantile of chi-square with 12 degrees of freedom.
    assert ((counts - p * n).square() / (p * n)).sum() < 32.9
    torch.testing.assert_close(
        drawn.logprob, torch.log(p).float()[drawn.token], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(drawn.logprob, drawn.untruncated_logprob)


def test_noise_depends_on_seed_position_and_entry_alone():
    seeds, positions = torch.arange(50), torch.arange(50) % 7
    whole = gumbel(seeds, positions, 33)
    assert torch.equal(gumbel(seeds[13:14], positions[13:14], 33)[0], whole[13])
    assert torch.equal(gumbel(seeds, positions, 20), whole[:, :20])
    assert len(torch.unique(whole)) > 0.999 * whole.numel()
    assert torch.isfinite(whole).all()
    # Mean and variance of a standard Gumbel: Euler's constant and pi^2 / 6.
    many = gumbel(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 1000)
    assert many.mean().item() == pytest.approx(0.5772, abs=5e-3)
    assert many.var().item() == pytest.approx(math.pi**2 / 6, abs=2e-2)


def test_truncation_by_hand_and_against_transformers():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda x: torch.isfinite(x)[0].tolist()  # noqa: E731
    assert kept(truncate(logits, top_k=2)) == [True, True, False, False]
    assert kept(truncate(logits, top_p=0.75)) == [True, True, False, False]
    assert kept(truncate(logits, top_p=1e-9)) == [True, False, False, False]
    assert kept(truncate(logits, min_p=0.2)) == [True, True, True, False]
    logits = torch.randn(9, 101)
    want = TopKLogitsWarper(20)(None, logits)
    want = TopPLogitsWarper(0.8)(None, want)
    want = MinPLogitsWarper(0.1)(None, want)
    assert torch.equal(torch.isfinite(truncate(logits, 20, 0.8, 0.1)), torch.isfinite(want))


def test_truncated_and_greedy_sampling():
    hidden, weight, _ = problem(n=200, v=23)
    drawn = sample(hidden, weight, torch.arange(200), top_k=3, temperature=1.3)
    logits = hidden @ weight.T
    assert torch.isin(drawn.token.unsqueeze(1), torch.arange(23)).all()
    assert (logits.topk(3).indices == drawn.token.unsqueeze(1)).any(1).all()
    three = torch.log_softmax(logits.topk(3).values / 1.3, -1)
    at = (logits.topk(3).indices == drawn.token.unsqueeze(1)).int().argmax(1)
    torch.testing.assert_close(drawn.logprob, three[torch.arange(200), at], rtol=1e-5, atol=1e-5)
    assert (drawn.untruncated_logprob <= drawn.logprob).all()
    greedy = sample(hidden, weight, torch.arange(200), temperature=0.0)
    assert torch.equal(greedy.token, logits.argmax(-1)) and not greedy.logprob.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2.0}, "min_p=2.0"),
    ],
)
def test_bad_sampling_arguments_are_named(options, message):
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match=message):
        sample(hidden, weight, torch.arange(17), **options)
