"""Quantized weights and rows: by hand, float64, bits, bitsandbytes' format, bad input."""

import functools
import hashlib

import pytest
import torch
import torch.nn.functional as F
from gpu_proof import needs_gpu, run_python

from fastrl.kernels import (
    QuantizedRows,
    QuantizedWeight,
    dequantize,
    glu_quant,
    native,
    pool_score,
    quantize,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
    weight_from_bitsandbytes,
)
from fastrl.kernels.quant.schemes import NF4

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


# ---- rows --------------------------------------------------------------------------------------


@every_impl
def test_rows_by_hand(impl):
    x = torch.tensor(
        [[127.0, 0.5, -1.5, 2.5], [0, 0, 0, 0], [1, -2, float("nan"), 4], [1, float("inf"), 0, 0]]
    )
    rows = quantize_rows(x, impl=impl)
    assert rows.data.dtype == torch.int8 and rows.scale.dtype == torch.float32
    assert rows.data.tolist() == [[127, 0, -2, 2], [0] * 4, [0] * 4, [0] * 4]  # ties to even
    assert rows.scale[:2].tolist() == [1.0, 2.0**-126] and rows.scale[2:].isnan().all()


@every_impl
@every_dtype
def test_rows_of_any_size(impl, dtype):
    limits = torch.finfo(dtype)
    sizes = [limits.max, limits.max / 300, 1.0, 1e-3, limits.tiny, limits.smallest_normal / 4]
    g = torch.Generator().manual_seed(0)
    unit = torch.rand(len(sizes), 333, generator=g) * 2 - 1
    unit[:, 7] = 1.0
    x = (unit * torch.tensor(sizes).unsqueeze(1)).to(dtype)
    data, scale = quantize_rows(x, impl=impl)
    wide = x.double()
    assert scale.isfinite().all() and (data.int().abs() <= 127).all()
    step = (wide.abs().amax(1) / 127).clamp_min(2.0**-126)
    torch.testing.assert_close(scale.double(), step, rtol=3e-7, atol=0)
    error = (data.double() * scale.double().unsqueeze(1) - wide).abs()
    assert (error <= step.unsqueeze(1) * 0.50002).all()


@needs_cpu
@every_dtype
@pytest.mark.parametrize(("rows", "depth"), [(0, 5), (1, 1), (3, 15), (17, 333), (300, 2050)])
def test_rows_have_the_bits_of_the_reference(dtype, rows, depth):
    g = torch.Generator().manual_seed(rows)
    x, residual = ((3 * torch.randn(rows, depth, generator=g)).to(dtype) for _ in range(2))
    weight = torch.randn(depth, generator=g).to(dtype)
    if rows > 2:
        x[1], x[2, 0] = 0, float("nan")
    for options in ({}, {"residual": residual, "eps": 1e-3, "weight_offset": 1.0}):
        got, want = (
            (*rows, new)
            for rows, new in (rmsnorm_quant(x, weight, impl=i, **options) for i in IMPLS)
        )
        assert same(got, want)
    assert same(*(quantize_rows(x, impl=i) for i in IMPLS))


@every_impl
def test_rmsnorm_quant(impl):
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 3, 96, generator=g).bfloat16() for _ in range(2))
    weight = torch.randn(96, generator=g)
    rows, new = rmsnorm_quant(x, weight, residual=residual, eps=1e-5, impl=impl)
    assert torch.equal(new, x + residual) and rows.data.shape == x.shape
    want = F.rms_norm(new.double(), (96,), weight.double(), 1e-5)
    step = want.abs().amax(-1, keepdim=True) / 127
    assert ((rows.data * rows.scale.unsqueeze(-1) - want).abs() <= 0.5001 * step).all()
    rows, new = rmsnorm_quant(x, weight - 1, eps=1e-5, weight_offset=1.0, impl=impl)
    assert new is x
    want = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    step = want.abs().amax(-1, keepdim=True) / 127
    assert ((rows.data * rows.scale.unsqueeze(-1) - want).abs() <= 0.5001 * step).all()


