"""The GPU code of linear_logprob: proofs that need no GPU, and tests for where there is one."""

import shutil
from importlib.util import find_spec

import gpu_proof
import numpy as np
import pytest
import torch
from logprob_host import Host
from test_logprob import problem, truth_and_errors

from fastrl.kernels import linear_logprob, native
from fastrl.kernels.logprob import gpu, measured
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
    torch.library.opcheck(torch.ops.fastrl.linear_logprob, (*arguments, 0))
    # What the workspace holds beyond what was filled is not compared.
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastrl.linear_logprob, (*arguments, 30000), test_utils=parts)
    chosen = {"entropy": True, "impl": impl}
    plain = linear_logprob(hidden, weight, target, **chosen)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend=backend)
    assert_bits(compiled(hidden, weight, target, **chosen), plain)
    with torch.autocast(device, torch.bfloat16):
        assert_bits(linear_logprob(hidden, weight, target, **chosen), plain)


# ---- Triton --------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


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
            *(-100, "triton", 0),
        )
        nothing = hidden.new_empty(0, dtype=torch.uint8)
        logprob, lse, entropy = triton_launch.forward(p, nothing)
        given = gpu.kept_rows(p)
        given_slopes = Upstream(logprob, lse, entropy, *(x[rows] for x in upstream))
        slopes, _ = gpu._slopes(p, given, given_slopes)
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


def check_interpreted_numbers():
    """Run in a process with TRITON_INTERPRET=1, whose bf16 truncates where a GPU rounds."""
    for dtype in DTYPES:
        for shape in SMALL:
            off = 4.0 if dtype == torch.bfloat16 else None
            check_accurate("triton", *shape, dtype, of_gradients=off)
    check_each_output_alone("triton")
    check_extreme_logits("triton")


def check_interpreted_rules():
    for dtype in DTYPES:
        check_workspace("triton", dtype, 9, 40, 700)
    check_bits_depend_on_no_other_row(torch.bfloat16)
    check_ignored_and_empty("triton")
    check_layouts("triton")
    check_chunks("triton")
    check_opcheck_and_compile("triton")


@needs_triton
@pytest.mark.parametrize("check", ["numbers", "rules"])
def test_triton_interpreted(check):
    code = f"from test_logprob_gpu import *; torch.manual_seed(0); check_interpreted_{check}()"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


INTEGERS = ("rows", "vocab", "width", "weight_stride", "tiles", "kept_tiles", "kept_rows")
INTEGERS += ("kept_stride", "first_tile", "first", "gradient_stride")
MULTIPLES = ("width", "weight_stride", "kept_stride", "gradient_stride")  # of 16, in practice
OPERANDS = ("hidden", "weight", "gradient", "kept_exps")


