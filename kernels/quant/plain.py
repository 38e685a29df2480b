"""The operators of library.py on the reference."""

from torch import Tensor

from fastrl.kernels.quant import reference
from fastrl.kernels.quant.weight import QuantizedWeight


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(reference.quantize_rows(x))


def rmsnorm_quant(x, weight, residual, eps, weight_offset) -> tuple[Tensor, Tensor, Tensor]:
    rows, new = reference.rmsnorm_quant(x, weight, residual, eps, weight_offset)
    return *rows, x.new_empty(0) if residual is None else new


def glu_quant(gate, up, activation) -> tuple[Tensor, Tensor]:
    return tuple(reference.glu_quant(gate, up, activation))


def pool_score(*arguments) -> Tensor:
    return reference.pool_score(*arguments)


def quantized_linear(x, x_scale, bias, *weight_and_out) -> None:
    *weight, out = weight_and_out
    w = QuantizedWeight(*weight)
    flat = x.reshape(-1, w.columns)
    scale = None if x_scale is None else x_scale.reshape(-1)
    out.copy_(reference.quantized_linear(flat, scale, w, bias).view_as(out))


def dequantize(dtype, *weight) -> Tensor:
    return reference.dequantize(QuantizedWeight(*weight)).to(dtype)
