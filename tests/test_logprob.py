"""linear_logprob against hand-computed numbers and float64."""

import math

import pytest
import torch
from lm_head import IMPLS, every_impl, needs_cpu, problem

from fastrl.kernels import linear_logprob


@every_impl
def test_hand_computed(impl):
    # Logits (log 1, log 2, log 5): probabilities 1/8, 2/8, 5/8.
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    out = linear_logprob(hidden, weight, torch.tensor([2]), entropy=True, impl=impl)
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
    options = {"bias": bias, "temperature": 0.5, "softcap": 3.0, "logit_scale": 2.0, "impl": impl}
    out = linear_logprob(hidden, weight, torch.tensor([1]), **options)
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


@every_impl
def test_ignored_rows_are_zero_and_keep_nan_out_of_gradients(impl):
    hidden, weight, target = problem()
    target[3:9] = -100
    hidden[4] = float("nan")
    hidden.requires_grad_()
    weight.requires_grad_()
    temperature = torch.full((17,), 0.7)
    out = linear_logprob(hidden, weight, target, temperature=temperature, entropy=True, impl=impl)
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


@every_impl
def test_extreme_logits(impl):
    weight = torch.tensor([[-150.0], [-120.0], [-200.0]])
    out = linear_logprob(torch.ones(1, 1), weight, torch.tensor([1]), entropy=True, impl=impl)
    assert out.lse.item() == pytest.approx(-120.0) and out.logprob.item() == pytest.approx(
        0.0, abs=1e-6
    )
    # Whole blocks of masked entries, and a temperature that scales them.
    bias = torch.zeros(300)
    bias[100:] = float("-inf")
    options = {"temperature": 0.5, "entropy": True, "impl": impl}
    out = linear_logprob(
        torch.ones(1, 1), torch.zeros(300, 1), torch.tensor([1]), bias=bias, **options
    )
    assert out.logprob.item() == pytest.approx(-math.log(100), abs=1e-5)
    assert out.entropy.item() == pytest.approx(math.log(100), abs=1e-5)


@every_impl
def test_works_compiled_and_under_autocast(impl):
    hidden, weight, target = problem(dtype=torch.bfloat16)
    options = {"entropy": True, "impl": impl}
    plain = linear_logprob(hidden, weight, target, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_logprob(hidden, weight, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(hidden, weight, target, **options)), tuple(plain))


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
        ({"weight": torch.zeros(5, 32, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"temperature": torch.ones(3)}, "temperature must be a number or a tensor of shape"),
        ({"weight": torch.zeros(5, 31)}, "hidden must end in weight's H=31"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, target = problem()
    arguments = {"hidden": hidden, "weight": weight, "target": target} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def truth_and_errors(hidden, weight, target, impl, upstream, **options):
    """Relative errors of logprob, lse, entropy and the three gradients against float64."""
    bias = options.pop("bias", None)

    def run(dtype, impl):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight)]
        inputs += [] if bias is None else [bias.detach().to(dtype or bias.dtype).requires_grad_()]
        out = linear_logprob(
            *inputs[:2],
            target,
            bias=None if bias is None else inputs[2],
            entropy=True,
            impl=impl,
            **options,
        )
        loss = sum((g * x).sum() for g, x in zip(upstream, out, strict=True))
        return [x.detach().double() for x in (*out, *torch.autograd.grad(loss, inputs))]

    truth = run(torch.float64, "reference")
    return [
        [
            ((x - t).norm() / t.norm().clamp(min=1e-30)).item()
            for x, t in zip(got, truth, strict=True)
        ]
        for got in (run(None, impl), run(None, "reference"))
    ]


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [
        (1, 32, 151),
        (17, 33, 151),
        (333, 64, 1009),
        (20, 130, 32003),
        (16, 896, 2003),
        (2100, 10, 77),
        (4200, 10, 77),
    ],
)
def test_cpu_error_is_at_most_twice_the_references(dtype, n, h, v):
    hidden, weight, target = problem(n, h, v, dtype)
    weight = weight * (2 / h**0.5)
    upstream = [torch.randn(n) for _ in range(3)]
    options = {
        "bias": torch.randn(v),
        "temperature": torch.rand(n) + 0.5,
        "softcap": 6.0,
        "logit_scale": 1.5,
    }
    for chosen in ({}, options):
        kernel, reference = truth_and_errors(hidden, weight, target, "cpu", upstream, **chosen)
        for mine, theirs in zip(kernel, reference, strict=True):
            assert mine <= 2 * theirs + 2e-7


@needs_cpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_cpu_gradients_of_each_output_alone(which):
    """Entropy alone too: its gradient was silently zero elsewhere (trl#6625)."""
    hidden, weight, target = problem(9, 32, 151)
    upstream = [torch.zeros(9), torch.zeros(9), torch.zeros(9)]
    upstream[which] = torch.randn(9)
    kernel, _ = truth_and_errors(hidden, weight, target, "cpu", upstream)
    assert max(kernel) < 1e-5


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_bits_depend_on_neither_batch_nor_threads(dtype):
    hidden, weight, target = problem(150, 64, 5003, dtype)
    target[::7] = -100
    upstream = torch.randn(150)

    def run(rows):
        x = hidden[rows].requires_grad_()
        out = linear_logprob(x, weight, target[rows], entropy=True, impl="cpu")
        loss = ((out.logprob + 0.3 * out.entropy) * upstream[rows]).sum()
        return [*out, *torch.autograd.grad(loss, x)]

    whole = run(slice(None))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), whole, strict=True))
    for rows in (slice(0, 1), slice(5, 6), slice(40, 57), slice(100, 150)):
        for part, all_rows in zip(run(rows), whole, strict=True):
            assert torch.equal(part, all_rows[rows])


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_few_rows_have_the_bits_of_many(dtype):
    """Each number of rows has a product of its own; the depth takes several slices and a rest."""
    hidden, weight, target = problem(70, 333, 151, dtype)
    many = linear_logprob(hidden, weight, target, entropy=True, impl="cpu")
    for n in (1, 3, 7, 9, 16, 17, 33, 64):
        few = linear_logprob(hidden[:n], weight, target[:n], entropy=True, impl="cpu")
        assert all(torch.equal(a, b[:n]) for a, b in zip(few, many, strict=True))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warped", [False, True])
