"""The GPU code of norms, rotations, gated activations: proofs without a GPU, tests for one."""

import re
from importlib.util import find_spec

import gpu_proof
import pytest
import test_layers
import torch
from families import FAMILIES
from test_layers import DTYPES, draw

from fastrl import selftest
from fastrl.kernels import glu, native, rmsnorm, rope
from fastrl.kernels.checks import ACTIVATIONS

# Columns: odd ones, a whole tile; rows that fill no tile and that fill several. A single column's
# gradient is what cancellation leaves of it.
SIZES = [(1, 2), (3, 7), (5, 16), (130, 33), (9, 2, 64), (3, 1025)]
HEADS = [(1, 1, 2), (3, 2, 6), (70, 3, 32), (9, 4, 80), (5, 1, 256)]
LARGE = [(2049, 896), (333, 4096), (70, 16384)]
LARGE_HEADS = [(1030, 14, 64), (517, 8, 128)]


def check_numbers(dtype, device="cpu", sizes=SIZES, heads=HEADS):
    for size in sizes:
        test_layers.check_rmsnorm(size, dtype, "triton", device)
        for activation in ACTIVATIONS:
            test_layers.check_glu(size, activation, dtype, "triton", device)
    for size in heads:
        test_layers.check_rope(size, dtype, "triton", device)


def check_wide_rows(device="cpu", shapes=((3, 8200), (37, 8200))):
    """Rows that no tile holds."""
    for shape, dtype in zip(shapes, (torch.float32, torch.bfloat16), strict=True):
        test_layers.check_rmsnorm(shape, dtype, "triton", device)
    x = torch.zeros(1, 1, 8194, device=device)
    with pytest.raises(ValueError, match="x must have a head size D of at most"):
        rope(x, x[0, :, ::2], x[0, :, ::2], impl="triton")


def check_narrow_tiles():
    """The same with tiles that are soon too narrow."""
    from fastrl.kernels.layers import triton_launch

    triton_launch.WIDEST = 32
    tile = triton_launch.Tile
    triton_launch.WIDER = {"forward": tile(1, 16, 1), "backward": tile(4, 8, 1)}
    check_wide_rows(shapes=((3, 50), (9, 70)))


def results(x, residual, weight, angles, upstream):
    """Outputs and gradients of all ops; those of weights have one dimension, the others rows."""
    cos, sin = angles.cos(), angles.sin()
    options = {"weight_offset": 0.5, "impl": "triton"}
    calls = [
        (lambda x, r, w: rmsnorm(x, w, residual=r, **options), x, residual, weight),
        (lambda x, w: rmsnorm(x, w, **options)[0], x, weight),
        (lambda x, w: rope(x, cos, sin, norm_weight=w, **options), x, weight),
        (lambda x: rope(x, cos, sin, impl="triton"), x),
        (lambda g, u: glu(g, u, impl="triton"), x, residual),
        (lambda g, u: glu(g, u, activation="gelu_tanh", impl="triton"), x, residual),
    ]
    found = []
    for function, *leaves in calls:
        leaves = [t.detach().requires_grad_() for t in leaves]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, leaves, [upstream] * len(outputs))
        found += [t.detach() for t in (*outputs, *gradients)]
    return found


def rows_of(found):
    return [t for t in found if t.dim() > 1]


def same(got, want):
    return len(got) == len(want) and all(map(torch.equal, got, want))


def check_bits(size=(41, 3, 32), dtype=torch.bfloat16, device="cpu"):
    """A row's are its own in any batch, beside a broken one, and wherever tensors lie."""
    x, residual, upstream = (draw(*size, dtype=dtype, seed=i).to(device) for i in range(3))
    weight = draw(size[-1], dtype=dtype, seed=3).to(device)
    angles = draw(size[0], size[-1] // 2, seed=4).to(device)
    want = results(x, residual, weight, angles, upstream)
    rows = rows_of(want)
    for part in (slice(7, 8), slice(5, 22)):
        of_rows = (t[part] for t in (angles, upstream))
        alone = results(x[part], residual[part], weight, *of_rows)
        assert same(rows_of(alone), [t[part] for t in rows])

    strided = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, residual))
    assert same(results(*strided, weight, angles, upstream), want)
    moved = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(size) for t in (x, residual))
    assert same(results(*moved, weight, angles, upstream), want)

    rest = torch.arange(size[0], device=device) != 9
    broken = x.clone()
    broken[9] = float("nan")
    got = rows_of(results(broken, residual, weight, angles, upstream))
    assert same([t[rest] for t in got], [t[rest] for t in rows])
    assert got[0][9].isnan().all()


