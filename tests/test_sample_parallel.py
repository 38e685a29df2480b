"""linear_sample on two processes that hold a slice of the vocabulary each."""

import pytest
import torch
import torch.distributed as dist
from lm_head import IMPLS, every_impl, problem
from test_sample import SETTINGS

from fastrl.kernels import linear_sample
from fastrl.kernels.logprob import parallel_sample
from fastrl.kernels.logprob.reference import gumbel, project, splitmix64

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def slices(rank, split, vocab):
    return slice(0, split) if rank == 0 else slice(split, vocab)


def both(rank, hidden, weight, rows, split, *, bias=None, **options):
    """What one process and what two of them draw."""
    mine = slices(rank, split, len(weight))
    options |= {"seeds": rows * 7 - 3, "positions": rows % 5}
    want = linear_sample(hidden, weight, bias=bias, **options)
    some = None if bias is None else bias[mine]
    options["tp_group"] = dist.group.WORLD
    return linear_sample(hidden, weight[mine], bias=some, **options), want


def test_shifted_seeds_have_the_noise_of_later_entries():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    positions = torch.tensor([0, 7, 2**40, 3, 0, 1])
    assert torch.equal(parallel_sample._unsplitmix64(splitmix64(seeds)), seeds)
    whole = gumbel(seeds, positions, 200)
    for first in (0, 1, 77):
        shifted = parallel_sample.from_entry(seeds, positions, torch.tensor(first))
        assert torch.equal(gumbel(shifted, positions, 200 - first), whole[:, first:])


def _as_one(rank, impl, dtype, settings, spread, warped):
    n, v = 300, 1009
    hidden, weight, _ = problem(n, 33, v, dtype)
    weight = weight * (spread / 33**0.5)
    options = {"impl": impl, **settings}
    if warped:
        options |= {"bias": torch.randn(v), "softcap": 6.0, "logit_scale": 1.5}
    found = []
    for split in (1, 300, 1000):
        got, want = both(rank, hidden, weight, torch.arange(n), split, **options)
        agree = got.token == want.token
        if not agree.all():  # only where rounding makes two perturbed logits equal
            logits = project(hidden, weight) / (settings.get("temperature") or 1.0)
            at = torch.arange(n)
            noise = gumbel(at * 7 - 3, at % 5, v) * (settings.get("temperature") != 0.0)
            pair = [(logits + noise).gather(1, x.token.unsqueeze(1))[~agree] for x in (got, want)]
            assert not warped and (pair[0] - pair[1]).abs().max() < 1e-4 and (~agree).sum() <= 1
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            assert mine.dtype == theirs.dtype == torch.float32
            # top_p may keep one token more or less where the sums are equal to rounding.
            close = 2e-3 if "top_p" in settings else 2e-5
            assert (mine - theirs).abs()[agree].max() < close
        found += got
    return found