def triton_cost(name, capability, tile, dtype="bf16", described=False, whole=True, flags=()):
    """What a kernel costs when compiled for these flags ("BIAS", "SOFTCAP", "KEEP", "SUMS")."""
    from fastrl.kernels.logprob import triton_kernels
    from fastrl.kernels.logprob import triton_launch as t

    kernel = getattr(triton_kernels, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    types |= {"target": "*i64", "logit_scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(OPERANDS, f"*{dtype}")
    if described:
        types["hidden"] = f"tensordesc<{dtype}[{tile.m},{tile.k}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.n},{tile.k}]>"
    rows = {"_merge_kernel": t.MERGE[1], "_bwd_kept_kernel": t.KEPT_ROWS}.get(name, tile.m)
    constants = {
        **{"M": rows, "N": tile.n, "K": tile.k, "T": t.MERGE[0], "GROUP": t.GROUP, "KEPT": 1},
        **{"STRIPE": gpu.STRIPE, "DESCRIBED": described, "WHOLE": whole, "WIDE": False},
        **{flag: int(flag in flags) for flag in ("BIAS", "SOFTCAP", "KEEP", "SUMS")},
    }
    absent = {"bias": "BIAS", "sums": "SUMS"}
    if name == "_fwd_kernel":
        absent |= {"kept_exps": "KEEP", "kept_highest": "KEEP"}
    constants |= {n: None for n, flag in absent.items() if flag not in flags}
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    arguments = [n for n in kernel.arg_names if n not in constants]
    multiples = MULTIPLES if whole else ("kept_stride", "gradient_stride")
    cost = gpu_proof.compile_triton(
        kernel,
        {n: types[n] for n in arguments},
        constants,
        capability=capability,
        num_warps=4 if name in ("_merge_kernel", "_bwd_kept_kernel") else tile.warps,
        num_stages=tile.stages,
        aligned=tuple(n for n in arguments if types[n][0] == "*" or n in multiples),
    )
    print(name, capability, tile, dtype, described, whole, flags, cost.registers, cost.shared)
    return cost


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_fwd_kernel", "_bwd_kernel"])
def test_triton_products_compile_without_spills(name, capability):
    from fastrl.kernels.logprob.triton_launch import ENGINE, FLOAT, HALF

    every = ("BIAS", "SOFTCAP", "KEEP", "SUMS")
    hopper = capability == 90
    for flags in ((), every):
        for dtype in ("bf16", "fp16"):
            cost = triton_cost(name, capability, HALF, dtype, flags=flags)
            cost.check(wgmma=hopper, shared=163 * 1024)  # sm_80's limit
    if hopper:
        for flags in ((), ("KEEP",), ("SUMS",), ("SOFTCAP",), every):
            cost = triton_cost(name, capability, ENGINE, described=True, flags=flags)
            # Triton 3.9 spills four registers of what follows the products with every option.
            cost.check(wgmma=True, local=16 if flags == every else 0)
            assert "cp.async.bulk.tensor" in cost.ptx
    triton_cost(name, capability, FLOAT, "fp32").check()
    # Widths that no vector divides: right, not fast, so that spills are only reported.
    print(triton_cost(name, capability, HALF, whole=False).local, "bytes local")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_passes_compile_without_spills(capability):
    from fastrl.kernels.logprob.triton_launch import HALF

    triton_cost("_merge_kernel", capability, HALF).check(registers=128)
    for flags in ((), ("SOFTCAP", "SUMS")):
        triton_cost("_bwd_kept_kernel", capability, HALF, flags=flags).check(registers=128)


@needs_triton
def test_triton_compiles_once_for_all_values():
    """Neither the temperature nor the number of tokens is part of what Triton compiles for."""
    from fastrl.kernels.logprob import triton_kernels as t

    for kernel in (t._fwd_kernel, t._merge_kernel, t._bwd_kernel, t._bwd_kept_kernel):
        changing = {"rows", "vocab", "tiles", "kept_tiles", "kept_rows", "first_tile", "first"}
        special = {p.name for p in kernel.params if not p.do_not_specialize}
        assert not changing & special
        assert not {"temperature", "softcap"} & {p.name for p in kernel.params if p.is_constexpr}


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.skipif(gpu_proof.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_compiles_without_spills(arch, tmp_path):
    costs = gpu_proof.compile_cuda("logprob.cu", arch, tmp_path)
    assert len(costs) == 11  # fold for 3 types; gradient: 3 from logits, 5 from a workspace
    for cost in costs:
        print(cost)
        cost.check(registers=64)


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return gpu_proof.build_on_host("logprob.cpp", tmp_path_factory.mktemp("host"))


# Random logits in tiles, folded; then the gradient of each, from the logits and from the workspace.
FOLD = """
from logprob_host import Host, address as at
host = Host(library)
n, vocab = product.shape
stripes, widths, kind = -(-columns // 64), -(-columns // 4) * 4, getattr(host.Float, dtype)
element, scale = (np.float32, 1) if dtype == "float32" else (np.uint16, 1 + 32767 * (kind == 2))
running = [np.full(n, np.nan, np.float32) for _ in range(4)]
exps = np.full((n, stripes * 64), 7, element)  # of the first tile alone
highest = np.full((stripes, n), np.nan, np.float32)
kept = host.kept_args(at(exps), kind, stripes * 64, at(highest), n, scale)
nothing = host.kept_args(0, kind, 0, 0, 0, 1.0)
def logits(first, with_product=True):
    here = product[:, first:first + columns]
    tile = np.full(n * widths - short, np.nan, np.float32)
    np.lib.stride_tricks.as_strided(tile, here.shape, (4 * widths, 4))[:] = here
    return tile, host.tile_args(
        n, here.shape[1], first, at(tile) if with_product else 0, widths, at(bias),
        at(inv_temperature), at(target), 1.5, 6.0)
for first in range(0, vocab, columns):
    tile, a = logits(first)
    args = host.linear_logprob_fold_args(a, kept if first == 0 else nothing, *map(at, running))
    assert host.linear_logprob_fold_cuda(args, 0) == 0
highest_z, total, weighted, at_target = running
lse = (highest_z + np.log(total)).astype(np.float32)
entropy = (np.log(total) - weighted / total).astype(np.float32)
logprob = (at_target - highest_z - np.log(total)).astype(np.float32)
out = {"logprob": logprob, "lse": lse, "entropy": entropy}
def gradient(first, source, kind, element):
    tile, a = logits(first, source is nothing)
    g = np.full((n, widths), 9, element)
    args = host.linear_logprob_gradient_args(
        *(a, source, at(logprob), at(lse), at(entropy), at(of_p), at(of_spread), at(of_target)),
        *(at(g), kind, widths))
    assert host.linear_logprob_gradient_cuda(args, 0) == 0
    made = min(columns, vocab - first)
    assert not g[:, made:-(-made // 4) * 4].any(), "padding of a vector is written as 0"
    assert (g[:, -(-made // 4) * 4:] == 9).all(), "nothing is written beyond it"
    return g[:, :made]
parts = [gradient(first, nothing, kind, element) for first in range(0, vocab, columns)]
out["gradient"] = np.concatenate(parts, 1)
out["kept"] = gradient(0, kept, kind, element)
out["kept_unrounded"] = gradient(0, kept, 0, np.float32)
"""


def widened(x, dtype):
    if dtype == "float32":
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype)).float()


@needs_gxx
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "vocab", "columns"), [(1, 1, 64), (3, 151, 151), (2, 1009, 448), (2, 9001, 8192)]
)
def test_cuda_runs_on_the_host(library, tmp_path, n, vocab, columns, dtype, backwards, monkeypatch):
    if backwards:
        monkeypatch.setenv("CUDA_HOST_BACKWARDS", "1")
    product = (3 * torch.randn(n, vocab)).requires_grad_()
    bias, inverse = torch.randn(vocab), 1 / (torch.rand(n) + 0.5)
    target, upstream = torch.randint(vocab, (n,)), torch.randn(3, n)
    wide = product.double()
    z = 6 * torch.tanh(1.5 * (wide + bias.double()) / 6) * inverse.double().unsqueeze(1)
    lse = z.logsumexp(1)
    logprob = z.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    entropy = lse - (z.softmax(1) * z).sum(1)
    truth = torch.stack([logprob, lse, entropy])
    (want,) = torch.autograd.grad((truth * upstream).sum(), product)
    chain = inverse * 1.5
    made = gpu_proof.run_on_host(
        library,
        f"library, columns, dtype, short = {str(library)!r}, {columns}, {dtype!r}, 0\n" + FOLD,
        tmp_path,
        product=product.detach().numpy(),
        bias=bias.numpy(),
        inv_temperature=inverse.numpy(),
        target=target.numpy(),
        of_p=((upstream[1] - upstream[0]) * chain).numpy(),
        of_spread=(upstream[2] * chain).numpy(),
        of_target=(upstream[0] * chain).numpy(),
    )
    for name, x in zip(("logprob", "lse", "entropy"), truth.detach(), strict=True):
        torch.testing.assert_close(
            torch.from_numpy(made[name]).double(), x, rtol=1e-5, atol=1e-5, msg=name
        )
    rounding = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    gradient = widened(made["gradient"], dtype)
    tiny = 1e-6  # a vocabulary of one token has no gradient
    assert (gradient - want).norm() < rounding * want.norm() + tiny
    first = want[:, :columns]
    for kept in (widened(made["kept"], dtype), torch.from_numpy(made["kept_unrounded"])):
        assert (kept - first).norm() < 2 * rounding * first.norm() + tiny


