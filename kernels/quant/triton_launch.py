"""The operators of library.py in Triton: how the kernels beside this are launched.

What Triton has no part in goes where it is fast already: fp8 to PyTorch's scaled product, and the
weights that are one product from floats to plain PyTorch.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastrl.kernels.quant import plain, scaled
from fastrl.kernels.quant.library import rows_like
from fastrl.kernels.quant.triton_kernels import (
    _dequantize_kernel,
    _glu_quant_kernel,
    _linear_kernel,
    _quantize_rows_kernel,
    _rmsnorm_quant_kernel,
)
from fastrl.kernels.quant.weight import QuantizedWeight


class Tile(NamedTuple):
    """Tokens, weight rows and columns at once, and how a program is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Of int8 products by the most tokens a tile is for, which changes no bit: for few tokens the weight
# is read as fast as it comes. The first two fit the 99 kB that small GPUs have.
FEW = {True: Tile(16, 64, 256, 4, 4), False: Tile(16, 64, 64, 4, 4)}  # stored in int8, or unpacked
SOME = {True: Tile(64, 64, 128, 4, 4), False: Tile(64, 64, 64, 4, 4)}
HOPPER = {True: Tile(128, 256, 128, 8, 3), False: Tile(128, 128, 64, 8, 3)}
AMPERE = {True: Tile(128, 128, 128, 8, 3), False: Tile(128, 128, 64, 8, 3)}
# Products in bf16 have one tile, so that a row has the same bits in any batch.
BF16 = Tile(64, 128, 64, 4, 3)
DEQUANTIZE = Tile(0, 32, 128, 4, 1)
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
ROW_WARPS = 4


def linear_tile(w: QuantizedWeight, tokens: int, hopper: bool) -> Tile:
    if w.compute == "bf16":
        tile = BF16
    else:
        table = FEW if tokens <= 16 else SOME if tokens <= 64 else HOPPER if hopper else AMPERE
        tile = table[w.scheme == "int8"]
    if w.scheme == "int8" or _aligned(w, tile):
        return tile
    # An absmax for each element takes registers, and the room of what would be fetched ahead.
    return tile._replace(n=tile.n // 2, stages=1)


def row_tile(rows: int) -> dict[str, int]:
    """Rows and columns of a quantizer's program; no bit depends on them."""
    return {"R": 8, "COLUMNS": 256} if rows >= 1024 else {"R": 1, "COLUMNS": 2048}


def _aligned(w: QuantizedWeight, tile: Tile) -> bool:
    """Whether the columns of a tile have one absmax in each row."""
    return w.block > 0 and _stride(w) % w.block == 0 and w.block % tile.k == 0


def weight_flags(w: QuantizedWeight, tile: Tile) -> dict[str, int | bool]:
    """How rows are stored."""
    return {"BLOCK": w.block, "PAIRS": _stride(w) % 2 == 0, "ALIGNED": _aligned(w, tile)}


def _stride(w: QuantizedWeight) -> int:
    """Elements from one stored row to the next."""
    if w.scheme == "nf4":
        return w.columns
    return w.data.shape[1] * (1 if w.scheme == "int8" else 2)


def _on(tensor: Tensor):
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _launch_rows(kernel, inputs: tuple, outputs: tuple[Tensor, Tensor], settings=(), **flags):
    """Fills int8 rows and their scales from inputs, of which the first is [..., K]."""
    data, scale = outputs
    if data.numel() == 0:
        return
    rows, tile = scale.numel(), row_tile(scale.numel())
    with _on(data):
        kernel[(triton.cdiv(rows, tile["R"]),)](
            *(*inputs, data, scale, rows, data.shape[-1], *settings),
            **(flags | tile | EXACT),
            num_warps=ROW_WARPS,
        )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    outputs = rows_like(x)
    _launch_rows(_quantize_rows_kernel, (x.contiguous(),), outputs)
    return outputs


def rmsnorm_quant(x, weight, residual, eps, weight_offset) -> tuple[Tensor, Tensor, Tensor]:
    data, scale = rows_like(x)
    residual = None if residual is None else residual.contiguous()
    new = x.new_empty(0 if residual is None else x.shape)
    inputs = (x.contiguous(), residual, weight.contiguous(), None if residual is None else new)
    settings = (1.0 / x.shape[-1], eps, weight_offset)
    _launch_rows(_rmsnorm_quant_kernel, inputs, (data, scale), settings)
    return data, scale, new


def glu_quant(gate, up, activation) -> tuple[Tensor, Tensor]:
    outputs = rows_like(gate)
    inputs = (gate.contiguous(), up.contiguous())
    _launch_rows(_glu_quant_kernel, inputs, outputs, GELU=activation == "gelu_tanh")
    return outputs


def _stored(w: QuantizedWeight) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in w.arguments[:7]]


def quantized_linear(x, x_scale, bias, *weight_and_out) -> None:
    *weight, out = weight_and_out
    w = QuantizedWeight(*weight)
    if w.compute == "fp8":
        return scaled.quantized_linear(x, x_scale, bias, *weight_and_out)
    if out.numel() == 0:
        return
    x = x.reshape(-1, w.columns).contiguous()
    int8 = w.compute == "int8"
    if not int8:
        x = x.bfloat16()
    elif x_scale is None:
        x, x_scale = quantize_rows(x)
    else:
        x_scale = x_scale.contiguous()
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    tile = linear_tile(w, len(x), hopper)
    with _on(x):
        _linear_kernel[(triton.cdiv(len(x), tile.m), triton.cdiv(w.rows, tile.n))](
            *(x, x_scale, *_stored(w), None if bias is None else bias.contiguous(), out),
            *(len(x), w.rows, w.columns, _stride(w)),
            **{**weight_flags(w, tile), "INT8": int8, "WIDE": not int8 and not x.is_cuda},
            **{"BM": tile.m, "BN": tile.n, "BK": tile.k},
            **EXACT,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def dequantize(dtype, *weight) -> Tensor:
    w = QuantizedWeight(*weight)
    if w.scheme in ("int8", "fp8"):
        return plain.dequantize(dtype, *weight)
    out = w.data.new_empty(w.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    data, _, *rest = _stored(w)
    tile = DEQUANTIZE
    with _on(out):
        _dequantize_kernel[(triton.cdiv(w.rows, tile.n), triton.cdiv(w.columns, tile.k))](
            *(data, *rest, out, *w.shape, _stride(w)),
            **{**weight_flags(w, tile), "BN": tile.n, "BK": tile.k},
            **EXACT,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