def check_rules(device="cpu"):
    """Far-out values, poisoned outputs, emptiness, other dtypes of weights."""
    for activation in ACTIVATIONS:
        test_layers.check_activations_far_out(activation, "triton", device)
    for op in ("rmsnorm", "rope", "glu"):
        found = selftest.check(op, "triton", torch.device(device))
        assert found.verdict == "right", found.wrong
    one = torch.full((3, 1), 4.0, device=device)
    y, _ = rmsnorm(one, torch.full((1,), 2.5, device=device), eps=9.0, impl="triton")
    assert torch.equal(y, torch.full_like(one, 2.0))
    weight = torch.ones(8, device=device, requires_grad=True)
    x = torch.zeros(0, 3, 8, device=device)
    cos = torch.zeros(0, 4, device=device)
    for y in (
        rmsnorm(x, weight, impl="triton")[0],
        rope(x, cos, cos, norm_weight=weight, impl="triton"),
    ):
        assert y.shape == (0, 3, 8)
        assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros_like(weight))
    assert glu(x, x, impl="triton").shape == (0, 3, 8)
    # Rows of zeros have no norm without eps; those that fill up a tile must not be seen.
    x = torch.ones(3, 1, 8, device=device, requires_grad=True)
    cos = torch.ones(3, 4, device=device)
    y = rope(x, cos, 0 * cos, norm_weight=weight, eps=0.0, impl="triton")
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.full_like(weight, 3.0))
    wide = draw(5, 8, dtype=torch.bfloat16).to(device)
    y, _ = rmsnorm(wide, weight, impl="triton")  # a weight in float32
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def check_torch(device="cpu", backend="aot_eager"):
    x, r = (draw(5, 2, 8, seed=i).to(device).requires_grad_() for i in (0, 1))
    weight = draw(8, seed=2).to(device).requires_grad_()
    cos, sin = draw(5, 4).to(device).cos(), draw(5, 4).to(device).sin()
    ops = torch.ops.fastrl
    torch.library.opcheck(ops.rmsnorm, (x, weight, r.detach(), 1e-6, 0.0, "triton"))
    torch.library.opcheck(ops.rope, (x, cos, sin, weight, 1e-6, 0.0, "triton"))
    torch.library.opcheck(ops.glu, (x, r, "silu", "triton"))

    def everything(x, r, weight):
        y, h = rmsnorm(x, weight, residual=r, impl="triton")
        return glu(rope(y, cos, sin, norm_weight=weight, impl="triton"), h, impl="triton")

    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    gradients = [
        torch.autograd.grad((f(x, r, weight) ** 2).sum(), (x, r, weight))
        for f in (everything, compiled)
    ]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def check_interpreted(names):
    """Run in a process with TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    gpu_proof.round_bf16_when_interpreted()
    for name in names.split():
        function, _, dtype = name.partition(":")
        globals()[f"check_{function}"](*([getattr(torch, dtype)] if dtype else []))


def check_few_numbers():
    check_numbers(torch.float16, sizes=SIZES[:3], heads=HEADS[:2])


def check_by_hand():
    test_layers.test_rmsnorm_by_hand("triton")
    test_layers.test_rope_by_hand("triton")
    test_layers.test_glu_by_hand("triton")
    test_layers.test_only_wanted_gradients("triton")


def check_layers():
    """A model's layers, with the attention between them in Triton as well."""
    native.FAST["cpu"] = ("triton",)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    test_layers.check_family("qwen3", torch.float32, **sizes)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    "names",
    [
        "by_hand numbers:float32 rules bits torch",
        "numbers:bfloat16 few_numbers layers narrow_tiles",
    ],
)
def test_triton_interpreted(names):
    code = f"from test_layers_gpu import *; check_interpreted({names!r})"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


# ---- compiled for GPUs that are not here ---------------------------------------------------------

