"""The plain PyTorch truth for quantized weights and rows: the exact bits of every int8 result."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels.quant.weight import NESTED_BLOCK, QuantizedRows, QuantizedWeight

SMALLEST = 2.0**-126  # scale of a row of zeros: 1 / scale stays finite
LANES = 16
E4M3 = 448.0  # the largest float8_e4m3fn


def row_scale(x: Tensor, largest: float) -> Tensor:
    """max |x| / largest of each row, in float32; NaN where the row holds a NaN or an infinity."""
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # A product with the rounded reciprocal: a division by a constant is one on some backends.
    reciprocal = torch.tensor(1.0 / largest, dtype=torch.float32, device=x.device)
    scale = (absmax * reciprocal).clamp_min(SMALLEST)
    return torch.where(absmax < float("inf"), scale, float("nan"))


def quantize_rows(x: Tensor) -> QuantizedRows:
    x = x.float()
    scale = row_scale(x, 127.0)
    steps = (x * (1.0 / scale).unsqueeze(-1)).round()
    return QuantizedRows(steps.nan_to_num(0.0).to(torch.int8), scale)


def lane_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension in the kernels' order: element k in lane k % 16."""
    x = F.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    total = torch.zeros_like(x[..., 0, :])
    for step in x.unbind(-2):
        total = total + step
    while total.shape[-1] > 1:
        low, high = total.chunk(2, dim=-1)
        total = low + high
    return total.squeeze(-1)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    x = x.float()
    mean = lane_sum(x * x) * (1.0 / x.shape[-1])
    # In float64 and back, which rounds rightly: torch's float32 root is off by one at times.
    inverse = 1.0 / torch.sqrt((mean + eps).double()).float()
    return (x * inverse.unsqueeze(-1)) * (weight.float() + weight_offset)


def rmsnorm_quant(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[QuantizedRows, Tensor]:
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
    return quantize_rows(rmsnorm(x, weight, eps, weight_offset)), x


def glu_quant(gate: Tensor, up: Tensor, activation: str) -> QuantizedRows:
    gate, up = gate.float(), up.float()
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return quantize_rows(active * up)


def pool_score(
    hidden: Tensor,
    last: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    x = rmsnorm(hidden[last], norm_weight, eps, weight_offset)
    score = lane_sum(x.unsqueeze(1) * head.float())
    return score if bias is None else score + bias.float()


def _absmax(w: QuantizedWeight) -> Tensor:
    assert w.absmax is not None
    if w.nested_absmax is None:
        return w.absmax
    each = w.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(w.absmax)]
    return w.nested_code[w.absmax.int()] * each + w.nested_offset


def dequantize(w: QuantizedWeight) -> Tensor:
    """float32 [N, K]; 4-bit values are code * absmax."""
    if w.scheme == "int8":
        return w.data[:, : w.columns].float() * w.scale.unsqueeze(1)
    if w.scheme == "fp8":
        return w.data.float() * w.scale.unsqueeze(1)
    assert w.code is not None
    halves = torch.stack([w.data >> 4, w.data & 15], dim=-1)
    values = w.code[halves.flatten().int()]
    each = _absmax(w).flatten().repeat_interleave(w.block)
    if w.scheme == "nf4":
        count = w.rows * w.columns
        return (values[:count] * each[:count]).view(w.shape)
    return (values * each).view(w.rows, -1)[:, : w.columns].contiguous()


def int8_rows(w: QuantizedWeight) -> Tensor:
    """int8 [N, K], whatever the weight is stored in."""
    if w.scheme == "int8":
        return w.data[:, : w.columns]
    return (dequantize(w) * (1.0 / w.scale).unsqueeze(1)).round().to(torch.int8)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn rows and their scales."""
    x = x.float()
    scale = row_scale(x, E4M3)
    data = (x * (1.0 / scale).unsqueeze(-1)).clamp(-E4M3, E4M3)
    return data.to(torch.float8_e4m3fn), scale


def quantized_linear(
    x: Tensor, scale: Tensor | None, w: QuantizedWeight, bias: Tensor | None
) -> Tensor:
    """float32 [M, N] of rows x [M, K]: int8 with their scales, or floating point without."""
    if w.compute == "bf16":
        out = x.bfloat16().float() @ dequantize(w).bfloat16().float().T
    else:
        if w.compute == "fp8":
            x, scale = fp8_rows(x)
            sums = x.float() @ w.data.float().T
        else:
            x, scale = quantize_rows(x) if scale is None else (x, scale)
            # float64 holds these sums exactly.
            sums = (x.double() @ int8_rows(w).double().T).float()
        out = (sums * scale.unsqueeze(1)) * w.scale
    return out if bias is None else out + bias.float()
