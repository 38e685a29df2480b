"""What every GPU implementation of linear_logprob has to pass, on a GPU or in place of one."""

import pytest
import torch
from test_logprob import problem, truth_and_errors

from fastrl.kernels import linear_logprob
from fastrl.kernels.logprob import gpu
from fastrl.kernels.logprob.library import Problem, Upstream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = ((1, 32, 151), (17, 33, 151), (33, 64, 1009))  # N, H, V


def draw(n, h, v, dtype, device="cpu"):
    """Operands with logits of size 2, upstream gradients, and every option."""
    hidden, weight, target = (x.to(device) for x in problem(n, h, v, dtype))
    upstream = [torch.randn(n, device=device) for _ in range(3)]
    options = {
        "bias": torch.randn(v, device=device),
        "temperature": torch.rand(n, device=device) + 0.5,
        "softcap": 6.0,
        "logit_scale": 1.5,
    }
    return hidden, weight * (2 / h**0.5), target, upstream, options


def run(hidden, weight, target, upstream, impl, **options):
    """Statistics and gradients of hidden, weight and, where there is one, bias."""
    inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    if "bias" in options:
        inputs.append(options.pop("bias").detach().requires_grad_())
        options["bias"] = inputs[2]
    out = linear_logprob(*inputs[:2], target, entropy=True, impl=impl, **options)
    loss = sum((g * x).sum() for g, x in zip(upstream, out, strict=True))
    return [x.detach() for x in (*out, *torch.autograd.grad(loss, inputs))]


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def assert_bits(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_accurate(impl, n, h, v, dtype, device="cpu", of_gradients=None):
    """Errors at most twice the reference's.

    The gradient of the logits is rounded on its way to the products. Over many tokens that averages
    out; of a few tokens one entry can be most of a gradient, and its rounding most of the error.
    """
    of_gradients = of_gradients or (2.0 if n > 100 or dtype == torch.float32 else 3.0)
    hidden, weight, target, upstream, options = draw(n, h, v, dtype, device)
    for chosen in ({}, options):
        mine, theirs = truth_and_errors(
            hidden, weight, target, impl, upstream, workspace_mb=0.0, **chosen
        )
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            limit = 2.0 if k < 3 or k == 5 else of_gradients  # 5: the bias's are never rounded
            assert a <= limit * b + 2e-7, (impl, n, h, v, dtype, k, a, b)


def check_each_output_alone(impl, device="cpu"):
    hidden, weight, target, *_ = draw(17, 33, 151, torch.float32, device)
    for which in range(3):
        upstream = [torch.zeros(17, device=device) for _ in range(3)]
        upstream[which] = torch.randn(17, device=device)
        kernel, _ = truth_and_errors(hidden, weight, target, impl, upstream, workspace_mb=0.0)
        assert max(kernel) < 1e-5


def check_workspace(impl, dtype, n=33, h=64, v=1009, device="cpu"):
    """All of it, some of it, none of it: statistics the same bits, gradients to rounding."""
    hidden, weight, target, upstream, options = draw(n, h, v, dtype, device)
    weight[target[0]] = hidden[0] * (30 / hidden[0].square().sum())  # p is 1 to rounding here
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    size = n * v * dtype.itemsize / 2**20
    for chosen in ({}, options):
        without = run(hidden, weight, target, upstream, impl, workspace_mb=0, **chosen)
        for megabytes in (2 * size + 1, 0.6 * size):
            given = run(hidden, weight, target, upstream, impl, workspace_mb=megabytes, **chosen)
            again = run(hidden, weight, target, upstream, impl, workspace_mb=megabytes, **chosen)
            assert_bits(again, given)
            assert_bits(given[:3], without[:3])
            for a, b in zip(given[3:], without[3:], strict=True):
                assert not torch.equal(a, b), "the workspace was not used"
                assert far(a, b) < rounding
    # The target's own entry: 1 - p is not lost where p is nearly 1.
    alone = [torch.zeros(n, device=device) for _ in range(3)]
    alone[0][0] = 1
    plain, kept = (
        run(hidden, weight, target, alone, impl, workspace_mb=m)[4] for m in (0, 2 * size + 1)
    )
    assert far(kept[target[0]], plain[target[0]]) < rounding


def check_ignored_and_empty(impl, device="cpu"):
    hidden, weight, target, upstream, options = draw(40, 32, 300, torch.float32, device)
    keep = torch.arange(40, device=device) % 3 != 0
    poisoned, ignored = hidden.clone(), target.clone()
    poisoned[~keep], ignored[~keep] = float("nan"), -100
    got = run(poisoned, weight, ignored, upstream, impl, workspace_mb=1, **options)
    some = {n: x[keep] if n == "temperature" else x for n, x in options.items()}
    few = [x[keep] for x in upstream]
    want = run(hidden[keep], weight, target[keep], few, impl, workspace_mb=1, **some)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert torch.equal(a[keep], b) and not a[~keep].any()
    assert_bits(got[4:], want[4:])
    for rows in (0, 40):
        none = torch.full((rows,), -100, device=device)
        few = [x[:rows] for x in upstream]
        out = run(hidden[:rows], weight, none, few, impl, bias=options["bias"])
        assert not any(x.any() for x in out) and out[3].shape == (rows, 32)
    for bad in (300, -1):
        with pytest.raises(ValueError, match=rf"target must lie in \[0, V=300\).*{bad}"):
            wrong = torch.full((40,), bad, device=device)
            linear_logprob(hidden, weight, wrong, impl=impl)


def check_layouts(impl, device="cpu"):
    hidden, weight, target, upstream, _ = draw(40, 32, 300, torch.float32, device)
    want = run(hidden, weight, target, upstream, impl)
    wide = torch.cat([weight, weight], dim=1)
    for w in (wide[:, :32], weight.T.contiguous().T):
        assert_bits(run(hidden.T.contiguous().T, w, target, upstream, impl)[:3], want[:3])
    batch = linear_logprob(hidden.view(5, 8, 32), weight, target.view(5, 8), impl=impl)
    assert batch.logprob.shape == (5, 8) and torch.equal(batch.logprob.flatten(), want[0])
    for frozen in (0, 1):
        inputs = [hidden.clone(), weight.clone()]
        inputs[1 - frozen].requires_grad_()
        linear_logprob(*inputs, target, impl=impl).logprob.sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.abs().sum() > 0
    for kinds in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        x, w = hidden.to(kinds[0]), weight.to(kinds[1])
        for a, b in zip(
            run(x, w, target, upstream, impl),
            run(x, w, target, upstream, "reference"),
            strict=True,
        ):
            assert a.dtype == b.dtype
            assert far(a, b) < (2**-8 if a.dtype == torch.bfloat16 else 2**-11)


def check_extreme_logits(impl, device="cpu"):
    def of(logits, target, **options):
        weight = torch.tensor(logits, device=device).unsqueeze(1).requires_grad_()
        hidden = torch.ones(1, 1, device=device)
        target = torch.tensor([target], device=device)
        out = linear_logprob(hidden, weight, target, entropy=True, impl=impl, **options)
        (out.logprob + out.entropy).sum().backward()
        assert torch.isfinite(weight.grad).all()
        return [x.item() for x in out]

    assert of([-150.0, -120.0, -200.0], 1) == pytest.approx([0.0, -120.0, 0.0], abs=1e-6)
    assert of([80.0] + [-100.0] * 200, 0) == pytest.approx([0.0, 80.0, 0.0], abs=1e-6)
    never = torch.zeros(200, device=device)
    never[1:] = float("-inf")
    assert of([3.0] * 200, 0, bias=never) == pytest.approx([0.0, 3.0, 0.0], abs=1e-6)
    hidden = torch.full((2, 32), float("nan"), device=device)
    hidden[1] = 1
    target = torch.zeros(2, dtype=torch.int64, device=device)
    out = linear_logprob(hidden, torch.ones(70, 32, device=device), target, impl=impl)
    assert out.logprob[0].isnan() and out.logprob[1].isfinite(), "a NaN was hidden, or spread"


def check_opcheck_and_compile(impl, device="cpu", backend="aot_eager"):
    hidden, weight, target, _, options = draw(5, 8, 11, torch.float32, device)
    target[2] = -100
    arguments = (
        *(hidden.requires_grad_(), weight.requires_grad_(), target),
        *(options["bias"].requires_grad_(), options["temperature"], 1.0, 4.0, 1.0, -100, impl),
    )
    torch.library.opcheck(torch.ops.fastrl.linear_logprob, (*arguments, 0, "exponentials"))
    # What the workspace holds beyond what was filled is not compared.
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob, (*arguments, 30000, "exponentials"), test_utils=parts
    )
    chosen = {"entropy": True, "impl": impl}
    plain = linear_logprob(hidden, weight, target, **chosen)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=backend)
    assert_bits(compiled(hidden, weight, target, **chosen), plain)
    with torch.autocast(device, torch.bfloat16):
        assert_bits(linear_logprob(hidden, weight, target, **chosen), plain)


