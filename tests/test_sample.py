"""linear_sample: its noise, its truncation, and the CPU kernel against the reference."""

import math

import pytest
import torch
from lm_head import every_impl, needs_cpu, problem

from fastrl.kernels import linear_logprob, linear_sample
from fastrl.kernels.logprob.reference import gumbel, project, truncate


def sample(hidden, weight, rows, **options):
    return linear_sample(hidden, weight, seeds=rows, positions=torch.zeros_like(rows), **options)


@every_impl
def test_samples_follow_the_softmax(impl):
    weight = torch.randn(13, 4)
    hidden = torch.randn(1, 4)
    n = 20_000
    drawn = sample(hidden.expand(n, -1), weight, torch.arange(n), temperature=0.8, impl=impl)
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


@every_impl
def test_truncated_and_greedy_sampling(impl):
    hidden, weight, _ = problem(n=200, v=23)
    options = {"temperature": 1.3, "impl": impl}
    drawn = sample(hidden, weight, torch.arange(200), top_k=3, **options)
    logits = hidden @ weight.T
    assert (logits.topk(3).indices == drawn.token.unsqueeze(1)).any(1).all()
    three = torch.log_softmax(logits.topk(3).values / 1.3, -1)
    at = (logits.topk(3).indices == drawn.token.unsqueeze(1)).int().argmax(1)
    torch.testing.assert_close(drawn.logprob, three[torch.arange(200), at], rtol=1e-5, atol=1e-5)
    assert (drawn.untruncated_logprob <= drawn.logprob).all()
    greedy = sample(hidden, weight, torch.arange(200), temperature=0.0, impl=impl)
    assert torch.equal(greedy.token, logits.argmax(-1)) and not greedy.logprob.any()
    full = torch.log_softmax(logits, -1)[torch.arange(200), greedy.token]
    torch.testing.assert_close(greedy.untruncated_logprob, full, rtol=1e-5, atol=1e-5)


@every_impl
def test_truncation_keeps_ties_of_top_k_and_the_first_ones_of_top_p(impl):
    # One hidden unit of 1: the weight's column is the row of logits.
    p = [0.1, 0.3, 0.1, 0.3, 0.1, 0.1]
    weight = torch.log(torch.tensor(p)).unsqueeze(1)
    n = 400
    draw = lambda **o: sample(torch.ones(n, 1), weight, torch.arange(n), impl=impl, **o)  # noqa: E731
    for options, kept in (
        ({"top_k": 1}, [1, 3]),
        ({"top_k": 3}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.65}, [0, 1, 3]),
        ({"top_k": 2, "top_p": 0.4}, [1]),
        ({"top_p": 0.75, "min_p": 0.5}, [1, 3]),
        ({"min_p": 0.3}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 1.0}, [1, 3]),
    ):
        drawn = draw(**options)
        assert torch.unique(drawn.token).tolist() == kept
        share = torch.log(torch.tensor(p) / sum(p[v] for v in kept))[drawn.token]
        torch.testing.assert_close(drawn.logprob, share, rtol=1e-5, atol=1e-5)
    same = sample(
        torch.ones(50, 1), torch.ones(77, 1), torch.arange(50), temperature=0.0, impl=impl
    )
    assert not same.token.any()


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
]


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("n", "h", "v", "spread"),
    [(1, 32, 151, 1.0), (333, 33, 151, 3.0), (70, 64, 32003, 1.0), (2100, 10, 77, 8.0)],
)
def test_cpu_draws_the_references_tokens(n, h, v, spread, settings, dtype):
    hidden, weight, _ = problem(n, h, v, dtype)
    weight = weight * (spread / h**0.5)
    g = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=g)
    positions = torch.randint(0, 2**20, (n,), generator=g)
    options = {"seeds": seeds, "positions": positions, **settings}
    drawn = linear_sample(hidden, weight, impl="cpu", **options)
    want = linear_sample(hidden, weight, impl="reference", **options)
    agree = drawn.token == want.token
    if not agree.all():  # only where rounding makes two perturbed logits equal
        logits = project(hidden, weight) / (settings.get("temperature") or 1.0)
        perturbed = logits + gumbel(seeds, positions, v) * (settings.get("temperature") != 0.0)
        pair = [perturbed.gather(1, x.token.unsqueeze(1))[~agree] for x in (drawn, want)]
        assert (pair[0] - pair[1]).abs().max() < 1e-4
        assert (~agree).sum() <= 1 + n // 1000
    for mine, theirs in zip(drawn[1:], want[1:], strict=True):
        # top_p may keep one token more or less of a flat row, where the sums are equal to rounding.
        close = (mine - theirs).abs()[agree] < (2e-3 if "top_p" in settings else 2e-5)
        assert close.all()
    again = linear_logprob(
        hidden, weight, drawn.token, temperature=settings.get("temperature") or 1.0, impl="cpu"
    )
    if not settings.keys() - {"temperature"}:
        assert torch.equal(again.logprob, drawn.untruncated_logprob)
        if settings.get("temperature") != 0.0:
            assert torch.equal(again.logprob, drawn.logprob)


