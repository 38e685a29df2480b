"""linear_logprob on two processes that hold a slice of the vocabulary each."""

import pytest
import torch
import torch.distributed as dist

from fastrl.kernels import linear_logprob, native

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, torch.device("cpu")) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
SPLIT = 300  # of 1009 entries, the first rank's


def slices(rank):
    return slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)


def problem(n=37, h=64, v=1009, dtype=torch.float32):
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * (2 / h**0.5)
    return hidden.to(dtype), weight.to(dtype), torch.randint(v, (n,))


def statistics_and_gradients(hidden, weight, target, upstream, *, bias=None, rank=None, **options):
    """Log-prob, lse, entropy and gradients; of this rank's slice where one is given."""
    if rank is not None:
        weight, bias = weight[slices(rank)], None if bias is None else bias[slices(rank)]
        options["tp_group"] = dist.group.WORLD
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    if bias is not None:
        inputs.append(bias.detach().clone().requires_grad_())
        options["bias"] = inputs[2]
    out = linear_logprob(*inputs[:2], target, entropy=True, **options)
    loss = sum((g * x).sum() for g, x in zip(upstream, out, strict=True))
    return [x.detach() for x in out], list(torch.autograd.grad(loss, inputs))


def distance(x, y):
    return ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()


def _against_float64(rank, impl, dtype, which, warped):
    hidden, weight, target = problem(dtype=dtype)
    target[::5] = -100
    hidden[::5] = float("nan")
    upstream = [torch.randn(37) * (which in (None, i)) for i in range(3)]
    options = {"bias": torch.randn(1009)} if warped else {}
    exact = {name: x.double() for name, x in options.items()}
    if warped:
        more = {"temperature": torch.rand(37) + 0.5, "softcap": 6.0, "logit_scale": 1.5}
        options |= more
        exact |= more
    truth = statistics_and_gradients(
        hidden.double(), weight.double(), target, upstream, impl="reference", **exact
    )
    plain = statistics_and_gradients(hidden, weight, target, upstream, impl="reference", **options)
    mine = statistics_and_gradients(
        hidden, weight, target, upstream, impl=impl, rank=rank, **options
    )
    for gradients in (truth[1], plain[1]):
        gradients[1:] = [g[slices(rank)] for g in gradients[1:]]
    for m, p, t in zip(*(a + b for a, b in (mine, plain, truth)), strict=True):
        assert m.dtype == p.dtype and m.shape == p.shape
        assert distance(m, t) <= 2 * distance(p, t) + 2e-7
    return mine[0] + mine[1][:1]  # what all ranks hold


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warped", [False, True])
def test_slices_err_at_most_twice_as_much_as_one_process(ranks, impl, dtype, warped):
    first, second = ranks.run(_against_float64, impl, dtype, None, warped)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_each_output_alone(ranks, which):
    ranks.run(_against_float64, IMPLS[-1], torch.float32, which, False)


def _extreme_logits(rank, impl):
    """One slice near +80 or -1000, the other below; targets in both."""
    hidden = 1 + torch.rand(64, 1) / 8
    target = torch.randint(1009, (64,))
    for low, high in ((-150.0, 80.0), (-1000.0, -900.0), (-1e-3, 1e-3)):
        weight = low + torch.rand(1009, 1)
        weight[SPLIT + 7 :] += high - low
        truth = linear_logprob(hidden.double(), weight.double(), target, entropy=True)
        out = linear_logprob(
            hidden,
            weight[slices(rank)],
            target,
            entropy=True,
            impl=impl,
            tp_group=dist.group.WORLD,
        )
        plain = linear_logprob(hidden, weight, target, entropy=True, impl="reference")
        for x, p, t in zip(out, plain, truth, strict=True):
            assert (x - t).norm() <= 2 * (p - t).norm() + 2e-6


@every_impl
def test_extreme_logits(ranks, impl):
    ranks.run(_extreme_logits, impl)


def _bits(rank, impl, dtype):
    hidden, weight, target = problem(150, dtype=dtype)
    target[::7] = -100
    upstream = [torch.randn(150) for _ in range(3)]

    def run(rows):
        given = [u[rows] for u in upstream]
        out, gradients = statistics_and_gradients(
            hidden[rows], weight, target[rows], given, impl=impl, rank=rank
        )
        return [*out, gradients[0]]

    all_rows = slice(None)
    want = run(all_rows)
    for rows in (all_rows, slice(5, 6), slice(40, 57), slice(101, 150)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), want, strict=True))