@needs_gxx
def test_the_host_build_finds_what_a_gpu_would_hide(library, tmp_path):
    """A tile whose rows end before their last vector: the process dies of an access beyond it."""
    zeros, ones = np.zeros((1, 65), np.float32), np.ones(65, np.float32)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        gpu_proof.run_on_host(
            library,
            f"library, columns, dtype, short = {str(library)!r}, 65, 'float32', 3\n" + FOLD,
            tmp_path,
            product=zeros,
            **{n: ones for n in ("bias", "inv_temperature", "of_p", "of_spread", "of_target")},
            target=np.zeros(1, np.int64),
        )


@pytest.fixture
def cuda_on_the_host(tmp_path_factory, monkeypatch):
    """kernels/logprob/cuda.py on CPU tensors, its kernels run by the host's build."""
    from fastrl.kernels.logprob import cuda

    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("plain")
    host = Host(gpu_proof.build_on_host("logprob.cpp", folder, sanitize=False))
    monkeypatch.setattr(cuda, "module", lambda: host)
    monkeypatch.setattr(cuda, "stream", lambda device: 0)
    monkeypatch.setattr(native, "unavailable", lambda impl, device: None)
    monkeypatch.setattr(cuda, "COLUMNS", 256)
    monkeypatch.setattr(cuda, "TILE_BYTES", 4 * 256 * 16)


