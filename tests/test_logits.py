"""logprob_from_logits against hand-computed numbers, float64 and autograd."""

import math

import pytest
import torch
from lm_head import IMPLS, every_impl, needs_cpu

from fastrl.kernels import logprob_from_logits

INF = float("inf")


def problem(shape, dtype=torch.float32, k=None, spread=3.0):
    logits = torch.randn(shape, dtype=torch.float64) * spread
    target = torch.randint(shape[-1], shape[:-1] if k is None else (*shape[:-1], k))
    return logits.to(dtype), target


def loss(out, upstream):
    return sum((g * x).sum() for g, x in zip(upstream, out, strict=True) if g is not None)


@every_impl
def test_hand_computed_with_masked_entries(impl):
    # Probabilities 1/8, 2/8, 5/8 and an entry that cannot be.
    p = [1 / 8, 2 / 8, 5 / 8]
    logits = torch.tensor([[0.0, math.log(2), -INF, math.log(5)]], requires_grad=True)
    out = logprob_from_logits(logits, torch.tensor([3]), entropy=True, impl=impl)
    assert out.logprob.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    assert out.lse.item() == pytest.approx(math.log(8), abs=1e-6)
    spread = -sum(x * math.log(x) for x in p)
    assert out.entropy.item() == pytest.approx(spread, abs=1e-6)
    (grad,) = torch.autograd.grad(out.logprob + 2 * out.entropy + 3 * out.lse, logits)
    by_hand = [-x - 2 * x * (math.log(x) + spread) + 3 * x for x in p]
    by_hand[2] += 1
    by_hand.insert(2, 0.0)
    torch.testing.assert_close(grad[0], torch.tensor(by_hand), rtol=1e-5, atol=1e-6)
    assert grad[0, 2] == 0.0
    extreme = torch.tensor([[-INF, 80.0, -100.0]])
    out = logprob_from_logits(extreme, torch.tensor([[1, 0]]), entropy=True, impl=impl)
    assert out.logprob.tolist() == [[0.0, -INF]] and abs(out.entropy.item()) < 1e-30
    low = torch.tensor([[-150.0, -120.0, -200.0]])
    out = logprob_from_logits(low, torch.tensor([1]), entropy=True, impl=impl)
    assert out.lse.item() == pytest.approx(-120.0)
    assert out.logprob.item() == pytest.approx(0.0, abs=1e-6)


@every_impl
def test_several_targets(impl):
    logits, target = problem((4, 5, 11), k=3)
    out = logprob_from_logits(logits, target, temperature=0.7, impl=impl)
    want = torch.log_softmax(logits / 0.7, -1).gather(-1, target)
    torch.testing.assert_close(out.logprob, want)
    one = logprob_from_logits(logits, target[..., 0], temperature=0.7, impl=impl)
    torch.testing.assert_close(one.logprob, want[..., 0])
    assert out.entropy is None and out.lse.shape == (4, 5)


@pytest.mark.parametrize("which", ["logprob", "lse", "entropy"])
def test_reference_gradients(which):
    logits, target = problem((3, 7), torch.float64, k=2)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def f(logits):
        out = logprob_from_logits(logits, target, temperature=temperature, entropy=True)
        return getattr(out, which)

    assert torch.autograd.gradcheck(f, logits.requires_grad_())


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("shape", "k"), [((1, 151), None), ((17, 4097), 5), ((3, 2, 32003), None), ((333, 10), 2)]
)
def test_cpu_error_is_at_most_twice_the_references(shape, k, which, dtype):
    logits, target = problem(shape, dtype, k)
    temperature = torch.rand(shape[:-1]) + 0.5
    upstream = [torch.randn(s) for s in (target.shape, shape[:-1], shape[:-1])]
    upstream = [g if i in which else None for i, g in enumerate(upstream)]

    def run(x, impl):
        x = x.detach().requires_grad_()
        out = logprob_from_logits(x, target, temperature=temperature, entropy=True, impl=impl)
        return [y.detach().double() for y in (*out, *torch.autograd.grad(loss(out, upstream), x))]

    truth = run(logits.double(), "reference")
    for mine, theirs, t in zip(run(logits, "cpu"), run(logits, "reference"), truth, strict=True):
        assert mine.shape == t.shape
        norm = t.norm().clamp(min=1e-30)
        assert (mine - t).norm() / norm <= 2 * (theirs - t).norm() / norm + 2e-7


