"""The GPU code of shared_prefix_attention: proofs without a GPU, tests for where there is one."""

from importlib.util import find_spec

import gpu_proof
import pytest
import torch
from test_attention import MIXED, assert_accurate, draw, run, same

from fastrl.kernels import GroupLayout, native, shared_prefix_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPPED = {"softcap": 3.0, "scale": 0.3, "window": 30}
# An empty prompt, empty completions, one completion, none; more rows than a tile in some.
SMALL = ([17, 70, 0, 3], [[1, 9, 40], [20], [5, 0, 33], []])


def check_accurate(dtype, layout, heads, kv_heads, width, device="cpu", **options):
    inputs = [x.to(device) for x in draw(layout, heads, kv_heads, width, dtype)]
    layout = layout.to(device)
    got = run(inputs, layout, "triton", **options)
    assert_accurate(inputs, layout, got, **options)


def check_extreme_scores(dtype, device="cpu"):
    """Scores in the thousands, one key far above all others, all far below zero."""
    layout = GroupLayout.from_lengths([50], [[30, 20]], device)
    q, k, v = (x.to(device) for x in draw(layout, 2, 1, 64, dtype, size=16.0))
    v = v / 16
    k[7] = 40.0
    for inputs in ((q, k, v), (q.abs(), -k.abs(), v)):
        outputs = run(inputs, layout, "triton")
        assert all(torch.isfinite(x).all() for x in outputs)
        assert_accurate(inputs, layout, outputs, tiny=3e-5)
    inputs = draw(layout, 2, 1, 64, dtype, size=3.0)  # one key has nearly all the weight
    inputs = [x.to(device) for x in inputs]
    assert_accurate(inputs, layout, run(inputs, layout, "triton"))


def check_a_completion_alone(dtype, device="cpu", **options):
    """The same bits alone with its prompt and in any batch."""
    prompts, completions = [9, 37], [[17, 1, 0], [70]]
    if device != "cpu":
        prompts, completions = [9, 370, 5], [[17, 1, 44, 0], [170, 3], [9]]
    layout = GroupLayout.from_lengths(prompts, completions, device)
    inputs = [x.to(device) for x in draw(layout, 6, 2, 32, dtype)]
    out, lse, grad_q, grad_k, grad_v = run(inputs, layout, "triton", **options)
    g = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=g).to(out)
    grad_lse = torch.randn(lse.shape, generator=g).to(lse)
    offsets, groups = layout.offsets.tolist(), layout.groups.tolist()
    for n, group in enumerate(completions):
        for c, length in enumerate(group):
            s = groups[n] + 1 + c
            spans = (groups[n], s)
            rows = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in spans])
            alone = [x[rows].detach().requires_grad_() for x in inputs]
            at = GroupLayout.from_lengths(prompts[n : n + 1], [[length]], device)
            got = shared_prefix_attention(*alone, at, return_lse=True, impl="triton", **options)
            loss = (got[0] * grad_out[rows]).sum() + (got[1] * grad_lse[rows]).sum()
            grads = torch.autograd.grad(loss, alone)
            assert same((*got, grads[0]), (out[rows], lse[rows], grad_q[rows]))
            mine = slice(offsets[s], offsets[s + 1])
            assert same([x[prompts[n] :] for x in grads[1:]], [grad_k[mine], grad_v[mine]])