def check_bits_depend_on_no_other_row(dtype, device="cpu"):
    """Statistics and gradients of logits, also when done in several passes over few tokens.

    In the interpreter rows stay where they are in their tile: numpy's products, unlike a GPU's,
    give a row other bits at another place.
    """
    from fastrl.kernels.logprob import triton_launch

    hidden, weight, target, upstream, options = draw(150, 64, 1009, dtype, device)

    def of(rows):
        temperature = options["temperature"][rows]
        p = Problem(
            *(hidden[rows], weight, target[rows], options["bias"], temperature, 1.0, 6.0, 1.5),
            *(-100, "triton", 0, "exponentials"),
        )
        nothing = hidden.new_empty(0, dtype=torch.uint8)
        logprob, lse, entropy = triton_launch.forward(p, nothing)
        given = gpu.kept_rows(p)
        given_slopes = Upstream(logprob, lse, entropy, *(x[rows] for x in upstream))
        slopes, _ = gpu._slopes(given, given_slopes)
        n = len(given.target)
        gradient = hidden.new_empty(n, 1024, dtype=given.dtype)[:, :1009]
        triton_launch._fill(given, slopes, None, 0, gradient, None)
        return logprob, lse, entropy, gradient

    whole = of(slice(0, 150))
    # fp16's gradients are scaled by their batch's largest, a power of two; the rest are not.
    parts = [slice(0, 1), slice(0, 57), slice(128, 129), slice(128, 150)]
    if device != "cpu":
        parts += [slice(5, 6), slice(40, 57), slice(100, 150)]
    for rows in parts:
        compared = 3 if dtype == torch.float16 else 4
        assert_bits(of(rows)[:compared], [x[rows] for x in whole[:compared]])
    before = triton_launch.PARTIAL_BYTES, triton_launch.GROUP
    try:
        triton_launch.PARTIAL_BYTES, triton_launch.GROUP = 1, 1  # two passes
        assert_bits(of(slice(0, 150)), whole)
    finally:
        triton_launch.PARTIAL_BYTES, triton_launch.GROUP = before


def check_chunks(impl, device="cpu"):
    """Gradients from many chunks of the vocabulary are those from one, to rounding."""
    hidden, weight, target, upstream, options = draw(33, 64, 1009, torch.float32, device)
    whole = run(hidden, weight, target, upstream, impl, workspace_mb=0.05, **options)
    before = gpu.GRADIENT_BYTES
    try:
        gpu.GRADIENT_BYTES = 1
        parts = run(hidden, weight, target, upstream, impl, workspace_mb=0.05, **options)
    finally:
        gpu.GRADIENT_BYTES = before
    for a, b in zip(parts[3:], whole[3:], strict=True):
        assert far(a, b) < 1e-6