@pytest.mark.skipif("cpu" not in IMPLS, reason="the reference's bits depend on the batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_do_not_depend_on_its_batch(ranks, dtype):
    ranks.run(_bits, "cpu", dtype)


def _ignored(rank, impl):
    group = dist.group.WORLD
    hidden, weight, some = problem()
    mine = weight[slices(rank)].clone().requires_grad_()
    for ignored in (0, SPLIT, 1008, -1):  # entries of the vocabulary, too
        target = some.clone()
        target[::3] = ignored
        options = {"ignore_index": ignored, "impl": impl}
        want = linear_logprob(hidden, weight, target, **options)
        got = linear_logprob(hidden, mine, target, tp_group=group, **options)
        assert got.entropy is None and not got.logprob[::3].any() and not got.lse[::3].any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for rows in (37, 0):
        x = hidden[:rows].clone().requires_grad_()
        none = torch.full((rows,), -100)
        out = linear_logprob(x, mine, none, entropy=True, impl=impl, tp_group=group)
        gradients = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [x, mine])
        assert not any(y.any() for y in (*out, *gradients))
    batch = linear_logprob(hidden.view(1, 37, 64), mine, some.view(1, 37), tp_group=group)
    assert batch.lse.shape == (1, 37)


@every_impl
def test_ignored_rows_are_zero(ranks, impl):
    ranks.run(_ignored, impl)


def _what_is_sent(rank):
    """Shapes that a rank hands to the others, without and with entropy, then in the backward."""
    sent = []
    gather, exchange = dist.all_gather, dist.all_to_all_single
    hidden, weight, target = problem()
    hidden.requires_grad_()
    dist.all_gather = lambda parts, x, **k: (sent.append(tuple(x.shape)), gather(parts, x, **k))
    dist.all_to_all_single = lambda y, x, **k: (sent.append(tuple(x.shape)), exchange(y, x, **k))
    try:
        for entropy in (False, True):
            out = linear_logprob(
                hidden, weight[slices(rank)], target, entropy=entropy, tp_group=dist.group.WORLD
            )
        out.logprob.sum().backward()
    finally:
        dist.all_gather, dist.all_to_all_single = gather, exchange
    return sent


def test_statistics_and_gradients_of_hidden_are_all_that_is_sent(ranks):
    for sent in ranks.run(_what_is_sent):
        # Per call eight integers, then the statistics; the sum of the hidden gradients by parts.
        assert sent == [(8,), (2, 37), (8,), (3, 37), (37 * 64,), (37 * 32,)]


def _compiled(rank, impl):
    hidden, weight, target = problem()
    mine = weight[slices(rank)].clone().requires_grad_()
    hidden.requires_grad_()

    def loss(hidden, weight):
        out = linear_logprob(
            hidden, weight, target, entropy=True, impl=impl, tp_group=dist.group.WORLD
        )
        return out.logprob.sum() + 0.3 * out.entropy.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(hidden, mine), [hidden, mine])
    got = torch.autograd.grad(compiled(hidden, mine), [hidden, mine])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph(ranks):
    ranks.run(_compiled, IMPLS[-1])


def _temperature(rank):
    hidden, weight, target = problem()
    warm = (torch.rand(37) + 0.5).requires_grad_()
    gradients = []
    for w, group in ((weight, None), (weight[slices(rank)], dist.group.WORLD)):
        out = linear_logprob(hidden, w, target, temperature=warm, impl="reference", tp_group=group)
        gradients.append(torch.autograd.grad(out.logprob.sum(), warm)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_temperature_has_a_gradient_with_the_reference(ranks):
    ranks.run(_temperature)


def _errors(rank):
    hidden, weight, target = problem()
    mine, group = weight[slices(rank)], dist.group.WORLD

    def raises(message, hidden=hidden, mine=mine, target=target, group=group, **options):
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, mine, target, tp_group=group, **options)

    for bad in (1009, -1):
        raises(rf"target must lie in \[0, V=1009\).*{bad}", target=torch.full((37,), bad))
    raises(r"rows of hidden must be the same.*\[37, 36\]", hidden[rank:], target=target[rank:])
    raises(r"hidden's H must be.*\[64, 63\]", hidden[:, rank:], mine[:, rank:])
    raises("hidden must end in weight's H=63", mine=mine[:, 1:])
    raises("lowest target must be the same", target=torch.full((37,), -100 if rank else -7))
    raises(r"entropy must be the same.*\[1, 0\]", entropy=rank == 0)
    raises(r"gradient must be.*\[0, 1\]", hidden.clone().requires_grad_(rank == 1))
    raises(r"V=\[300, 0\]", mine=mine if rank == 0 else mine[:0])
    raises("ProcessGroup that holds this process, got 'tp'", group="tp")
    alone = dist.new_group([0])
    if rank == 1:
        raises("that holds this process", group=alone)


def test_bad_arguments_raise_on_every_rank(ranks):
    ranks.run(_errors)


def test_tp_group_needs_torch_distributed():
    hidden, weight, target = problem()
    with pytest.raises(ValueError, match="init_process_group"):
        linear_logprob(hidden, weight, target, tp_group="tp")
