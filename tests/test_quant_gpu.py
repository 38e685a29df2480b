"""The GPU code of the quantized ops: proofs without a GPU, tests for where there is one."""

import shutil
from dataclasses import replace
from importlib.util import find_spec

import gpu_proof
import numpy as np
import pytest
import torch
from test_quant import DTYPES, INT8, SCHEMES, draw, make, same

from fastrl.kernels import (
    dequantize,
    glu_quant,
    native,
    pool_score,
    quantize,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
)
from fastrl.kernels.quant import plain

WRITTEN = (torch.float32, torch.bfloat16, torch.float16)  # as fastrl::Float counts them
# Odd rows whose 4-bit elements begin in the middle of a byte; whole blocks; short ones.
SHAPES = [(3, 5, 7), (17, 37, 197), (5, 70, 128), (2, 3, 2050)]


def on(device, *tensors):
    return [t.to(device) for t in tensors]


def broken(x):
    """A row of zeros, one with a NaN and one with an infinity."""
    x[0], x[1, 0], x[2, -1] = 0, float("nan"), float("inf")
    return x


def check_rows(device="cpu", shapes=(*SHAPES, (1025, 1, 33))):
    for i, shape in enumerate(shapes):
        x, weight, _ = draw(*shape, DTYPES[i % 3])
        x, weight = on(device, broken(x) if len(x) > 2 else x, weight[0])
        assert same(*(quantize_rows(x, impl=j) for j in ("triton", "reference")))
        for options in ({}, {"residual": x.flip(0), "eps": 1e-3, "weight_offset": 1.0}):
            got, want = (
                (*rows, new)
                for rows, new in (
                    rmsnorm_quant(x, weight, impl=j, **options) for j in ("triton", "reference")
                )
            )
            assert same(got, want)


def check_glu(device="cpu", shape=(5, 1, 333)):
    for activation in ("silu", "gelu_tanh"):
        for dtype in DTYPES:
            gate, up = on(device, *(3 * draw(*shape, dtype, seed)[0] for seed in (0, 1)))
            gate[0, :2] = torch.tensor([-60000.0, 60000.0])
            gate[1, 0] = float("nan")
            got, want = (
                glu_quant(gate, up, activation=activation, impl=i) for i in ("triton", "reference")
            )
            assert torch.equal(got.scale.isnan(), want.scale.isnan())
            torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=0, equal_nan=True)
            assert (got.data.int() - want.data.int()).abs().max() <= 1
    gate, up = torch.full((2, 8), 1e30, device=device), torch.full((2, 8), 1e30, device=device)
    up[1] = 1.0
    scale = glu_quant(gate, up, impl="triton").scale
    assert scale[0].isnan() and scale[1].isfinite()


def check_weights(device="cpu", impl="triton", shapes=SHAPES):
    for scheme in ("nf4", "nf4 nested", "nf4 bf16", "int4"):
        for i, shape in enumerate(shapes):
            qweight = make(draw(*shape)[1], scheme).to(device)
            dtype = DTYPES[i % 3]
            assert same(*([dequantize(qweight, dtype, impl=j)] for j in (impl, "reference")))


def check_int8(device="cpu", shapes=SHAPES):
    for scheme in INT8:
        for i, shape in enumerate(shapes):
            x, weight, bias = draw(*shape, DTYPES[i % 3])
            x = broken(x) if len(x) > 2 else x
            qweight = make(weight, scheme).to(device)
            x, bias = on(device, x, bias)
            bias = (None, bias.bfloat16(), bias)[i % 3]
            got, want = (
                quantized_linear(x, qweight, bias, impl=j) for j in ("triton", "reference")
            )
            assert same([got], [want])
            rows = quantize_rows(x)
            again = quantized_linear(rows, qweight, bias, out_dtype=x.dtype, impl="triton")
            assert same([again], [want])


def check_bf16(device="cpu", shapes=SHAPES):
    for scheme in ("nf4 bf16", "int4 bf16"):
        for shape in shapes:
            x, weight, bias = draw(*shape)
            x, bias = on(device, broken(x) if len(x) > 2 else x, bias)
            qweight = make(weight, scheme).to(device)
            got, want = (
                quantized_linear(x, qweight, bias, impl=i) for i in ("triton", "reference")
            )
            assert torch.equal(got.isfinite(), want.isfinite())
            torch.testing.assert_close(
                got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-3
            )


