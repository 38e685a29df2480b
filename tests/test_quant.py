"""Products of quantized weights: by hand, float64, bits, bad input."""

import hashlib

import pytest
import torch
from gpu_proof import needs_gpu, run_python

from fastrl.kernels import (
    QuantizedWeight,
    dequantize,
    glu_quant,
    native,
    pool_score,
    quantize,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
)

CPU = torch.device("cpu")
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, CPU) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
needs_cpu = pytest.mark.skipif("cpu" not in IMPLS, reason=f"no cpu kernels: {native.why_missing}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SCHEMES = {
    "int8": {},
    "nf4": {},
    "nf4 nested": {"nested": True},
    "nf4 bf16": {"compute": "bf16", "block": 128},
    "int4": {"group": 32},
    "int4 bf16": {"compute": "bf16"},
    "fp8": {},
}
INT8 = [s for s in SCHEMES if s not in ("nf4 bf16", "int4 bf16", "fp8")]
# Rows, outputs, depth: odd ones, and past every block and panel of the kernels.
SHAPES = [(1, 5, 7), (3, 17, 64), (17, 193, 333), (65, 49, 896), (130, 251, 513), (270, 97, 2050)]


def draw(rows, outputs, depth, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((rows, depth), (outputs, depth), ()))
    return (3 * x).to(dtype), weight.to(dtype), bias + torch.randn(outputs, generator=g)


def make(weight, name) -> QuantizedWeight:
    return quantize(weight, name.split()[0], **SCHEMES[name])


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) and a.dtype == b.dtype
        for a, b in zip(left, right, strict=True)
    )


# ---- products ----------------------------------------------------------------------------------


@every_impl
def test_linear_by_hand(impl):
    # Scales: 1 for the rows of x and of the weight but the last of each, 2 for those.
    x = torch.tensor([[127.0, 1.0, 0.0], [127.0, -127.0, 2.0], [254.0, 2.0, -4.0]])
    weight = quantize(torch.tensor([[127.0, 2.0, 3.0], [-254.0, 0.0, 254.0]]))
    assert weight.data[:, :3].tolist() == [[127, 2, 3], [-127, 0, 127]]
    out = quantized_linear(x, weight, torch.tensor([0.5, -1.0]), impl=impl)
    want = [[16131.5, -32259.0], [15881.5, -31751.0], [32250.5, -65533.0]]
    assert out.tolist() == want
    rows = quantize_rows(x, impl=impl)
    assert torch.equal(quantized_linear(rows, weight, torch.tensor([0.5, -1.0]), impl=impl), out)


@needs_cpu
@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_has_the_bits_of_the_reference(scheme, shape):
    dtype = DTYPES[sum(shape) % 3]
    x, weight, bias = draw(*shape, dtype)
    if shape[0] > 2:
        x[1], x[2, 0] = 0, float("inf")
    qweight = make(weight, scheme)
    assert same(*([dequantize(qweight, dtype, impl=i)] for i in IMPLS))
    for b in (None, bias):
        got, want = (quantized_linear(x, qweight, b, impl=i) for i in IMPLS)
        assert got.dtype == dtype and same([got], [want])
        if shape[0] > 2:
            assert got[2].isnan().all() and not got[:2].isnan().any()
            assert torch.equal(got[1], (torch.zeros_like(bias) if b is None else b).to(dtype))


@needs_cpu
def test_sums_do_not_overflow_at_the_longest_row():
    x = torch.full((2, 131071), 127.0)
    x[1] = -127.0
    qweight = quantize(torch.full((3, 131071), 127.0))
    total = 127.0 * 127 * 131071
    for impl in IMPLS:
        out = quantized_linear(x, qweight, impl=impl)
        assert torch.equal(out, torch.tensor([[total] * 3, [-total] * 3]))
    with pytest.raises(ValueError, match=r"rows of 131072 elements; they must be of 1 to 131071"):
        quantize(torch.zeros(1, 131072), name="layers.0.weight")


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@every_impl
@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        ("int8", 0.012),
        ("nf4", 0.10),
        ("nf4 nested", 0.10),
        ("nf4 bf16", 0.11),
        ("int4", 0.11),
        ("int4 bf16", 0.12),
        ("fp8", 0.045),
    ],
)
def test_accuracy(impl, scheme, limit):
    x, weight, bias = draw(65, 97, 896)
    qweight = make(weight, scheme)
    assert relative(dequantize(qweight, impl=impl), weight.double()) < limit
    want = x.double() @ weight.double().T + bias
    got = quantized_linear(x, qweight, bias, impl=impl)
    assert relative(got, want) < limit
    # What the product itself adds to what was lost in storing the weight.
    stored = x.double() @ dequantize(qweight, impl=impl).double().T + bias
    assert relative(got, stored) < {"int8": 0.02, "bf16": 0.004, "fp8": 0.04}[qweight.compute]