def test_cpu_few_rows_have_the_gradients_of_many(dtype, warped):
    """Rows that send nothing back change no bit, however many there are; chunks and a rest."""
    hidden, weight, target = problem(200, 333, 2351, dtype)
    weight, bias = weight / 9, torch.randn(2351)
    target[2:200:9] = -100
    options = {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.5} if warped else {}

    def run(n, count=None, needs=(True, True, True), workspace_mb=60):
        inputs = [hidden[: count or n], weight, bias]
        inputs = [x.clone().requires_grad_(g) for x, g in zip(inputs, needs, strict=True)]
        chosen = options | ({"bias": inputs[2]} if warped else {})
        out = linear_logprob(
            *inputs[:2],
            target[: count or n],
            entropy=True,
            impl="cpu",
            workspace_mb=workspace_mb,
            **chosen,
        )
        upstream = torch.linspace(-1, 1, n + 1)[1:]
        loss = (out.logprob[:n] * upstream).sum()
        if warped:
            loss = loss + (out.entropy[:n] * upstream).sum() + out.lse[:n].sum()
        loss.backward()
        return [
            None if x.grad is None else x.grad[: n if i == 0 else None]
            for i, x in enumerate(inputs)
        ]

    # Of hidden alone: test_logprob_means.py.
    needs = [(False, True, False), *[(False, False, True)] * warped]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # each thread wants chunks of its own
    try:
        for n in (1, 3, 17, 64, 65):
            many = run(n, 200)
            for few in (run(n), run(n, workspace_mb=0), *(run(n, needs=some) for some in needs)):
                for a, b in zip(few, many, strict=True):
                    assert a is None or torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@needs_cpu
def test_cpu_frozen_operands_layouts_and_empty_batches():
    hidden, weight, target = problem(40, 32, 300)
    wide = torch.cat([weight, weight], dim=1)
    sliced, transposed = wide[:, :32], weight.T.contiguous().T
    want = linear_logprob(hidden, weight, target, entropy=True, impl="cpu")
    for w in (sliced, transposed):
        got = linear_logprob(hidden.T.contiguous().T, w, target, entropy=True, impl="cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    batch = linear_logprob(hidden.view(5, 8, 32), weight, target.view(5, 8), impl="cpu")
    assert batch.logprob.shape == (5, 8) and torch.equal(batch.logprob.flatten(), want.logprob)
    for frozen in (0, 1):
        inputs = [hidden.clone(), weight.clone()]
        inputs[1 - frozen].requires_grad_()
        linear_logprob(*inputs, target, impl="cpu").logprob.sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0
    for rows in (hidden[:0], hidden):
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        ignored = torch.full((len(rows),), -100)
        out = linear_logprob(x, w, ignored, entropy=True, impl="cpu")
        (out.logprob.sum() + out.entropy.sum()).backward()
        assert not out.logprob.any() and not x.grad.any() and not w.grad.any()


@needs_cpu
def test_cpu_tied_weights_and_mixed_dtypes():
    _, weight, target = problem(12, 32, 151)
    weight.requires_grad_()
    grads = []
    for impl in IMPLS:
        hidden = torch.nn.functional.embedding(target, weight).tanh()
        linear_logprob(hidden, weight, target.roll(1), impl=impl).logprob.sum().backward()
        grads.append(weight.grad)
        weight.grad = None
    torch.testing.assert_close(*grads)
    hidden = torch.randn(12, 32, dtype=torch.bfloat16)
    for other in (torch.float32, torch.float16):
        a, b = (
            linear_logprob(hidden, weight.detach().to(other), target, impl=i).logprob for i in IMPLS
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_cpu_opcheck_and_bad_values():
    hidden, weight, target = problem(5, 8, 11)
    target[2] = -100
    arguments = (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        target,
        torch.randn(11, requires_grad=True),
        torch.rand(5) + 0.5,
        1.0,
        4.0,
        1.0,
        -100,
        "cpu",
    )
    torch.library.opcheck(torch.ops.fastrl.linear_logprob, (*arguments, 0, "exponentials"))
    # What the workspace holds beyond what was filled is not compared.
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob, (*arguments, 1000, "exponentials"), test_utils=parts
    )
    for bad in (11, -1):
        with pytest.raises(ValueError, match=rf"target must lie in \[0, V=11\).*{bad}"):
            linear_logprob(hidden, weight, torch.full((5,), bad), impl="cpu")
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        warm = torch.ones(5, requires_grad=True)
        linear_logprob(hidden, weight, target, temperature=warm, impl="cpu")
    with pytest.raises(ValueError, match=r"hidden must be float32.*got torch.float64"):
        linear_logprob(hidden.double(), weight.double(), target, impl="cpu")


@needs_cpu
def test_cpu_more_logits_than_int32_counts():
    n, v = 16_500, 131_072
    hidden, weight, target = problem(n, 2, v)
    target[-1] = v - 1
    out = linear_logprob(hidden, weight, target, impl="cpu")
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    want = linear_logprob(hidden[some].double(), weight.double(), target[some])
    torch.testing.assert_close(out.logprob[some].double(), want.logprob, rtol=1e-5, atol=1e-5)