@every_impl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_what_one_process_draws(ranks, impl, settings):
    for dtype, spread, warped in (
        (torch.float32, 1.0, False),
        (torch.bfloat16, 4.0, False),
        (torch.float32, 2.0, True),
    ):
        first, second = ranks.run(_as_one, impl, dtype, settings, spread, warped)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _ties(rank, impl):
    # One hidden unit of 1: the weight's column is the row of logits.
    p = [0.1, 0.3, 0.1, 0.3, 0.1, 0.1]
    weight, n = torch.log(torch.tensor(p)).unsqueeze(1), 400
    for options, kept in (
        ({"top_k": 1}, [1, 3]),
        ({"top_k": 3}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 50}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.65}, [0, 1, 3]),
        ({"top_p": 0.75}, [0, 1, 2, 3]),
        ({"top_p": 0.85}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 2, "top_p": 0.4}, [1]),
        ({"top_p": 0.75, "min_p": 0.5}, [1, 3]),
        ({"min_p": 0.3}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 1.0}, [1, 3]),
    ):
        for split in (1, 2, 3, 5):
            got, _ = both(
                rank, torch.ones(n, 1), weight, torch.arange(n), split, impl=impl, **options
            )
            assert torch.unique(got.token).tolist() == kept, (options, split)
            share = torch.log(torch.tensor(p) / sum(p[v] for v in kept))[got.token]
            torch.testing.assert_close(got.logprob, share, rtol=1e-5, atol=1e-5)
    ones = torch.ones(77, 1)
    rows = torch.arange(50)
    for options in ({"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}):
        got, want = both(rank, torch.ones(50, 1), ones, rows, 30, impl=impl, **options)
        assert not got.token.any() and not got.logprob.any()
        torch.testing.assert_close(got.untruncated_logprob, want.untruncated_logprob)


@every_impl
def test_ties_across_slices(ranks, impl):
    ranks.run(_ties, impl)


def _no_distribution(rank, impl):
    hidden, weight, _ = problem(20, 32, 1000)
    rows = torch.arange(20)
    fine = rows >= 5
    masked = torch.zeros(1000)
    masked[300:] = float("-inf")  # a whole slice
    for settings in ({}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}, {"min_p": 0.1}):
        options = {"impl": impl, **settings}
        clean, _ = both(rank, hidden, weight, rows, 300, **options)
        broken = hidden.clone()
        broken[3], broken[4] = float("nan"), float("inf")
        got, _ = both(rank, broken, weight, rows, 300, **options)
        assert all(torch.equal(a[fine], b[fine]) for a, b in zip(got, clean, strict=True))
        assert ((got.token >= 0) & (got.token < 1000)).all()
        assert got.untruncated_logprob[3:5].isnan().all()
        got, want = both(rank, hidden, weight, rows, 300, bias=masked, **options)
        assert torch.equal(got.token, want.token)
        torch.testing.assert_close(got[1:], want[1:], rtol=1e-5, atol=2e-5)
        nothing = torch.full((1000,), float("-inf"))
        got, _ = both(rank, hidden[:1], weight, rows[:1], 300, bias=nothing, **options)
        assert got.token.item() == 0 and not torch.isfinite(got.untruncated_logprob).any()
        empty, _ = both(rank, hidden[:0], weight, rows[:0], 300, **options)
        assert empty.token.shape == (0,) and empty.logprob.dtype == torch.float32


@every_impl
def test_rows_that_are_no_distribution_harm_no_other(ranks, impl):
    ranks.run(_no_distribution, impl)


def _few_rows_at_once(rank):
    hidden, weight, _ = problem(50, 16, 1000)
    options = {"impl": "reference", "top_k": 20, "top_p": 0.9}
    want, _ = both(rank, hidden, weight, torch.arange(50), 400, **options)
    before, parallel_sample.HELD_BYTES = parallel_sample.HELD_BYTES, 4 * 600 * 7
    try:
        got, _ = both(rank, hidden, weight, torch.arange(50), 400, **options)
    finally:
        parallel_sample.HELD_BYTES = before
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-5, atol=1e-5)


def test_rows_beyond_what_is_held_at_once(ranks):
    ranks.run(_few_rows_at_once)


def _float64_and_autocast(rank):
    hidden, weight, _ = problem(40, 16, 500, torch.float64)
    for options in ({}, {"top_p": 0.7, "min_p": 0.01, "top_k": 40}):
        got, want = both(rank, hidden, weight, torch.arange(40), 200, **options)
        assert torch.equal(got.token, want.token) and got.logprob.dtype == want.logprob.dtype
        torch.testing.assert_close(got[1:], want[1:], rtol=1e-6, atol=1e-6)
        plain, _ = both(rank, hidden.float(), weight.float(), torch.arange(40), 200, **options)
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = both(rank, hidden.float(), weight.float(), torch.arange(40), 200, **options)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_float64_and_autocast(ranks):
    ranks.run(_float64_and_autocast)


def _errors(rank):
    hidden, weight, _ = problem(17, 32, 151)
    rows = torch.arange(17)
    mine = weight[slices(rank, 60, 151)]

    def raises(message, hidden=hidden, mine=mine, seeds=rows, group=dist.group.WORLD, **options):
        with pytest.raises(ValueError, match=message):
            linear_sample(hidden, mine, seeds=seeds, positions=seeds, tp_group=group, **options)

    raises(r"rows of hidden must be the same.*\[17, 16\]", hidden[rank:], seeds=rows[rank:])
    raises(r"hidden's H must be.*\[32, 31\]", hidden[:, rank:], mine[:, rank:])
    raises("sum of seeds must be the same", seeds=rows + rank)
    raises(r"top_k must be the same.*\[5, 6\]", top_k=5 + rank)
    for name in ("temperature", "top_p", "min_p"):
        raises(f"{name} .*must be the same", **{name: 0.5 + rank / 4})
    raises(r"V=\[60, 0\]", mine=mine if rank == 0 else mine[:0])
    raises("ProcessGroup that holds this process, got 'tp'", group="tp")
    raises("impl='triton' is unavailable", impl="triton", top_k=3)


def test_bad_arguments_raise_on_every_rank(ranks):
    ranks.run(_errors)


def test_tp_group_needs_torch_distributed():
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match="init_process_group"):
        rows = torch.arange(17)
        linear_sample(hidden, weight, seeds=rows, positions=rows, tp_group="tp", impl=IMPLS[-1])