@needs_cpu
@pytest.mark.parametrize("settings", [{}, {"top_k": 7, "top_p": 0.9}], ids=str)
def test_cpu_bias_softcap_scale_and_mixed_dtypes(settings):
    hidden, weight, _ = problem(40, 32, 151)
    bias = torch.randn(151)
    bias[::3] = float("-inf")
    bias[100:] = float("-inf")  # whole blocks
    options = {"bias": bias, "logit_scale": 1.5, "temperature": 0.8, **settings}
    for cap in (None, 4.0):
        options["softcap"] = cap
        if cap:
            options["bias"] = torch.randn(151)
        for types in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.bfloat16),
        ):
            x, w = hidden.to(types[0]), weight.to(types[1])
            drawn = sample(x, w, torch.arange(40), impl="cpu", **options)
            want = sample(x, w, torch.arange(40), impl="reference", **options)
            assert torch.equal(drawn.token, want.token)
            torch.testing.assert_close(tuple(drawn[1:]), tuple(want[1:]), rtol=1e-5, atol=2e-5)
    bits = sample(hidden[:, :31], weight[:, :31], torch.arange(40), impl="cpu")
    copied = sample(
        hidden[:, :31].contiguous(), weight[:, :31].clone(), torch.arange(40), impl="cpu"
    )
    assert all(torch.equal(a, b) for a, b in zip(bits, copied, strict=True))
    empty = sample(hidden[:0], weight, torch.arange(0), impl="cpu", **settings)
    assert empty.token.shape == (0,) and empty.logprob.dtype == torch.float32


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cpu_bits_depend_on_neither_batch_nor_threads(settings, dtype):
    hidden, weight, _ = problem(150, 64, 5003, dtype)

    def run(rows):
        return sample(hidden[rows], weight, torch.arange(150)[rows], impl="cpu", **settings)

    whole = run(slice(None))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), whole, strict=True))
    for rows in (slice(0, 1), slice(5, 6), slice(40, 57), slice(100, 150)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), whole, strict=True))


@needs_cpu
def test_cpu_rows_beyond_one_group_of_kept_logits():
    v = 300_000  # 128 MB hold 111 rows
    hidden, weight, _ = problem(130, 4, v)
    drawn = sample(hidden, weight, torch.arange(130), top_k=20, impl="cpu")
    some = torch.tensor([0, 95, 96, 112, 129])
    want = sample(hidden[some], weight, some, top_k=20, impl="reference")
    assert torch.equal(drawn.token[some], want.token)


@every_impl
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}], ids=str
)
def test_rows_that_are_no_distribution_harm_no_other(settings, impl):
    hidden, weight, _ = problem(20, 32, 1000)
    clean = sample(hidden, weight, torch.arange(20), impl=impl, **settings)
    hidden[3] = float("nan")
    hidden[4] = float("inf")
    drawn = sample(hidden, weight, torch.arange(20), impl=impl, **settings)
    fine = torch.arange(20) >= 5
    assert all(torch.equal(a[fine], b[fine]) for a, b in zip(drawn, clean, strict=True))
    assert ((drawn.token >= 0) & (drawn.token < 1000)).all()
    assert drawn.untruncated_logprob[3:5].isnan().all()
    nothing = torch.full((1000,), float("-inf"))
    drawn = sample(hidden[:1], weight, torch.arange(1), bias=nothing, impl=impl, **settings)
    assert drawn.token.item() == 0 and not torch.isfinite(drawn.untruncated_logprob).any()


@needs_cpu
def test_opcheck_and_compile():
    hidden, weight, _ = problem(5, 8, 11)
    at = torch.arange(5)
    arguments = (hidden, weight, at, at, torch.randn(11), 0.9, 4, 0.9, 0.01, 5.0, 1.0, "cpu")
    torch.library.opcheck(torch.ops.fastrl.linear_sample, arguments)
    compiled = torch.compile(linear_sample, fullgraph=True, backend="aot_eager")
    options = {"seeds": at, "positions": at, "impl": "cpu"}
    plain = linear_sample(hidden, weight, **options)
    torch.testing.assert_close(tuple(compiled(hidden, weight, **options)), tuple(plain))
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_sample(hidden, weight, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"impl": "triton"}, "impl='triton' is unavailable"),
    ],
)
def test_bad_sampling_arguments_are_named(options, message):
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match=message):
        sample(hidden, weight, torch.arange(17), **options)
    with pytest.raises(ValueError, match=r"hidden must be \[M, H\]"):
        sample(hidden.unsqueeze(0), weight, torch.arange(17).unsqueeze(0))
    with pytest.raises(ValueError, match="seeds must have shape"):
        sample(hidden, weight, torch.arange(16))