def check_rules(device="cpu"):
    """Poisoned outputs, a broken completion, strides, emptiness, wrong sizes."""
    layout = GroupLayout.from_lengths(*SMALL, device)
    inputs = [x.to(device) for x in draw(layout, 4, 2, 40, torch.bfloat16)]
    want = run(inputs, layout, "triton", window=20)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(x, *args, **kwargs):
        x = new_empty(x, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    torch.Tensor.new_empty = poisoned
    torch.empty_like = lambda x: empty_like(x).fill_(float("nan"))
    try:
        assert same(run(inputs, layout, "triton", window=20), want)
    finally:
        torch.Tensor.new_empty, torch.empty_like = new_empty, empty_like
    fused = torch.cat(inputs, dim=1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert same(run(views, layout, "triton", window=20), want)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    assert same(run(views, layout, "triton", window=20), want)
    leaf = inputs[0].clone().requires_grad_()
    out = shared_prefix_attention(leaf, *inputs[1:], layout, window=20, impl="triton")
    assert same([out], want[:1])
    out.sum().backward()  # an expanded gradient
    assert torch.isfinite(leaf.grad).all()

    broken = [x.clone() for x in inputs]
    rest = torch.ones(len(fused), dtype=torch.bool, device=device)
    rest[18:27] = False  # the second completion of the first prompt
    for x in broken:
        x[~rest] = float("nan")
    out = shared_prefix_attention(*broken, layout, window=20, impl="triton")
    assert torch.equal(out[rest], want[0][rest]) and out[~rest].isnan().all()

    for lengths in (([], []), ([0], [[0, 0]])):
        layout = GroupLayout.from_lengths(*lengths, device)
        q, k, v = (x.to(device).requires_grad_() for x in draw(layout, 4, 2, 32))
        out = shared_prefix_attention(q, k, v, layout, impl="triton")
        out.sum().backward()
        assert out.shape == q.grad.shape == (0, 4, 32)
    with pytest.raises(ValueError, match="D of at most 256 for impl='triton', got 272"):
        layout = GroupLayout.from_lengths([2], [[]], device)
        shared_prefix_attention(*torch.zeros(3, 2, 1, 272, device=device), layout, impl="triton")


def check_many_segments():
    """More segments than a program looks at at once."""
    import triton.language as tl

    from fastrl.kernels.attention import triton_kernels

    triton_kernels.SEARCH = tl.constexpr(4)
    layout = GroupLayout.from_lengths([3, 1, 2, 0, 5, 4], [[2, 0], [1, 1, 1], [], [4], [1], [0]])
    check_accurate(torch.float16, layout, 2, 1, 16)


def check_torch(device="cpu", backend="aot_eager"):
    layout = GroupLayout.from_lengths([5, 0], [[3, 0], [2]], device)
    inputs = [x.to(device).requires_grad_() for x in draw(layout, 4, 2, 32)]
    arguments = (*inputs, *layout, 0.2, 3.0, 4, "triton", True)
    torch.library.opcheck(torch.ops.fastrl.shared_prefix_attention.default, arguments)
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, backend=backend)
    options = {"window": 6, "softcap": 4.0, "impl": "triton"}
    gradients = [
        torch.autograd.grad((f(*inputs, layout, **options) ** 2).sum(), inputs)
        for f in (shared_prefix_attention, compiled)
    ]
    assert same(*gradients)
    wrong = GroupLayout(layout.offsets[:-1], layout.groups)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"offsets must .*end at the number of tokens, T=10"):
            shared_prefix_attention(*inputs, wrong, impl="triton")


