"""fp8 products on a GPU that has them, by PyTorch's scaled matrix product."""

import torch
from torch import Tensor

from fastrl.kernels.quant import plain
from fastrl.kernels.quant.reference import fp8_rows
from fastrl.kernels.quant.weight import QuantizedWeight


def fits(x: Tensor, w: QuantizedWeight) -> bool:
    """Whether ``torch._scaled_mm`` takes this product: rows of scales, sizes in multiples of 16."""
    return (
        w.compute == "fp8"
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and w.rows % 16 == 0
        and w.columns % 16 == 0
        and x.numel() > 0
    )


def quantized_linear(x, x_scale, bias, *weight_and_out) -> None:
    *weight, out = weight_and_out
    w = QuantizedWeight(*weight)
    if not fits(x, w):
        return plain.quantized_linear(x, x_scale, bias, *weight_and_out)
    rows, scale = fp8_rows(x.reshape(-1, w.columns))
    # Scales for each row are only taken with results in bf16.
    y = torch._scaled_mm(
        *(rows, w.data.t()),
        scale_a=scale.unsqueeze(1),
        scale_b=w.scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
    )
    out.copy_((y if bias is None else y.float() + bias.float()).view_as(out))