@needs_cpu
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_cpu_rows_without_a_distribution_are_the_references(temperature):
    logits = torch.randn(6, 5000)
    logits[1] = -INF
    logits[2, :4500] = -INF  # a whole slice
    logits[3, 7] = float("nan")
    target = torch.tensor([1, 2, 4999, 4, 5, 6])
    results = []
    for impl in IMPLS:
        x = logits.clone().requires_grad_()
        out = logprob_from_logits(x, target, temperature=temperature, entropy=True, impl=impl)
        grad = torch.autograd.grad((out.logprob + out.lse + out.entropy).sum(), x)
        results.append((*out, *grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert results[0][1][1] == -INF and results[0][0][1].isnan()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_bits_depend_on_neither_batch_nor_threads(dtype):
    logits, target = problem((40, 9001), dtype)
    upstream = torch.randn(40)

    def run(rows):
        x = logits[rows].clone().requires_grad_()
        out = logprob_from_logits(x, target[rows], entropy=True, impl="cpu")
        grads = torch.autograd.grad(((out.logprob + 0.3 * out.entropy) * upstream[rows]).sum(), x)
        return [*out, *grads]

    whole = run(slice(None))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for rows in (slice(None), slice(0, 1), slice(5, 8), slice(10, 40)):
            for part, all_rows in zip(run(rows), whole, strict=True):
                assert torch.equal(part, all_rows[rows])


@needs_cpu
def test_cpu_reads_every_layout_in_place_or_from_a_copy():
    whole = torch.randn(3, 6, 4, 50)
    layouts = {
        "the last position dropped": whole[:, :-1],
        "every other row": whole[:, ::2, 1:3],
        "rows swapped": whole.transpose(0, 2),
        "rows repeated": whole[:, :1].expand(3, 6, 4, 50),
        "a part of V": whole[..., 5:37],
        "every other entry": whole[..., ::2],
        "V first": torch.randn(50, 3, 4).permute(1, 2, 0),
        "one row": torch.randn(50),
        "V of 1": whole[..., :1],
    }
    for name, view in layouts.items():
        x = view.detach().requires_grad_()
        target = torch.randint(view.shape[-1], (*view.shape[:-1], 2)).transpose(0, 0)
        results = []
        for impl in IMPLS:
            out = logprob_from_logits(x, target, entropy=True, impl=impl)
            grad = torch.autograd.grad(out.logprob.sum() + out.entropy.square().sum(), x)
            results.append((*out, *grad))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5, msg=name)
    for shape, target in (((0, 7), (0,)), ((3, 7), (3, 0)), ((2, 0, 7), (2, 0, 4))):
        x = torch.randn(shape, requires_grad=True)
        out = logprob_from_logits(x, torch.zeros(target, dtype=torch.int64), impl="cpu")
        assert out.logprob.shape == target
        (out.logprob.sum() + out.lse.sum()).backward()
        assert x.grad.shape == shape


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_the_gradient_over_the_logits(dtype):
    x, target = problem((6, 5000), dtype, k=2)
    upstream = [torch.randn(6, 2), torch.randn(6), torch.randn(6)]

    def run(x, **options):
        return loss(logprob_from_logits(x, target, entropy=True, impl="cpu", **options), upstream)

    (want,) = torch.autograd.grad(run(x.requires_grad_()), x)
    # A leaf: its .grad is its own memory.
    leaf = x.detach().clone().requires_grad_()
    before = leaf.data_ptr()
    run(leaf, inplace_backward=True).backward()
    assert torch.equal(leaf.grad, want)
    assert leaf.grad.data_ptr() == before == leaf.data_ptr()
    assert torch.equal(leaf.detach(), want)
    # In the middle of a graph, as behind an lm-head: the same memory reaches the node before.
    weight = torch.randn(5000, 8, dtype=dtype, requires_grad=True)
    hidden = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    want = torch.autograd.grad(run(hidden @ weight.T), (hidden, weight))
    seen = []
    logits = hidden @ weight.T
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    got = torch.autograd.grad(run(logits, inplace_backward=True), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert seen == [logits.data_ptr()]


@needs_cpu
def test_inplace_backward_refuses_what_needs_the_logits():
    x, target = problem((6, 300))
    run = lambda y: logprob_from_logits(  # noqa: E731
        y, target, inplace_backward=True, impl="cpu"
    ).logprob.sum()
    modified = "modified by an inplace operation"

    def logits():
        return x.clone().requires_grad_() * 1.0

    # Its own graph once more.
    y = logits()
    total = run(y)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=modified):
        total.backward()
    # Another node that has saved the logits, or a view of them, and runs later.
    for other in (lambda y: y.square().sum(), lambda y: y.view(-1).square().sum(), run):
        y = logits()
        early = other(y)
        with pytest.raises(RuntimeError, match=modified):
            (early + run(y)).backward()
    # The node that made the logits and has saved them.
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=modified):
        run(leaf.tanh()).backward()
    # One that runs before, or needs no values: the sum of the gradients.
    for other in (lambda y: y.square().sum(), lambda y: (y * 2.0).sum()):
        for first in (True, False):
            leaf = x.clone().requires_grad_()
            y = leaf * 1.0
            parts = [run, other] if first else [other, run]
            want = torch.autograd.grad(
                logprob_from_logits(leaf, target).logprob.sum() + other(leaf), leaf
            )
            try:
                got = torch.autograd.grad(sum(part(y) for part in parts), leaf)
            except RuntimeError as error:
                assert modified in str(error) and not first
            else:
                torch.testing.assert_close(got, want)