def check_rules(device="cpu", count=66):
    """A row alone, quantized before or in any batch; strides; emptiness; blocks of any size."""
    x, weight, bias = on(device, *draw(count, 37, 96, torch.bfloat16))
    for scheme in ("int8", "nf4 bf16", "fp8") if device == "cpu" else SCHEMES:
        qweight = make(weight, scheme).to(device)
        whole = quantized_linear(x, qweight, bias, impl="triton")
        if qweight.compute != "fp8":
            for part in (slice(0, 1), slice(count - 30, count - 13)):
                assert torch.equal(
                    quantized_linear(x[part], qweight, bias, impl="triton"), whole[part]
                )
        strided = quantized_linear(x.T.contiguous().T, qweight, bias, impl="triton")
        assert torch.equal(strided, whole)
        out = quantized_linear(x[:0].view(2, 0, 96), qweight, impl="triton")
        assert out.shape == (2, 0, 37)
    assert quantize_rows(x[:0], impl="triton").data.shape == (0, 96)
    qweight = quantize(weight, "nf4", block=32)
    assert same(*([dequantize(qweight, impl=i)] for i in ("triton", "reference")))


def check_long_sums(device="cpu"):
    x = torch.full((2, 131071), 127.0, device=device)
    x[1] = -127.0
    qweight = quantize(torch.full((3, 131071), 127.0, device=device))
    total = 127.0 * 127 * 131071
    out = quantized_linear(x, qweight, impl="triton")
    assert torch.equal(out.cpu(), torch.tensor([[total] * 3, [-total] * 3]))