TYPES = {
    **{"rows": "i32", "each": "i32", "count": "i32", "eps": "fp32", "offset": "fp32"},
    **dict.fromkeys(("inverse", "partials", "cos", "sin"), "*fp32"),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cost_of(kernel, capability, dtype, settings, absent=()):
    """What a kernel costs with these settings; pointers that are `absent` are None."""
    constants = settings | {n: None for n in absent if n in kernel.arg_names}
    warps = constants.pop("num_warps")
    arguments = [n for n in kernel.arg_names if n not in constants]
    signature = {n: TYPES.get(n, f"*{NAMES[dtype]}") for n in arguments}
    aligned = tuple(n for n in arguments if signature[n][0] == "*" or n == "count")
    cost = gpu_proof.compile_triton(
        kernel, signature, constants, capability=capability, num_warps=warps, aligned=aligned
    )
    print(kernel.__name__, capability, dtype, constants, warps, cost.registers, cost.shared)
    return cost


def loaded(ptx):
    """Bytes that a thread's instructions load, loops counted once; and what it loads ahead."""
    found = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sum(int(n or 1) * int(bits) // 8 for n, bits in found), len(
        re.findall(r"cp\.async\.c[ag]", ptx)
    )


def check_rows_cost(capability, width, dtype=torch.bfloat16, absent=()):
    from fastrl.kernels.layers import triton_kernels, triton_launch

    for which, kernel in (
        ("forward", triton_kernels._rmsnorm_kernel),
        ("backward", triton_kernels._rmsnorm_bwd_kernel),
    ):
        settings = triton_launch.row_settings(which, width, dtype)
        cost = cost_of(kernel, capability, dtype, settings, absent)
        cost.check(registers=80, shared=99 * 1024)
        if width == 4096 and dtype == torch.bfloat16 and not absent:
            # 16 bytes of each tensor, once: the forward's two and the weight; the backward's three
            # and an inverse norm for this row and the next, which are under way, and the weight.
            assert loaded(cost.ptx) == ((48, 0) if which == "forward" else (16, 8))


def check_heads_cost(capability, width, dtype=torch.bfloat16, absent=()):
    from fastrl.kernels.layers import triton_kernels, triton_launch

    settings = triton_launch.head_settings(14, width)
    for kernel in (triton_kernels._rope_kernel, triton_kernels._rope_bwd_kernel):
        cost = cost_of(kernel, capability, dtype, settings, absent)
        cost.check(registers=80, shared=99 * 1024)
        if width == 64 and dtype == torch.bfloat16 and not absent:
            # 8 elements of x, angles of 4 pairs, two halves of the weight; and of the gradient.
            assert loaded(cost.ptx) == (64 if kernel is triton_kernels._rope_kernel else 80, 0)


def check_elements_cost(capability, dtype=torch.bfloat16):
    from fastrl.kernels.layers import triton_kernels, triton_launch

    settings = {"BLOCK": triton_launch.BLOCK, "num_warps": triton_launch.BLOCK_WARPS}
    for gelu in (False, True):
        for kernel, inputs in (
            (triton_kernels._glu_kernel, 2),
            (triton_kernels._glu_bwd_kernel, 3),
        ):
            cost = cost_of(kernel, capability, dtype, {"GELU": gelu, **settings})
            cost.check(registers=64)
            assert loaded(cost.ptx) == (inputs * 8 * dtype.itemsize, 0)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_without_spills(capability):
    check_rows_cost(capability, 896)
    check_rows_cost(capability, 4096)
    check_heads_cost(capability, 64)
    check_elements_cost(capability)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_compiles_for_every_size(capability, dtype):
    for width in (64, 333, 2560, 8192, 16384):
        check_rows_cost(capability, width, dtype)
        check_rows_cost(capability, width, dtype, ("residual", "grad_h", "partials"))
    for width in (20, 32, 80, 128, 256):
        check_heads_cost(capability, width, dtype)
        check_heads_cost(capability, width, dtype, ("partials",))
        check_heads_cost(capability, width, dtype, ("partials", "weight"))
    check_elements_cost(capability, dtype)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if (reason := native.unavailable("triton", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    return "cuda"


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_against_float64(gpu, dtype):
    check_numbers(dtype, gpu, SIZES + LARGE, HEADS + LARGE_HEADS)


@gpu_proof.needs_gpu
def test_gpu_rules(gpu):
    check_wide_rows(gpu)
    check_rules(gpu)
    check_torch(gpu, backend="inductor")


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_bits(gpu, dtype):
    for size in ((1500, 3, 32), (700, 14, 64), (41, 2, 333 * 2), (65, 1, 4096)):
        check_bits(size, dtype, gpu)


@gpu_proof.needs_gpu
def test_gpu_repeats_bit_for_bit_and_under_a_cuda_graph(gpu):
    x, residual, upstream = (
        draw(3000, 14, 64, dtype=torch.bfloat16, seed=i).cuda() for i in (0, 1, 2)
    )
    weight, angles = draw(64, seed=3).cuda(), draw(3000, 32, seed=4).cuda()
    want = results(x, residual, weight, angles, upstream)
    for _ in range(3):
        assert same(results(x, residual, weight, angles, upstream), want)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = results(x, residual, weight, angles, upstream)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    assert same(got, want)


@gpu_proof.needs_gpu
def test_gpu_more_elements_than_int32_counts(gpu):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of a GPU's memory")
    rows = 2**20 + 3
    x = torch.zeros(rows, 1, 2048, dtype=torch.bfloat16, device=gpu)
    x[-5:] = draw(5, 1, 2048).to(x)
    angles = torch.ones(rows, 1024, device=gpu)
    weight = torch.ones(2048, device=gpu)

    def last(rows):
        at = slice(-rows, None)
        part, cos = x[at], angles[at]
        yield rmsnorm(part, weight, impl="triton")[0][-5:]
        yield rope(part, cos, cos, norm_weight=weight, impl="triton")[-5:]
        yield glu(part, part, impl="triton")[-5:]

    for whole, alone in zip(last(rows), last(5), strict=True):
        assert torch.equal(whole, alone)


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_layers_of_each_family(gpu, family, dtype):
    """Which begins with `runs_through_ops`."""
    test_layers.check_family(family, dtype, gpu)