def test_the_cuda_path_on_the_host(cuda_on_the_host):
    for dtype in DTYPES:
        check_accurate("cuda", 5, 33, 605, dtype)
        check_workspace("cuda", dtype, 3, 32, 700)
    check_each_output_alone("cuda")
    check_extreme_logits("cuda")
    check_opcheck_and_compile("cuda")


@pytest.mark.slow
def test_the_cuda_path_on_the_host_at_length(cuda_on_the_host):
    for dtype in DTYPES:
        for shape in SMALL:
            check_accurate("cuda", *shape, dtype)
        check_workspace("cuda", dtype)
    check_ignored_and_empty("cuda")
    check_layouts("cuda")
    check_chunks("cuda")


# ---- the choice ----------------------------------------------------------------------------------


def test_the_choice_is_by_measurement(monkeypatch):
    assert measured.order(torch.bfloat16, 4096, 131072)[0] == measured.DEFAULT
    rows = (
        measured.Row("bfloat16", 4096, 131072, "cuda"),
        measured.Row("bfloat16", 1024, 32000, "triton"),
    )
    monkeypatch.setattr(measured, "TABLE", rows)
    for h, v, impl in (
        (4096, 131072, "cuda"),
        (3584, 152064, "cuda"),
        (896, 32003, "triton"),
        (1024, 16000, "triton"),
    ):
        order = measured.order(torch.bfloat16, h, v)
        assert order[0] == impl and set(order) == {"cuda", "triton"}
    assert measured.order(torch.float32, 4096, 131072)[0] == measured.DEFAULT


# ---- on a GPU ------------------------------------------------------------------------------------

every_impl = pytest.mark.parametrize("impl", ["triton", "cuda"])


@pytest.fixture
def gpu_impl(impl):
    if (reason := native.unavailable(impl, torch.device("cuda"))) is not None:
        pytest.skip(reason)
    return impl