def check_interpreted(names):
    """Run in a process with TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    gpu_proof.round_bf16_when_interpreted()
    for name in names.split():
        globals()[f"check_{name}"]()


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
slow = pytest.param("long_sums", marks=pytest.mark.slow)


@needs_triton
@pytest.mark.parametrize("names", ["rows glu weights", "int8 bf16", "rules", slow])
def test_triton_interpreted(names):
    code = f"from test_quant_gpu import *; check_interpreted({names!r})"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


TYPES = {
    **dict.fromkeys(("rows", "width", "tokens", "columns", "stride"), "i32"),
    **dict.fromkeys(("reciprocal_width", "eps", "offset"), "fp32"),
    **{"data": "*i8", "scale": "*fp32", "x_scale": "*fp32", "absmax": "*fp32", "code": "*fp32"},
    **dict.fromkeys(("nested_absmax", "nested_code", "nested_offset", "bias"), "*fp32"),
}
NESTED = ("nested_absmax", "nested_code", "nested_offset")


def compile_kernel(kernel, capability, constants, num_warps, num_stages=3, **types):
    arguments = [n for n in kernel.arg_names if n not in constants]
    signature = {n: {**TYPES, **types}.get(n, "*bf16") for n in arguments}
    aligned = [n for n in arguments if signature[n][0] == "*" or signature[n] == "i32"]
    cost = gpu_proof.compile_triton(
        kernel,
        signature,
        constants,
        capability=capability,
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=tuple(n for n in aligned if n not in ("tokens", "rows")),
        fusion=False,
    )
    print(kernel.__name__, capability, constants, cost.registers, cost.local, cost.shared)
    # What would change bits: a product rounded with a sum, an approximate quotient or root, zeros
    # for small numbers.
    for word in ("fma.rn.f32", "div.full", "div.approx", "sqrt.approx", "rcp.approx", ".ftz"):
        assert word not in cost.ptx, f"{kernel.__name__} has {word}"
    return cost


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_quantizers_compile_without_spills(capability):
    from fastrl.kernels.quant import triton_kernels, triton_launch

    for rows in (1, 4096):
        tile = triton_launch.row_tile(rows)
        kernels = {
            triton_kernels._quantize_rows_kernel: {},
            triton_kernels._rmsnorm_quant_kernel: {},
            triton_kernels._glu_quant_kernel: {"GELU": rows == 1},
        }
        for kernel, flags in kernels.items():
            warps = triton_launch.ROW_WARPS
            compile_kernel(kernel, capability, tile | flags, warps).check(registers=128)


def linear_cost(capability, scheme, tokens, depth=896):
    from fastrl.kernels.quant import triton_kernels, triton_launch

    qweight = make(torch.zeros(2, depth), scheme)
    tile = triton_launch.linear_tile(qweight, tokens, capability == 90)
    int8, nested = qweight.compute == "int8", qweight.nested_absmax is not None
    constants = {
        **triton_launch.weight_flags(qweight, tile),
        **{"INT8": int8, "WIDE": False, "BM": tile.m, "BN": tile.n, "BK": tile.k},
        **({} if int8 else {"x_scale": None}),
        **({"tokens": 1} if tokens == 1 else {}),  # as Triton compiles it for a launch
        **({} if nested else dict.fromkeys(NESTED)),
        **(dict.fromkeys(("absmax", "code")) if scheme == "int8" else {}),
    }
    types = {"x": "*i8" if int8 else "*bf16", "data": "*i8" if scheme == "int8" else "*u8"}
    return compile_kernel(
        triton_kernels._linear_kernel,
        capability,
        constants,
        tile.warps,
        tile.stages,
        **types,
        **({"absmax": "*u8"} if nested else {}),
    )


def check_linear_cost(capability, scheme, tokens, depth=896):
    cost = linear_cost(capability, scheme, tokens, depth)
    hopper = capability == 90
    cost.check(
        shared=(227 if hopper else 99) * 1024,
        wgmma=hopper and scheme == "int8" and tokens > 64,
    )
    if hopper and tokens > 64:
        kind = "s32.s8.s8" if cost.ptx.count("s32.s8.s8") else "f32.bf16.bf16"
        assert kind == ("f32.bf16.bf16" if scheme.endswith("bf16") else "s32.s8.s8")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scheme", ["int8", "nf4 nested"])
def test_triton_products_compile_without_spills(capability, scheme):
    check_linear_cost(capability, scheme, 1024)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "fp8"])
def test_triton_products_compile_for_every_size(capability, scheme):
    for tokens in (1, 64, 1024):
        for depth in (333, 896):
            check_linear_cost(capability, scheme, tokens, depth)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.skipif(gpu_proof.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_compiles_without_spills(arch, tmp_path):
    costs = gpu_proof.compile_cuda("quant.cu", arch, tmp_path)
    assert len(costs) == 6  # three types, one or more absmaxes to a thread
    for cost in costs:
        cost.check(registers=64)


HOST = """
P, L, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
names = ("data", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")
given = {n: globals()["w_" + n] for n in names}
at = {n: x.ctypes.data if x.size else None for n, x in given.items()}
class Weight(ctypes.Structure):
    _fields_ = [("scheme", I), ("rows", L), ("columns", L), ("stride", L), ("data", P),
                ("scale", P), ("block", L), ("absmax", P), ("code", P), ("nested_absmax", P),
                ("nested_code", P), ("nested_offset", P)]
class Args(ctypes.Structure):
    _fields_ = [("weight", Weight), ("out_type", I), ("out", P)]
rows, columns, stride, block = map(int, sizes)
for kind, type in enumerate((np.float32, np.uint16, np.float16)):
    made = np.full((rows, columns), 12345, type)
    shape = dict(rows=rows, columns=columns, stride=stride, block=block)
    weight = Weight(scheme=int(scheme), **shape, **at)
    error = lib.dequantize(ctypes.byref(Args(weight, kind, made.ctypes.data)))
    assert error == int(expected), error
    out[str(kind)] = made
"""
FOUR_BIT_SCHEME = 1


def run_on_host(library, folder, w, scheme=FOUR_BIT_SCHEME, expected=0):
    """The .cu's float32, bf16 and fp16 of a weight, from buffers that held something else."""
    stride = w.columns if w.scheme == "nf4" else 2 * w.data.shape[1]
    tensors = {n: getattr(w, n) for n in ("data", "absmax", "code", *NESTED)}
    made = gpu_proof.run_on_host(
        library,
        HOST,
        folder,
        sizes=np.array([*w.shape, stride, w.block]),
        scheme=np.array(scheme),
        expected=np.array(expected),
        **{f"w_{n}": np.zeros(0) if t is None else t.numpy() for n, t in tensors.items()},
    )
    wide, half, short = (torch.from_numpy(made[str(i)]) for i in range(3))
    return wide, half.view(torch.bfloat16), short


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return gpu_proof.build_on_host("quant.cpp", tmp_path_factory.mktemp("host"))


def odd_block(weight):
    """Blocks of 5, which no thread has whole."""
    w = quantize(weight, "nf4")
    g = torch.Generator().manual_seed(0)
    absmax = torch.rand(-(-weight.numel() // 5), generator=g)
    return replace(w, block=5, absmax=absmax)


@pytest.mark.parametrize("scheme", ["nf4", "nf4 nested", "int4"])
def test_cuda_runs_on_the_host(library, tmp_path, scheme):
    for rows, columns in ((1, 1), (37, 333), (9, 2050)):
        w = make(draw(1, rows, columns)[1], scheme)
        cases = [w] if scheme != "nf4" else [w, odd_block(draw(1, rows, columns)[1])]
        for case in cases:
            want = [plain.dequantize(t, *case.arguments) for t in WRITTEN]
            assert same(run_on_host(library, tmp_path, case), want)


def test_cuda_refuses_what_it_has_no_part_in(library, tmp_path):
    w = make(draw(1, 5, 7)[1], "nf4")
    assert (run_on_host(library, tmp_path, w, scheme=0, expected=1)[0] == 12345).all()


def test_the_host_build_finds_what_a_gpu_would_hide(library, tmp_path):
    """Fewer bytes than elements: the process dies of an access beyond the end."""
    w = make(draw(1, 9, 333)[1], "nf4")
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run_on_host(library, tmp_path, replace(w, data=w.data[:-4].clone()))


def test_what_cannot_run_says_so():
    with pytest.raises(ValueError, match="impl='cuda' is unavailable: the tensors are on cpu"):
        dequantize(make(draw(1, 5, 7)[1], "nf4"), impl="cuda")
    with pytest.raises(ValueError, match="impl='triton' is unavailable: pool_score has no such"):
        ones = torch.ones(4, 7)
        pool_score(ones, torch.tensor([1]), ones[0], ones[:1], impl="triton")


# ---- on a GPU ------------------------------------------------------------------------------------

LARGE = [(1, 4864, 896), (65, 193, 2050), (1030, 515, 640)]


def skip_without(impl):
    if (reason := native.unavailable(impl, torch.device("cuda"))) is not None:
        pytest.skip(reason)


@gpu_proof.needs_gpu
@pytest.mark.parametrize("what", ["rows", "weights", "int8", "bf16"])
def test_gpu_against_the_reference(what):
    skip_without("triton")
    globals()[f"check_{what}"]("cuda", shapes=SHAPES + LARGE)


@gpu_proof.needs_gpu
def test_gpu_rules():
    skip_without("triton")
    check_glu("cuda")
    check_glu("cuda", (1030, 1, 1031))
    check_rules("cuda")
    check_rules("cuda", count=1500)
    check_long_sums("cuda")


@gpu_proof.needs_gpu
def test_gpu_cuda_dequantizes():
    skip_without("cuda")
    check_weights("cuda", "cuda", SHAPES + LARGE)


@gpu_proof.needs_gpu
def test_gpu_agrees_with_the_cpu():
    """The same bits on both devices, where the CPU has kernels."""
    skip_without("triton")
    x, weight, bias = draw(300, 515, 897, torch.bfloat16)
    rows, total = rmsnorm_quant(x, weight[0], residual=x.flip(0))
    there, new = rmsnorm_quant(*on("cuda", x, weight[0]), residual=x.flip(0).cuda())
    assert same(on("cpu", *there, new), [*rows, total])
    for scheme in INT8:
        qweight = make(weight, scheme)
        out = quantized_linear(there, qweight.to("cuda"), bias.cuda()).cpu()
        assert torch.equal(out, quantized_linear(rows, qweight, bias))


@gpu_proof.needs_gpu
def test_gpu_compiles_and_records():
    """torch.compile, and a CUDA graph: no launch waits for the host."""
    skip_without("triton")
    x, weight, bias = on("cuda", *draw(64, 130, 256, torch.bfloat16))
    norm = weight[0].contiguous()
    qweights = [make(weight, s) for s in ("int8", "nf4 nested", "int4")]

    def forward(x):
        rows, _ = rmsnorm_quant(x, norm)
        return [quantized_linear(rows, w, bias) for w in qweights] + [
            dequantize(w) for w in qweights
        ]

    want = forward(x)
    assert same(torch.compile(forward, fullgraph=True)(x), want)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = forward(x)
    for tensor in out:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(out, want)


@gpu_proof.needs_gpu
def test_gpu_scores_on_the_reference():
    hidden, head, _ = on("cuda", *draw(40, 3, 333, torch.bfloat16))
    last = torch.tensor([39, 0, 7], device="cuda")
    assert torch.equal(
        pool_score(hidden, last, head[0], head),
        pool_score(hidden, last, head[0], head, impl="reference"),
    )