@needs_cpu
@pytest.mark.parametrize("scheme", ["nf4 bf16", "int4 bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_products_in_floats_agree_with_the_reference(scheme, shape):
    x, weight, bias = draw(*shape)
    if shape[0] > 2:
        x[2, 0] = float("nan")
    qweight = make(weight, scheme)
    got, want = (quantized_linear(x, qweight, bias, impl=i) for i in ("cpu", "reference"))
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert same(*([dequantize(qweight, impl=i)] for i in IMPLS))


@needs_cpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch_on_any_number_of_threads(scheme):
    x, weight, bias = draw(150, 197, 333, torch.bfloat16)
    qweight = make(weight, scheme)
    whole = quantized_linear(x, qweight, bias, impl="cpu")
    for row in (0, 63, 149):
        alone = quantized_linear(x[row : row + 1], qweight, bias, impl="cpu")
        assert torch.equal(alone[0], whole[row])
    assert torch.equal(quantized_linear(x[40:75], qweight, bias, impl="cpu"), whole[40:75])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(quantized_linear(x, qweight, bias, impl="cpu"), whole)


def digest() -> str:
    """A hash of every op's bits that all instruction sets share; see below."""
    parts = []
    for shape in SHAPES:
        x, weight, bias = draw(*shape, torch.bfloat16)
        rows, new = rmsnorm_quant(x, weight[0], residual=x.flip(0))
        parts += [*rows, new, pool_score(x, torch.arange(len(x)), weight[0], weight)]
        for activation in ("silu", "gelu_tanh"):
            parts += [*glu_quant(x, x.flip(0), activation=activation)]
        parts += [quantized_linear(rows, make(weight, scheme), bias) for scheme in INT8]
        parts += [dequantize(make(weight, scheme)) for scheme in SCHEMES]
    total = hashlib.sha256()
    for part in parts:
        total.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@needs_cpu
def test_every_instruction_set_gives_the_same_bits():
    here = digest()
    for isa in native.module().cpu_isas():
        if isa != native.module().isa():
            there = run_python("import test_quant; print(test_quant.digest())", FASTRL_ISA=isa)
            assert there.split()[-1] == here, isa


@needs_cpu
@pytest.mark.parametrize("depth", [64, 1100])  # with AMX one slice, and several
def test_large_outputs_in_fresh_and_in_used_memory(depth):
    x, weight, bias = draw(4100, 4096, depth, torch.bfloat16)
    qweight, some = quantize(weight), [0, 1, 2050, 4099]
    want = quantized_linear(x[some], qweight, bias)
    out = quantized_linear(x, qweight, bias)
    assert out.nbytes > 32 << 20 and torch.equal(out[some], want)
    memory = torch.full((out.numel() + 1,), 7.0, dtype=out.dtype)
    quantized_linear(x, qweight, bias, out=memory[1:].view_as(out))
    assert torch.equal(memory[1:].view_as(out), out) and memory[0] == 7


# Rows that lie where they are or are copied, quantized before or on the way, whole blocks and
# not, outputs of whole lines and not, in memory of any alignment.
@needs_cpu
@every_dtype
@pytest.mark.parametrize("rows", [128, 161, 600])
def test_many_rows(rows, dtype):
    for depth, outputs in ((64, 130), (896, 1216), (1000, 64), (2048, 96), (4864, 64)):
        x, weight, bias = draw(rows, outputs, depth, torch.bfloat16)
        x[7, 3] = torch.nan
        int8, quantized = quantize_rows(x), quantize(weight)
        memory = torch.empty(rows * outputs + 1, dtype=dtype)
        for b in (None, bias):
            want = quantized_linear(int8, quantized, b, out_dtype=dtype, impl="reference")
            for at in (memory[:-1], memory[1:]):
                out = at.view(rows, outputs)
                for given in (int8, x):
                    quantized_linear(given, quantized, b, out_dtype=dtype, out=out.fill_(7))
                    assert same([out], [want]) and out[7].isnan().all()


@every_impl
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_and_strides(impl, scheme):
    x, weight, bias = draw(12, 33, 70)
    qweight = make(weight, scheme)
    want = quantized_linear(x, qweight, bias, impl=impl)
    assert torch.equal(quantized_linear(x.T.contiguous().T, qweight, bias, impl=impl), want)
    cube = quantized_linear(x.view(3, 4, 70), qweight, bias, impl=impl)
    assert torch.equal(cube, want.view(3, 4, 33))
    strided = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(quantized_linear(x, qweight, strided, impl=impl), want)
    torch.testing.assert_close(quantized_linear(x[0], qweight, bias, impl=impl), want[0])
    for rows in (0, (2, 0)):
        shape = (rows, 70) if isinstance(rows, int) else (*rows, 70)
        out = quantized_linear(torch.empty(shape), qweight, bias, impl=impl)
        assert out.shape == (*shape[:-1], 33)
    half = quantized_linear(x, qweight, bias, out_dtype=torch.bfloat16, impl=impl)
    assert torch.equal(half, want.bfloat16())
    room = torch.full((3, 4, 33), torch.nan)
    into = quantized_linear(x.view(3, 4, 70), qweight, bias, out=room, impl=impl)
    assert into is room and torch.equal(room.flatten(0, 1), want)
    assert torch.equal(dequantize(make(weight.T.contiguous().T, scheme)), dequantize(qweight))


@needs_gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_gpu(scheme):
    x, weight, bias = (t.cuda() for t in draw(65, 96, 128, torch.bfloat16))
    qweight = make(weight, scheme)
    got = quantized_linear(x, qweight, bias).cpu()
    want = quantized_linear(x.cpu(), qweight.to("cpu"), bias.cpu(), impl="reference")
    if qweight.compute == "int8":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-1)
