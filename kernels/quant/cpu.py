"""The operators of library.py on a CPU: what csrc/cpu/quant.cpp and dequant.cpp are called with."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels.native import float_kind, module, pointer, threads
from fastrl.kernels.quant.library import rows_like
from fastrl.kernels.quant.reference import LANES, fp8_rows
from fastrl.kernels.quant.weight import QuantizedWeight


def _rows_args(x: Tensor, data: Tensor, scale: Tensor, sums: Tensor | None = None):
    return module().quant_rows_args(
        *(scale.numel(), x.shape[-1], float_kind(x.dtype)),
        *map(pointer, (x, data, scale, sums)),
    )


class Int8Rows(NamedTuple):
    """A weight `[N, K]` as products of few rows read it, q = rint(w / scale)."""

    data: Tensor  # int8 [N, K rounded up to 64], 0 behind K
    scale: Tensor  # float32 [N], max |w| / 127; NaN where a row holds a NaN or an infinity
    sums: Tensor  # int32 [N], of q

    def fill(self, weight: Tensor) -> int:
        """Quantize a weight into these; how many rows hold a NaN or an infinity."""
        weight, columns = weight.contiguous(), weight.shape[1]
        whole = columns == self.data.shape[1]
        data = self.data if whole else torch.empty(weight.shape, dtype=torch.int8)
        args = _rows_args(weight, data, self.scale, self.sums)
        module().quantize_rows_cpu(args, threads())
        if not whole:
            self.data[:, :columns] = data
        return int((~self.scale.isfinite()).sum())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    data, scale = rows_like(x)
    module().quantize_rows_cpu(_rows_args(x, data, scale), threads())
    return data, scale


def rmsnorm_quant(x, weight, residual, eps, weight_offset) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    data, scale = rows_like(x)
    residual = None if residual is None else residual.contiguous()
    new = x.new_empty(0 if residual is None else x.shape)
    weight = weight.float() + weight_offset
    addresses = map(pointer, (residual, new, weight))
    c = module()
    args = c.rmsnorm_quant_args(_rows_args(x, data, scale), *addresses, 1.0 / x.shape[-1], eps)
    c.rmsnorm_quant_cpu(args, threads())
    return data, scale, new


def glu_quant(gate, up, activation) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    data, scale = rows_like(gate)
    c = module()
    rows = _rows_args(gate, data, scale)
    c.glu_quant_cpu(c.glu_quant_args(rows, pointer(up), activation == "gelu_tanh"), threads())
    return data, scale


def pool_score(hidden, last, norm_weight, head, bias, eps, weight_offset) -> Tensor:
    hidden, last = hidden.contiguous(), last.contiguous()
    width = hidden.shape[1]
    weight = norm_weight.float() + weight_offset
    head = F.pad(head.float(), (0, -width % LANES)).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    score = hidden.new_empty((len(last), len(head)), dtype=torch.float32)
    c = module()
    args = c.pool_score_args(
        *(len(last), width, len(head), float_kind(hidden.dtype)),
        *map(pointer, (hidden, last, weight, head, bias)),
        *(1.0 / width, eps, pointer(score)),
    )
    c.pool_score_cpu(args, threads())
    return score


def stored_weight(w: QuantizedWeight):
    """The same as `fastrl._C.quant_weight`, and the tensors it points into."""
    return _stored(*w.arguments[:-1])


def _stored(*arguments):
    *tensors, scheme, rows, columns, block = arguments
    stride = columns
    if scheme in ("int8", "int4"):  # stored rows are longer
        stride = tensors[0].shape[1] * (1 if scheme == "int8" else 2)
    kept = [None if t is None else t.contiguous() for t in tensors]
    data, scale, *four_bit = map(pointer, kept)
    kind = _kind(scheme)
    return module().quant_weight(kind, rows, columns, stride, data, scale, block, *four_bit), kept


@cache
def _kind(scheme):
    kinds = module().QuantScheme
    return kinds.four_bit if scheme in ("nf4", "int4") else getattr(kinds, scheme)


def quantized_linear(x, x_scale, bias, *weight_and_out) -> None:
    data, scale, *stored_as, compute, out = weight_and_out
    x = x.contiguous()
    if compute == "bf16":
        x, scale = x.bfloat16(), torch.ones_like(scale)
    elif compute == "fp8":
        x, x_scale = fp8_rows(x)
    x_scale = None if x_scale is None else x_scale.contiguous()
    floats = float_kind(x.dtype if x_scale is None else out.dtype)
    bias = None if bias is None else bias.float().contiguous()
    weight, _kept = _stored(data, scale, *stored_as)
    c = module()
    args = c.quant_linear_args(
        *(x.numel() // stored_as[-2], pointer(x), floats, pointer(x_scale), weight, pointer(bias)),
        *(float_kind(out.dtype), pointer(out)),
    )
    run = c.quantized_linear_cpu if compute == "int8" else c.dequantized_linear_cpu
    run(args, threads())


def dequantize(dtype, *weight) -> Tensor:
    w = QuantizedWeight(*weight)
    out = w.data.new_empty(w.shape, dtype=dtype)
    stored, _kept = stored_weight(w)
    c = module()
    c.dequantize_cpu(c.dequantize_args(stored, float_kind(dtype), pointer(out)), threads())
    return out
