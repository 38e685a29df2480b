"""Rows in int8 and what makes them: by hand, float64, the bits of the reference."""

import pytest
import torch
import torch.nn.functional as F
from test_quant import IMPLS, every_dtype, every_impl, needs_cpu, same

from fastrl.kernels import (
    glu_quant,
    pool_score,
    quantize,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
)


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