@every_impl
@every_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_quant(impl, dtype, activation):
    g = torch.Generator().manual_seed(0)
    gate, up = (4 * torch.randn(2, 9, 333, generator=g).to(dtype) for _ in range(2))
    gate[0, 0, :2] = torch.tensor([-60000.0, 60000.0])
    rows = glu_quant(gate, up, activation=activation, impl=impl)
    wide = gate.double()
    active = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    want = active * up.double()
    step = want.abs().amax(-1, keepdim=True) / 127
    assert ((rows.data * rows.scale.unsqueeze(-1) - want).abs() <= 0.501 * step).all()


@every_impl
def test_activations_that_overflow_are_nan_not_zero(impl):
    gate, up = torch.full((2, 8), 1e30), torch.full((2, 8), 1e30)
    up[1] = 1.0
    rows = glu_quant(gate, up, impl=impl)
    assert rows.scale[0].isnan() and rows.scale[1].isfinite()
    out = quantized_linear(rows, quantize(torch.ones(3, 8)), impl=impl)
    assert out[0].isnan().all() and out[1].isfinite().all()


@every_impl
def test_pool_score(impl):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 333, generator=g).bfloat16()
    norm, head, bias = (torch.randn(s, generator=g) for s in ((333,), (3, 333), (3,)))
    last = torch.tensor([39, 0, 7, 7])
    score = pool_score(hidden, last, norm, head, bias=bias, weight_offset=1.0, impl=impl)
    normed = F.rms_norm(hidden[last].double(), (333,), norm.double() + 1, 1e-6)
    assert score.dtype == torch.float32 and score.shape == (4, 3)
    torch.testing.assert_close(
        score.double(), normed @ head.double().T + bias, rtol=1e-5, atol=1e-5
    )
    alone = pool_score(hidden, last[2:3], norm, head, bias=bias, weight_offset=1.0, impl=impl)
    assert torch.equal(alone[0], score[2]) and torch.equal(score[2], score[3])
    if len(IMPLS) == 2:
        assert same(*([pool_score(hidden, last, norm, head, impl=i)] for i in IMPLS))
    for wrong in ([40], [-1]):
        with pytest.raises(ValueError, match="last must be rows of hidden, 0 to 39, got"):
            pool_score(hidden, torch.tensor(wrong), norm, head, impl=impl)
    assert pool_score(hidden, last[:0], norm, head, impl=impl).shape == (0, 3)


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
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(quantized_linear(x, qweight, bias, impl="cpu"), whole)
    finally:
        torch.set_num_threads(threads)


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
    assert torch.equal(dequantize(make(weight.T.contiguous().T, scheme)), dequantize(qweight))


# ---- storing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict(scheme, tmp_path):
    from safetensors.torch import load_file, save_file

    qweight = make(draw(1, 33, 70)[1], scheme)
    save_file(qweight.state_dict("layer."), tmp_path / "w.safetensors")
    loaded = QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "layer.")
    assert loaded.shape == (33, 70) and loaded.compute == qweight.compute
    assert torch.equal(dequantize(loaded), dequantize(qweight))
    assert loaded.to("cpu").nbytes == qweight.nbytes
    state = qweight.state_dict()
    with pytest.raises(ValueError, match="state dict has no 'data'"):
        QuantizedWeight.from_state_dict({n: t for n, t in state.items() if n != "data"})
    with pytest.raises(ValueError, match=r"scale must be torch.float32 \(33,\)"):
        QuantizedWeight.from_state_dict({**state, "scale": state["scale"][:-1]})
    with pytest.raises(ValueError, match="scale holds NaN"):
        QuantizedWeight.from_state_dict({**state, "scale": state["scale"] * float("nan")})


def test_bytes():
    weight = torch.zeros(128, 1024)
    count = weight.numel()
    assert quantize(weight).nbytes == count + 4 * 128
    assert quantize(weight, "fp8").nbytes == count + 4 * 128
    assert quantize(weight, "nf4").nbytes == count // 2 + 4 * count // 64 + 4 * 128 + 64
    nested = count // 2 + count // 64 + 4 * count // 64 // 256 + 4 * 128 + 64 + 1024 + 4
    assert quantize(weight, "nf4", nested=True).nbytes == nested


