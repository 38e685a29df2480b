"""Quantized products in torch: opcheck, compilation, shapes and settings that do not fit."""

import pytest
import torch
from test_quant import SCHEMES, draw, every_impl, make, needs_cpu, same

from fastrl.kernels import (
    QuantizedRows,
    glu_quant,
    pool_score,
    quantize,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
)
from fastrl.kernels.quant.schemes import NF4


@needs_cpu
def test_opcheck():
    x, weight, bias = draw(5, 17, 70, torch.bfloat16)
    ops = torch.ops.fastrl
    check = torch.library.opcheck
    for scheme in set(SCHEMES) - {"fp8"}:  # opcheck itself cannot compare float8 tensors
        arguments = make(weight, scheme).arguments
        out = torch.empty(5, 17)
        check(ops.quantized_linear.default, (x, None, bias, *arguments, out, "cpu"))
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
        ({"out": torch.zeros(2, 5)}, r"out must be torch.float32 \(2, 4\) on cpu, got .*\(2, 5\)"),
        ({"out": torch.zeros(2, 4).half()}, "out must be torch.float32 .* got torch.float16"),
        ({"out": torch.zeros(4, 2).T}, "out must be contiguous"),
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