def check_interpreted_numbers():
    """Run in a process with TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    gpu_proof.round_bf16_when_interpreted()
    layout = GroupLayout.from_lengths(*SMALL)
    check_accurate(torch.float32, layout, 2, 1, 20, **CAPPED)
    check_accurate(torch.bfloat16, layout, 3, 3, 80)
    check_accurate(torch.float16, layout, 4, 1, 32, **CAPPED)
    tiny = GroupLayout.from_lengths([5, 33], [[3, 1], [7]])
    check_accurate(torch.float32, tiny, 8, 1, 128)
    check_accurate(torch.bfloat16, tiny, 16, 1, 256, window=4)
    for lengths in (([1], [[1]]), ([0], [[140]]), ([129], [[1] * 3]), ([64], [[64, 128]])):
        check_accurate(torch.bfloat16, GroupLayout.from_lengths(*lengths), 2, 1, 32)


def check_interpreted_rules():
    torch.set_num_threads(1)
    gpu_proof.round_bf16_when_interpreted()
    check_extreme_scores(torch.bfloat16)
    check_a_completion_alone(torch.float16, window=30, softcap=5.0)
    check_rules()
    check_torch()
    check_many_segments()


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("check", ["numbers", "rules"])
def test_triton_interpreted(check):
    code = f"from test_attention_gpu import *; check_interpreted_{check}()"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


FLOATS = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
TYPES = {
    **dict.fromkeys(("offsets", "groups", "positions"), "*i32"),
    **dict.fromkeys(("lse", "grad_lse", "delta"), "*fp32"),
    **{"rest": "*i8", "scale": "fp32", "softcap": "fp32"},
}


def triton_cost(which, capability, dtype, width, **options):
    """What a kernel costs when compiled for this head size, capped and with a window or without."""
    from fastrl.kernels.attention import triton_backward, triton_kernels, triton_launch

    kernel = {
        "forward": triton_kernels._fwd_kernel,
        "queries": triton_backward._bwd_queries_kernel,
        "keys": triton_backward._bwd_keys_kernel,
    }[which]
    tile = triton_launch.tile(which, dtype, width, capability >= 90)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    softcap, window = (options.get(n, False) for n in ("softcap", "window"))
    constants = {
        **{"D": width, "WIDTH": triton_launch.padded(width), "SHARE": options.get("share", 4)},
        **{"M": tile.m, "N": tile.n, "SOFTCAP": softcap, "WINDOW": window, "WIDE": False},
        "EPSILON": 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps,
        **({} if window else {"positions": None}),
    }
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | TYPES | dict.fromkeys(FLOATS, f"*{name}")
    arguments = [n for n in kernel.arg_names if n not in constants]
    cost = gpu_proof.compile_triton(
        kernel,
        {n: types[n] for n in arguments},
        constants,
        capability=capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(n for n in arguments if types[n][0] == "*" or n.endswith("stride")),
    )
    print(which, capability, tile, name, width, options, cost.registers, cost.shared)
    return cost


KERNELS = ("forward", "queries", "keys")


def check_cost(which, capability, dtype, width, **options):
    cost = triton_cost(which, capability, dtype, width, **options)
    # A tile of 64 keys by 256 does not fit the registers, and wgmma takes no fewer.
    wgmma = capability == 90 and dtype != torch.float32 and (which, width) != ("keys", 256)
    # Products in float32 without tensor cores hold their operands in registers, which may not do.
    # Padded heads take masks as well: two registers too many in Hopper's gradient of keys.
    local = 256 if dtype == torch.float32 else 8 if which == "keys" and width == 80 else 0
    cost.check(shared=99 * 1024 if capability == 80 else 227 * 1024, wgmma=wgmma, local=local)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("which", KERNELS)
def test_triton_compiles_without_spills(which, capability):
    check_cost(which, capability, torch.bfloat16, 128)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("which", KERNELS)
def test_triton_compiles_for_every_head_size(which, capability):
    for width in (64, 80, 256):
        check_cost(which, capability, torch.bfloat16, width)
    for width in (64, 128, 256):
        check_cost(which, capability, torch.float16, width, softcap=True, window=True, share=7)
        check_cost(which, capability, torch.float32, width, softcap=True, window=True)


# ---- on a GPU ------------------------------------------------------------------------------------


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(7, 1, 64), (4, 2, 128), (4, 2, 256), (16, 1, 20)])
def test_gpu_against_float64(dtype, heads):
    if (reason := native.unavailable("triton", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    for lengths in (MIXED, SMALL, ([450], [[1, 2, 200, 3]]), ([193], [[1] * 70])):
        for options in ({}, CAPPED, CAPPED | {"window": 150}):
            check_accurate(dtype, GroupLayout.from_lengths(*lengths), *heads, "cuda", **options)


@gpu_proof.needs_gpu
def test_gpu_rules():
    for dtype in DTYPES:
        check_extreme_scores(dtype, "cuda")
        check_a_completion_alone(dtype, "cuda")
    check_a_completion_alone(torch.bfloat16, "cuda", window=30, softcap=5.0)
    check_rules("cuda")
    check_torch("cuda", backend="inductor")


@gpu_proof.needs_gpu
def test_gpu_repeats_bit_for_bit_and_under_a_cuda_graph():
    layout = GroupLayout.from_lengths([700, 90], [[200] * 8, [64, 300, 1]], "cuda")
    inputs = [x.cuda() for x in draw(layout, 14, 2, 64, torch.bfloat16)]
    want = run(inputs, layout, "triton")
    for _ in range(3):
        assert same(run(inputs, layout, "triton"), want)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = shared_prefix_attention(*inputs, layout, impl="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, want[0])