def blob(rows=64, columns=128, nested=True, dtype=torch.bfloat16):
    """What bitsandbytes saves of a Linear4bit without bias, its state beside it."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = draw(1, rows, columns, dtype)[1]
    data, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    tensors = {"up.weight." + n: t for n, t in state.as_dict(packed=True).items()}
    want = functools.partial(bnb.dequantize_4bit, data, state)
    return weight, {"up.weight": data, **tensors}, state, want


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 192), (17, 70), (5, 7), (300, 1024)], ids=str)
def test_nf4_has_the_bits_of_bitsandbytes(shape, nested):
    for dtype in DTYPES:
        weight, tensors, state, unpack = blob(*shape, nested, dtype)
        qweight = weight_from_bitsandbytes(tensors, "up.weight")
        for out in DTYPES:
            state.dtype = out
            for impl in IMPLS:
                assert torch.equal(dequantize(qweight, out, impl=impl), unpack()), (dtype, out)
        ours = quantize(weight, "nf4", nested=nested)
        assert torch.equal(ours.data, qweight.data)
        if not nested:
            assert torch.equal(ours.absmax, qweight.absmax)
        elif ours.absmax.numel() > 1:  # a tie between two of the 256 values may fall either way
            assert (ours.absmax.int() - qweight.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("up.weight", lambda t: t[:-1], r"data must be torch.uint8 \(4096,\)"),
        ("up.weight", None, "no 'up.weight'"),
        ("up.weight.absmax", lambda t: t[1:], r"absmax must be torch.uint8 \(128,\)"),
        ("up.weight.absmax", None, "no 'up.weight.absmax'"),
        ("up.weight.quant_map", lambda t: t.flip(0), "must be the 16 values of NF4"),
        ("up.weight.quant_map", lambda t: t[:8], "must be the 16 values of NF4"),
        ("up.weight.nested_absmax", lambda t: t * float("nan"), "nested_absmax holds NaN"),
        ("up.weight.nested_quant_map", lambda t: t[:16], r"nested_code must be .*\(256,\)"),
        ("up.weight.quant_state.bitsandbytes__nf4", None, "no .*bitsandbytes__nf4"),
        ("up.weight.quant_state.bitsandbytes__nf4", lambda t: t[1:], "must be JSON"),
    ],
)
def test_wrong_blobs_are_named(name, change, says):
    _, tensors, _, _ = blob()
    tensors = {n: t for n, t in tensors.items() if n != name} | (
        {} if change is None else {name: change(tensors[name])}
    )
    with pytest.raises(ValueError, match=says):
        weight_from_bitsandbytes(tensors, "up.weight")


def test_fp4_blob_is_refused():
    tensors = {"w": torch.zeros(8, 1).byte(), "w.quant_state.bitsandbytes__fp4": torch.zeros(1)}
    with pytest.raises(ValueError, match="it is fp4, and only nf4 is read"):
        weight_from_bitsandbytes(tensors, "w")


@every_impl
def test_llm_int8_blob(impl):
    data = torch.tensor([[127, -3, 0], [5, -127, 1]], dtype=torch.int8)
    tensors = {"a.weight": data, "a.SCB": torch.tensor([1.27, 254.0])}
    qweight = weight_from_bitsandbytes(tensors, "a.weight")
    want = torch.tensor([[1.27, -0.03, 0.0], [10.0, -254.0, 2.0]])
    torch.testing.assert_close(dequantize(qweight, impl=impl), want)
    for scb in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"a.SCB must be \[2\]"):
            weight_from_bitsandbytes({**tensors, "a.SCB": scb}, "a.weight")


# ---- torch and bad input -----------------------------------------------------------------------


@needs_cpu
def test_opcheck():
    x, weight, bias = draw(5, 17, 70, torch.bfloat16)
    ops = torch.ops.fastrl
    check = torch.library.opcheck
    for scheme in set(SCHEMES) - {"fp8"}:  # opcheck itself cannot compare float8 tensors
        arguments = make(weight, scheme).arguments
        check(ops.quantized_linear.default, (x, None, bias, torch.float32, *arguments, "cpu"))
        check(ops.dequantize.default, (torch.bfloat16, *arguments, "cpu"))
    check(ops.quantize_rows.default, (x, "cpu"))
    for residual in (None, x):
        check(ops.rmsnorm_quant.default, (x, weight[0], residual, 1e-6, 0.0, "cpu"))
    check(ops.glu_quant.default, (x, x, "silu", "cpu"))
    last = torch.tensor([4, 0])
    check(ops.pool_score.default, (x, last, weight[0], weight, None, 1e-6, 0.0, "cpu"))


@every_impl
@pytest.mark.parametrize("scheme", ["int8", "nf4 nested", "fp8"])
def test_works_compiled(impl, scheme):
    x, weight, bias = draw(5, 17, 70, torch.bfloat16)
    qweight = make(weight, scheme)

    def block(x, weight):
        rows, new = rmsnorm_quant(x, weight, residual=x, impl=impl)
        y = quantized_linear(rows if scheme != "fp8" else new, qweight, bias, impl=impl)
        rows = glu_quant(y, y, impl=impl)
        return rows.scale, pool_score(y, torch.tensor([1]), bias, bias.unsqueeze(0), impl=impl)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert same(compiled(x, weight[0]), block(x, weight[0]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheme": "int3"}, "scheme='int3' is unknown; use one of int8, nf4, int4, fp8"),
        ({"compute": "bf16"}, "compute='bf16' is not for scheme int8; use int8"),
        ({"group": 32}, "group=32 is for scheme int4, not int8"),
        ({"scheme": "int4", "group": 48}, r"group=48 must be one of \(32, 64, 128\)"),
        ({"scheme": "nf4", "block": 100}, "block=100 must be one of"),
        ({"nested": True}, "nested=True is for scheme nf4"),
        ({"weight": torch.zeros(3)}, r"mlp.w must be \[N, K\] in float32"),
        ({"weight": torch.zeros(3, 4).int()}, r"mlp.w must be \[N, K\] in float32.*torch.int32"),
        ({"weight": torch.zeros(3, 0)}, "mlp.w has rows of 0 elements"),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, "mlp.w holds 1 NaN or infinite"),
        ({"weight": torch.tensor([[-float("inf")] * 2])}, "mlp.w holds 2 NaN or infinite"),
    ],
)
def test_wrong_weights_are_named(change, says):
    arguments = {"weight": torch.zeros(4, 6), "name": "mlp.w"} | change
    with pytest.raises(ValueError, match=says):
        quantize(**arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 7)}, r"x must be \[..., K=6\] for a weight \(4, 6\), got \(2, 7\)"),
        ({"x": torch.zeros(2, 6).long()}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.tensor(1.0)}, "x must be .*got a scalar"),
        ({"x": torch.zeros(2, 6, requires_grad=True)}, "x requires a gradient"),
        ({"x": QuantizedRows(torch.zeros(2, 6).char(), torch.zeros(3))}, "a float32 scale each"),
        ({"bias": torch.zeros(3)}, r"bias must be floating point \[N=4\]"),
        ({"qweight": torch.zeros(4, 6)}, "qweight must be what quantize returns"),
        ({"out_dtype": torch.int32}, "out_dtype=torch.int32"),
        ({"impl": "fast"}, "impl='fast' is unknown"),
        ({"impl": "triton"}, "impl='triton' is unavailable"),
    ],
)
def test_wrong_arguments_are_named(change, says):
    arguments = {"x": torch.zeros(2, 6), "qweight": quantize(torch.ones(4, 6)), "bias": None}
    with pytest.raises(ValueError, match=says):
        quantized_linear(**arguments | change)


def test_quantized_rows_need_an_integer_product():
    rows = quantize_rows(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"x is int8 rows, but .* is 'fp8'"):
        quantized_linear(rows, quantize(torch.ones(4, 6), "fp8"))


def test_code_is_the_published_one():
    assert len(NF4) == 16 and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1
    assert list(NF4) == sorted(NF4)


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