@gpu_proof.needs_gpu
@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_against_float64(gpu_impl, dtype):
    for n, h, v in (*SMALL, (333, 896, 2003), (130, 4096, 32003), (2100, 64, 777)):
        check_accurate(gpu_impl, n, h, v, dtype, "cuda")


@gpu_proof.needs_gpu
@every_impl
def test_gpu_rules(gpu_impl):
    for dtype in DTYPES:
        check_workspace(gpu_impl, dtype, 333, 128, 5003, "cuda")
        if gpu_impl == "triton":
            check_bits_depend_on_no_other_row(dtype, "cuda")
    check_each_output_alone(gpu_impl, "cuda")
    check_extreme_logits(gpu_impl, "cuda")
    check_ignored_and_empty(gpu_impl, "cuda")
    check_layouts(gpu_impl, "cuda")
    check_chunks(gpu_impl, "cuda")
    check_opcheck_and_compile(gpu_impl, "cuda", backend="inductor")


@gpu_proof.needs_gpu
@every_impl
def test_gpu_under_cuda_graphs(gpu_impl):
    """The op waits for the device: torch.compile has to leave it out of what it records."""
    hidden, weight, target, *_ = draw(200, 64, 1009, torch.bfloat16, "cuda")
    target[::3] = -100

    def loss(hidden):
        return linear_logprob(hidden * 2, weight, target, impl=gpu_impl).logprob.sum() * 3

    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(3):
        assert compiled(hidden).item() == pytest.approx(loss(hidden).item(), rel=1e-5)


@gpu_proof.needs_gpu
@every_impl
def test_gpu_repeats_bit_for_bit(gpu_impl):
    inputs = draw(700, 896, 32003, torch.bfloat16, "cuda")
    first = run(*inputs[:4], gpu_impl, **inputs[4])
    for _ in range(3):
        assert_bits(run(*inputs[:4], gpu_impl, **inputs[4]), first)


@gpu_proof.needs_gpu
@every_impl
@pytest.mark.parametrize("setting", ["high", "highest"])
def test_gpu_float32_is_never_tf32(gpu_impl, setting):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        hidden, weight, target, upstream, _ = draw(200, 512, 3001, torch.float32, "cuda")
        got = run(hidden, weight, target, upstream, gpu_impl)
        assert torch.get_float32_matmul_precision() == setting
        wide = [x.double() for x in (hidden, weight)]
        truth = run(*wide, target, upstream, "reference")
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(far(a, b) for a, b in zip(got, truth, strict=True)) < 3e-6


@gpu_proof.needs_gpu
@every_impl
def test_gpu_memory_is_bounded(gpu_impl):
    """Beyond the gradients: one chunk of gradients or logits, a float32 grad_hidden, statistics."""
    n, h, v = 8192, 1024, 131072
    hidden, weight, target, upstream, _ = draw(n, h, v, torch.bfloat16, "cuda")
    run(hidden[:8], weight, target[:8], [x[:8] for x in upstream], gpu_impl)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(hidden, weight, target, upstream, gpu_impl)
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (hidden.nbytes + weight.nbytes)  # and copies that autograd may make
    assert extra < gradients + 2 * hidden.nbytes + 400 * 2**20 < n * v  # bytes: half of the logits


@gpu_proof.needs_gpu
@every_impl
def test_gpu_more_logits_than_int32_counts(gpu_impl):
    n, h, v = 16_500, 64, 131_072
    hidden, weight, target, upstream, _ = draw(n, h, v, torch.bfloat16, "cuda")
    target[-1] = v - 1
    got = run(hidden, weight, target, upstream, gpu_impl, workspace_mb=5000)
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    wide, few = [hidden[some].double(), weight.double()], [x[some] for x in upstream]
    want = run(*wide, target[some], few, "reference")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert far(a[some], b) < 1e-5
    assert far(got[3][some], want[3]) < 2**-7
