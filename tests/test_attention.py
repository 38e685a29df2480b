"""shared_prefix_attention: by hand, float64, torch's attention on the replicated batch, bits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from gpu_proof import run_python

from fastrl.kernels import GroupLayout, native, shared_prefix_attention

CPU = torch.device("cpu")
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, CPU) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
needs_cpu = pytest.mark.skipif("cpu" not in IMPLS, reason=f"no cpu kernels: {native.why_missing}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])

# Several prompts: odd lengths, one completion or none, an empty prompt, empty completions.
MIXED = ([17, 233, 0, 40, 3], [[1, 17, 90], [100], [5, 0, 70], [], [0, 0]])


def draw(layout, heads, kv_heads, width, dtype=torch.float32, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    tokens = int(layout.offsets[-1])
    shapes = [(tokens, h, width) for h in (heads, kv_heads, kv_heads)]
    return [(torch.randn(s, generator=g, dtype=torch.float64) * size).to(dtype) for s in shapes]


def run(inputs, layout, impl="cpu", dtype=None, **options):
    """out, lse and the gradients of q, k and v for a fixed upstream gradient of both."""
    g = torch.Generator().manual_seed(1)
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out, lse = shared_prefix_attention(*inputs, layout, return_lse=True, impl=impl, **options)
    grad_out = torch.randn(out.shape, generator=g).to(inputs[0].dtype)
    grad_lse = torch.randn(lse.shape, generator=g)
    loss = (out * grad_out.to(out.dtype)).sum() + (lse * grad_lse).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(loss, inputs))]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_accurate(inputs, layout, outputs=None, tiny=3e-7, **options):
    """Relative errors at most twice those of the reference in the same dtype."""
    truth = run([x.double() for x in inputs], layout, "reference", **options)
    plain = run(inputs, layout, "reference", **options)
    outputs = run(inputs, layout, **options) if outputs is None else outputs
    for name, got, other, want in zip(
        ("out", "lse", "q", "k", "v"), outputs, plain, truth, strict=True
    ):
        assert got.dtype == other.dtype
        norm = want.norm().clamp(min=1e-30)
        mine, theirs = ((x.double() - want).norm() / norm for x in (got, other))
        assert mine <= 2 * theirs + tiny, (name, mine.item(), theirs.item())


# ---- layouts -----------------------------------------------------------------------------------


def test_layout_by_hand():
    layout = GroupLayout.from_lengths([2, 0, 1], [[1, 2], [2], []])
    assert layout.offsets.tolist() == [0, 2, 3, 5, 5, 7, 8]
    assert layout.groups.tolist() == [0, 3, 5, 6]
    assert layout.offsets.dtype == layout.groups.dtype == torch.int32
    assert layout.positions().tolist() == [0, 1, 2, 2, 3, 0, 1, 0]
    rows = ["x", "xx", "xxx", "xx.x", "xx.xx", ".....x", ".....xx", ".......x"]
    assert [[c == "x" for c in row.ljust(8)] for row in rows] == layout.mask().tolist()
    rows = ["x", "xx", ".xx", ".x.x", "...xx", ".....x", ".....xx", ".......x"]
    assert [[c == "x" for c in row.ljust(8)] for row in rows] == layout.mask(window=2).tolist()


def test_empty_layouts():
    for layout in (GroupLayout.from_lengths([], []), GroupLayout.from_lengths([0], [[0, 0]])):
        assert layout.positions().shape == (0,) and layout.mask().shape == (0, 0)
        for impl in IMPLS:
            q, k, v = draw(layout, 4, 2, 32)
            q.requires_grad_()
            out = shared_prefix_attention(q, k, v, layout, impl=impl)
            assert out.shape == (0, 4, 32)
            out.sum().backward()
            assert q.grad.shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        ([1, 2], [[1]], "one list for each of 2 prompts, got 1"),
        ([-1], [[1]], "lengths must not be negative, got -1"),
        ([1], [[2, -3]], "lengths must not be negative, got -3"),
        ([2**31 - 1], [[1]], "at most 2147483647 tokens, got 2147483648"),
    ],
)
def test_wrong_lengths_are_named(prompts, completions, says):
    with pytest.raises(ValueError, match=says):
        GroupLayout.from_lengths(prompts, completions)


@every_impl
@pytest.mark.parametrize(
    ("offsets", "groups", "says"),
    [
        ([1, 5], [0, 1], r"offsets must start at 0.*T=5, got \[1, 5\]"),
        ([0, 4], [0, 1], r"offsets must .*end at the number of tokens, T=5, got \[0, 4\]"),
        ([0, 4, 3, 5], [0, 3], "offsets must .*never decrease"),
        ([], [0], r"offsets must .*got \[\]"),
        ([0, 5], [0], r"groups must start at 0.*number of segments, 1, got \[0\]"),
        ([0, 5], [0, 0, 1], "groups must .*increase"),
        ([0, 2, 5], [1, 2], r"groups must start at 0.*got \[1, 2\]"),
    ],
)
def test_wrong_layouts_are_named(offsets, groups, says, impl):
    layout = GroupLayout(*(torch.tensor(x, dtype=torch.int32) for x in (offsets, groups)))
    with pytest.raises(ValueError, match=says):
        shared_prefix_attention(*torch.zeros(3, 5, 1, 32), layout, impl=impl)


# ---- numbers -----------------------------------------------------------------------------------


@every_impl
def test_by_hand(impl):
    # One prompt token and two completions of two and one; keys log 1, log 2, log 4, log 3 give the
    # weights 1, 2, 4, 3 to a query of 1.
    layout = GroupLayout.from_lengths([1], [[2, 1]])
    q, k, v = torch.zeros(3, 4, 1, 8)
    q[:, 0, 0] = 1.0
    k[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 3.0]).log()
    v[:, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    want = [1.0, 21 / 3, 421 / 7, 3001 / 4]
    at = {"scale": 1.0, "return_lse": True, "impl": impl}
    out, lse = shared_prefix_attention(q, k, v, layout, **at)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor(want))
    torch.testing.assert_close(lse[:, 0], torch.tensor([1.0, 3.0, 7.0, 4.0]).log())
    out, lse = shared_prefix_attention(q, k, v, layout, window=2, **at)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, 21 / 3, 420 / 6, 3001 / 4]))
    out, lse = shared_prefix_attention(q, k, v, layout, softcap=0.5, **at)
    capped = [math.exp(0.5 * math.tanh(math.log(x) / 0.5)) for x in (1, 2)]
    assert lse[1, 0].item() == pytest.approx(math.log(sum(capped)), abs=1e-6)
    assert out[1, 0, 0].item() == pytest.approx((capped[0] + 10 * capped[1]) / sum(capped))


@every_impl
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_equals_torch_on_the_replicated_batch(impl, heads):
    layout = GroupLayout.from_lengths([23, 8], [[7, 30, 1], [40]])
    inputs = [x.requires_grad_() for x in draw(layout, *heads, 64)]
    out = shared_prefix_attention(*inputs, layout, impl=impl)
    upstream = torch.randn(out.shape)
    grads = torch.autograd.grad((out * upstream).sum(), inputs)
    # Each completion with a copy of its prompt; a prompt's own output from its first copy.
    offsets, groups = layout.offsets.tolist(), layout.groups.tolist()
    want, loss = torch.zeros_like(out), 0.0
    for first, end in itertools.pairwise(groups):
        prompt = range(offsets[first], offsets[first + 1])
        for s in range(first + 1, end):
            rows = torch.tensor([*prompt, *range(offsets[s], offsets[s + 1])])
            q, k, v = (x[rows].transpose(0, 1).unsqueeze(0) for x in inputs)
            dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            dense = dense.squeeze(0).transpose(0, 1)
            mine = rows if s == first + 1 else rows[len(prompt) :]
            part = dense[len(rows) - len(mine) :]
            want[mine] = part.detach()
            loss = loss + (part * upstream[mine]).sum()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)
    for got, dense in zip(grads, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-5)


def test_reference_gradients():
    layout = GroupLayout.from_lengths([2, 1], [[2, 1], [2]])
    inputs = [x.requires_grad_() for x in draw(layout, 2, 1, 3, torch.float64)]

    def f(*inputs):
        at = {"softcap": 2.0, "window": 3, "return_lse": True}
        return shared_prefix_attention(*inputs, layout, **at)

    assert torch.autograd.gradcheck(f, inputs)


@needs_cpu
@every_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(2, 2, 32), (4, 1, 64), (16, 1, 80), (4, 2, 128), (2, 1, 256), (7, 7, 40), (3, 1, 16)],
)
def test_cpu_error_is_at_most_twice_the_references(dtype, heads, kv_heads, width):
    layout = GroupLayout.from_lengths(*MIXED)
    inputs = draw(layout, heads, kv_heads, width, dtype)
    for options in ({}, {"window": 13}, {"softcap": 3.0, "scale": 0.3, "window": 150}):
        assert_accurate(inputs, layout, **options)


@needs_cpu
@every_dtype
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([1], [[1]]),
        ([17], [[1]]),
        ([0], [[333]]),
        ([333], [[17] * 5]),
        ([450], [[1, 2, 200, 3]]),
        ([1] * 9, [[1, 1]] * 9),
        ([193], [[1] * 70]),
    ],
)
def test_cpu_lengths(dtype, prompts, completions):
    layout = GroupLayout.from_lengths(prompts, completions)
    assert_accurate(draw(layout, 6, 2, 64, dtype), layout)
    assert_accurate(draw(layout, 3, 3, 32, dtype), layout, window=100)


@needs_cpu
@every_dtype
def test_cpu_extreme_scores(dtype):
    """Scores in the thousands, one key far above all others, all far below zero."""
    layout = GroupLayout.from_lengths([200], [[30, 40]])
    q, k, v = draw(layout, 2, 1, 64, dtype, size=16.0)
    v = v / 16
    k[7] = 40.0
    for inputs in ((q, k, v), (q.abs(), -k.abs(), v)):
        out, lse, *gradients = run(inputs, layout)
        assert all(torch.isfinite(x).all() for x in (out, lse, *gradients))
        # A float32 logsumexp in the thousands holds a probability to 1e-4 only.
        assert_accurate(inputs, layout, (out, lse, *gradients), tiny=3e-5)
    # Of 1e9 and more, whose product with the scale rounds by 64: all weight is on one key.
    q, k, v = draw(layout, 2, 1, 64, size=1e5)
    out, *others = run((q, k, v), layout)
    assert all(torch.isfinite(x).all() for x in (out, *others))
    torch.testing.assert_close(out, run((q, k, v), layout, "reference")[0])
    one = torch.full((1, 1, 32), 1e4)
    out, lse = shared_prefix_attention(
        one, one, one, GroupLayout.from_lengths([1], [[]]), return_lse=True, impl="cpu", scale=1.0
    )
    assert torch.equal(out, one) and lse.item() == pytest.approx(3.2e9)


@needs_cpu
@every_dtype
@pytest.mark.parametrize("size", [2.0, 3.0])
def test_cpu_gradients_where_one_key_has_all_the_weight(dtype, size):
    layout = GroupLayout.from_lengths([200], [[30, 40]])
    assert_accurate(draw(layout, 2, 1, 64, dtype, size=size), layout)


# ---- bits --------------------------------------------------------------------------------------


@needs_cpu
@every_dtype
def test_cpu_bits_do_not_depend_on_threads(dtype):
    layout = GroupLayout.from_lengths([400, 30], [[90, 1, 333], [150, 0]])
    inputs = draw(layout, 6, 2, 64, dtype)
    for options in ({}, {"window": 70}):
        torch.set_num_threads(1)
        want = run(inputs, layout, **options)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert same(run(inputs, layout, **options), want)


@needs_cpu
@every_dtype
@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 5.0}], ids=str)
def test_cpu_a_completion_does_not_depend_on_its_company(dtype, options):
    prompts, completions = [61, 230, 5], [[17, 1, 64, 0, 33], [200, 3], [9]]
    layout = GroupLayout.from_lengths(prompts, completions)
    inputs = draw(layout, 7, 1, 64, dtype)
    out, lse, grad_q, *_ = run(inputs, layout, **options)
    offsets, groups = layout.offsets.tolist(), layout.groups.tolist()
    g = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=g).to(dtype)
    grad_lse = torch.randn(lse.shape, generator=g)
    for n, group in enumerate(completions):
        for c, length in enumerate(group):
            s = groups[n] + 1 + c
            rows = torch.tensor(
                [
                    *range(offsets[groups[n]], offsets[groups[n] + 1]),
                    *range(offsets[s], offsets[s + 1]),
                ]
            )
            alone = [x[rows].detach().requires_grad_() for x in inputs]
            at = GroupLayout.from_lengths(prompts[n : n + 1], [[length]])
            got = shared_prefix_attention(*alone, at, return_lse=True, impl="cpu", **options)
            loss = (got[0] * grad_out[rows]).sum() + (got[1] * grad_lse[rows]).sum()
            (got_grad,) = torch.autograd.grad(loss, alone[:1])
            assert same((*got, got_grad), (out[rows], lse[rows], grad_q[rows]))


@needs_cpu
def test_cpu_a_broken_completion_does_not_spread():
    layout = GroupLayout.from_lengths([30], [[9, 5, 12]])
    inputs = draw(layout, 2, 1, 32)
    want = shared_prefix_attention(*inputs, layout, impl="cpu")
    rest = torch.ones(56, dtype=torch.bool)
    rest[39:44] = False
    for x in inputs:
        x[39:44] = float("nan")
    out = shared_prefix_attention(*inputs, layout, impl="cpu")
    assert torch.equal(out[rest], want[rest]) and out[~rest].isnan().all()


@needs_cpu
def test_cpu_writes_every_output(monkeypatch):
    """Buffers full of NaN give what fresh ones give."""
    layout = GroupLayout.from_lengths(*MIXED)
    inputs = draw(layout, 4, 2, 40, torch.bfloat16)
    want = run(inputs, layout, window=50)
    new_empty = torch.Tensor.new_empty

    def poisoned(x, *args, **kwargs):
        x = new_empty(x, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert same(run(inputs, layout, window=50), want)


@needs_cpu
@pytest.mark.parametrize("isa", native.module().cpu_isas() if "cpu" in IMPLS else [])
def test_every_instruction_set(isa):
    run_python(
        "from test_attention import *\n"
        "layout = GroupLayout.from_lengths([17, 333], [[1, 17, 90], [40]])\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for heads, width in ((6, 64), (2, 80)):\n"
        "        inputs = draw(layout, heads, 2, width, dtype)\n"
        "        assert_accurate(inputs, layout)\n"
        "        assert_accurate(inputs, layout, softcap=3.0, window=30)\n"
        "test_cpu_bits_do_not_depend_on_threads(torch.bfloat16)\n"
        "test_cpu_a_completion_does_not_depend_on_its_company(torch.float32, {'window': 40})\n",
        FASTRL_ISA=isa,
    )


# ---- arguments and torch -----------------------------------------------------------------------


@needs_cpu
@every_dtype
def test_cpu_strided_inputs_and_gradients(dtype):
    layout = GroupLayout.from_lengths([20], [[9, 30]])
    q, k, v = draw(layout, 4, 2, 32, dtype)
    want = run((q, k, v), layout)
    fused = torch.cat([q, k, v], dim=1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert same(run(views, layout), want)
    assert same(run([x.transpose(0, 1).contiguous().transpose(0, 1) for x in views], layout), want)
    assert same(run([x.transpose(1, 2).contiguous().transpose(1, 2) for x in views], layout), want)
    leaf = q.clone().requires_grad_()
    shared_prefix_attention(leaf, k, v, layout).sum().backward()  # an expanded gradient
    assert torch.isfinite(leaf.grad).all()
    assert_accurate((q, k, v), layout, want)


@needs_cpu
def test_opcheck():
    layout = GroupLayout.from_lengths([5, 0], [[3, 0], [2]])
    inputs = [x.requires_grad_() for x in draw(layout, 4, 2, 32)]
    arguments = (*inputs, *layout, 0.2, 3.0, 4, "cpu", True)
    torch.library.opcheck(torch.ops.fastrl.shared_prefix_attention.default, arguments)


@every_impl
def test_works_compiled_and_under_autocast(impl):
    layout = GroupLayout.from_lengths([5, 3], [[3, 2], [2]])
    inputs = draw(layout, 4, 2, 32, torch.bfloat16)
    options = {"window": 6, "softcap": 4.0, "return_lse": True, "impl": impl}
    want = shared_prefix_attention(*inputs, layout, **options)
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, layout, **options), want)
    with torch.autocast("cpu", torch.bfloat16):
        # As a model's rotary embedding leaves them: q and k in float32, v in bfloat16.
        mixed = inputs[0].float(), inputs[1].float(), inputs[2]
        assert same(shared_prefix_attention(*mixed, layout, **options), want)
        torch.testing.assert_close(compiled(*mixed, layout, **options), want)


@needs_cpu
def test_compiled_backward():
    layout = GroupLayout.from_lengths([5, 3], [[3, 2], [2]])
    inputs = [x.requires_grad_() for x in draw(layout, 4, 2, 32)]
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad((f(*inputs, layout, impl="cpu") ** 2).sum(), inputs)
        for f in (shared_prefix_attention, compiled)
    ]
    assert same(*gradients)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"impl": "fast"}, "impl='fast' is unknown"),
        ({"impl": "triton"}, "impl='triton' is unavailable"),
        ({"q": torch.zeros(8, 4)}, r"q must be \[T, heads, D\], got shape \(8, 4\)"),
        ({"q": torch.zeros(8, 4, 32, dtype=torch.long)}, "q must be floating point"),
        ({"q": torch.zeros(8, 4, 0), "k": torch.zeros(8, 2, 0), "v": torch.zeros(8, 2, 0)}, "D of"),
        ({"v": torch.zeros(8, 2, 32).half()}, "v is torch.float16 and q torch.float32"),
        ({"k": torch.zeros(8, 2, 32, device="meta")}, "k is on meta and q on cpu"),
        ({"v": torch.zeros(8, 4, 32)}, r"one shape, got \(8, 2, 32\) and \(8, 4, 32\)"),
        ({"q": torch.zeros(8, 4, 40)}, r"k must be \[T=8, Hkv, D=40\]"),
        ({"q": torch.zeros(8, 3, 32)}, "multiple of k's, got 3 and 2"),
        ({"q": torch.zeros(8, 0, 32)}, "multiple of k's, got 0 and 2"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"layout": GroupLayout(*torch.zeros(2, 2).long())}, "offsets must be one-dim.*int64"),
        (
            {"layout": GroupLayout.from_lengths([8], [[]], device="meta")},
            r"layout.offsets is on meta and q on cpu; use layout.to\(q.device\)",
        ),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = {
        "q": torch.zeros(8, 4, 32),
        "k": torch.zeros(8, 2, 32),
        "v": torch.zeros(8, 2, 32),
        "layout": GroupLayout.from_lengths([5], [[2, 1]]),
    } | change
    with pytest.raises(ValueError, match=says):
        shared_prefix_attention(**arguments)


@needs_cpu
def test_float64_is_for_the_reference():
    layout = GroupLayout.from_lengths([5], [[2, 1]])
    inputs = draw(layout, 2, 1, 32, torch.float64)
    assert shared_prefix_attention(*inputs, layout).dtype == torch.float64
    with pytest.raises(ValueError, match=r"q must be float32.*got torch.float64.*reference"):
        shared_prefix_attention(*inputs, layout, impl="cpu")
