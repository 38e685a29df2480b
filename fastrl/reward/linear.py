"""Linear layers of a scoring forward, quantized or not, and what stands between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels import (
    QuantizedRows,
    QuantizedWeight,
    glu,
    glu_quant,
    quantized_linear,
    rmsnorm,
    rmsnorm_quant,
)

BLOCK = 128  # rows of an unquantized product


@dataclass(frozen=True)
class Rows:
    """Rows on their way into linear layers, in the forms that those read: float, int8 or both."""

    plain: Tensor | None
    int8: QuantizedRows | None

    def select(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        int8 = None if self.int8 is None else QuantizedRows(*(x[index] for x in self.int8))
        return Rows(None if self.plain is None else self.plain[index], int8)


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias` of one weight, quantized or float.

    Where smoothing changed the layer, it computes `y / output_scale` from `x / input_scale`, the
    two `[K]` and `[N]`.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None

    @property
    def reads_int8(self) -> bool:
        return isinstance(self.weight, QuantizedWeight) and self.weight.compute == "int8"

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def trace(self) -> bytes:
        """Bytes that tell this weight from another: its scales where it is quantized, else all."""
        of = self.weight.scale if isinstance(self.weight, QuantizedWeight) else self.weight
        return of.contiguous().cpu().view(torch.uint8).numpy().tobytes()

    def __call__(self, rows: Rows, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The product `[M, N]` in `dtype`, in `out` if that is given."""
        if isinstance(self.weight, QuantizedWeight):
            x = rows.int8 if self.reads_int8 and rows.int8 is not None else rows.plain
            return quantized_linear(x, self.weight, self.bias, out_dtype=dtype, out=out)
        assert rows.plain is not None
        return product(rows.plain, self.weight, self.bias, dtype, out)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`F.linear` in the weight's dtype, as `dtype`; its rows do not depend on how many there are.

    A library's product of `[M, K]` sums in an order that depends on M, so on a CPU all products
    here have one M; a row then has the same bits in any batch, with the same number of threads.
    """
    x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    if x.device.type != "cpu":
        y = F.linear(x, weight, bias).to(dtype)
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(len(x), len(weight), dtype=dtype)
    for i in range(0, len(x), BLOCK):
        block = x[i : i + BLOCK]
        rows = len(block)
        if rows < BLOCK:
            block = torch.cat([block, x.new_zeros(BLOCK - rows, x.shape[1])])
        out[i : i + BLOCK] = F.linear(block, weight, bias)[:rows]
    return out


def norm_rows(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, readers: Sequence[Linear]
) -> tuple[Rows, Tensor]:
    """The norm of x + delta for the layers that read it, and x + delta."""
    plain, int8 = None, None
    if any(r.reads_int8 for r in readers):
        int8, x = rmsnorm_quant(x, weight, residual=delta, eps=eps)
        delta = None
    if not all(r.reads_int8 for r in readers):
        plain, x = rmsnorm(x, weight, residual=delta, eps=eps)
    return Rows(plain, int8), x


def glu_rows(gate: Tensor, up: Tensor, activation: str, reader: Linear) -> Rows:
    """`activation(gate) * up` for the layer that reads it."""
    if reader.reads_int8:
        return Rows(None, glu_quant(gate, up, activation=activation))
    return Rows(glu(gate, up, activation=activation), None)
