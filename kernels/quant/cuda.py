"""dequantize on a GPU: what csrc/cuda/quant.cu is called with."""

import torch
from torch import Tensor

from fastrl.kernels.native import check, float_kind, module, pointer, stream
from fastrl.kernels.quant import plain
from fastrl.kernels.quant.cpu import stored_weight
from fastrl.kernels.quant.weight import QuantizedWeight


def dequantize(dtype, *weight) -> Tensor:
    w = QuantizedWeight(*weight)
    if w.scheme in ("int8", "fp8"):  # one product an element, which PyTorch has
        return plain.dequantize(dtype, *weight)
    out = w.data.new_empty(w.shape, dtype=dtype)
    stored, _kept = stored_weight(w)
    args = module().dequantize_args(stored, float_kind(dtype), pointer(out))
    with torch.cuda.device(out.device):
        check("dequantize", module().dequantize_cuda(args, stream(out.device)))
    return out