@needs_cpu
def test_inplace_backward_is_refused_where_it_cannot_be():
    x, target = problem((6, 10))
    with pytest.raises(ValueError, match=r"contiguous logits, got strides \(1, 6\)"):
        logprob_from_logits(x.T.contiguous().T, target, inplace_backward=True)
    for wide, impl in ((x, "reference"), (x.double(), "auto")):
        with pytest.raises(ValueError, match="inplace_backward=True needs a kernel"):
            logprob_from_logits(wide, target, inplace_backward=True, impl=impl)
    options = {"inplace_backward": True, "impl": "cpu"}
    whole = torch.compile(lambda y: logprob_from_logits(y, target, **options), fullgraph=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward=True does not work inside"):
        whole(x)
    compiled = torch.compile(
        lambda y: logprob_from_logits(y * 2.0, target, **options).logprob.sum(), backend="aot_eager"
    )
    x.requires_grad_()
    (want,) = torch.autograd.grad(logprob_from_logits(x * 2.0, target).logprob.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], want)


@needs_cpu
def test_opcheck_compile_and_autocast():
    x, target = problem((5, 11), k=2)
    x.requires_grad_()
    for temperatures in (None, torch.rand(5) + 0.5):
        arguments = (x, target, temperatures, 1.3, False, "cpu")
        torch.library.opcheck(torch.ops.fastrl.logprob_from_logits, arguments)
    plain = logprob_from_logits(x, target, entropy=True)
    compiled = torch.compile(logprob_from_logits, fullgraph=True, backend="aot_eager")
    got = compiled(x, target, entropy=True)
    torch.testing.assert_close(tuple(got), tuple(plain))
    grads = [torch.autograd.grad(loss(out, [1.0] * 3), x)[0] for out in (plain, got)]
    torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logprob_from_logits(x, target, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert cast.logprob.dtype == torch.float32


@needs_cpu
@pytest.mark.slow
def test_cpu_more_logits_than_int32_counts():
    n, v = 16_500, 131_072  # 4.3 GB
    row = torch.randn(v).to(torch.bfloat16)
    logits = torch.empty(n, v, dtype=torch.bfloat16)
    for i in range(n):
        logits[i] = row.roll(i) if i > n - 5 else row
    target = torch.full((n,), v - 1)
    out = logprob_from_logits(
        logits.requires_grad_(), target, entropy=True, inplace_backward=True, impl="cpu"
    )
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    small = logits.detach()[some].requires_grad_()
    want = logprob_from_logits(small, target[some], entropy=True, impl="cpu")
    assert all(torch.equal(a[some], b) for a, b in zip(out, want, strict=True))
    want.logprob.sum().backward()
    out.logprob.sum().backward()
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert torch.equal(logits.grad[some], small.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl='fast' is unknown"),
        ({"impl": "cuda"}, "impl='cuda' is unavailable"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": torch.ones(3)}, "temperature must be a number or a tensor of shape"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have shape"),
        ({"target": torch.zeros(17)}, "target must be int64"),
        ({"target": torch.zeros(17, dtype=torch.int64, device="meta")}, "target is on meta"),
        ({"logits": torch.zeros(17, 5, dtype=torch.int64)}, "logits must be floating point"),
    ],
)
def test_bad_arguments_are_named(change, message):
    logits, target = problem((17, 5))
    with pytest.raises(ValueError, match=message):
        logprob_from_logits(**({"logits": logits, "target": target} | change))


@needs_cpu
def test_cpu_bad_values_are_named():
    logits, target = problem((17, 5))
    for bad in (5, -1):
        with pytest.raises(ValueError, match=rf"target must lie in \[0, V=5\).*{bad}"):
            logprob_from_logits(logits, torch.full((17,), bad), impl="cpu")
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        warm = torch.ones(17, requires_grad=True)
        logprob_from_logits(logits, target, temperature=warm, impl="cpu")
    with pytest.raises(ValueError, match=r"logits must be float32.*got torch.float64"):
        logprob_from_logits(logits.double(), target, impl="cpu")
