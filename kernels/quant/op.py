"""Quantized products and what surrounds them: argument checks, choice of implementation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrl.kernels.checks import FLOATS, check_activation, check_alike
from fastrl.kernels.native import choose
from fastrl.kernels.quant import library  # noqa: F401 (it has the operators)
from fastrl.kernels.quant.scaled import fits
from fastrl.kernels.quant.weight import QuantizedRows, QuantizedWeight, check_width

# Implementations besides the reference; see fastrl.kernels.native.choose.
HAS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("quantize_rows", "rmsnorm_quant", "glu_quant", "quantized_linear"), ("cpu", "triton")
    ),
    "dequantize": ("cpu", "triton", "cuda"),
    "pool_score": ("cpu",),
}


def quantize_rows(x: Tensor, *, impl: str = "auto") -> QuantizedRows:
    """Activations in int8, a scale for each row.

    scale = max(max_k |x| * fl(1/127), 2^-126);  data = rint(x * (1 / scale)), ties to even; in
    float32, the same bits in every implementation.

    ``x`` is ``[..., K]`` in float32, bfloat16 or float16, K at most 131071. A row that holds a NaN
    or an infinity gets the scale NaN, so that every product with it is NaN. Raises ValueError
    naming the argument that does not fit.
    """
    _check_rows("quantize_rows", {"x": x})
    return QuantizedRows(
        *torch.ops.fastrl.quantize_rows(
            x.detach(), choose("quantize_rows", impl, x.device, HAS["quantize_rows"])
        )
    )


def rmsnorm_quant(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> tuple[QuantizedRows, Tensor]:
    """Residual addition, RMSNorm and quantization of each row: ``(rows, residual_out)``.

    h = x + residual;  y = h / sqrt(mean_k(h^2) + eps) * (weight_offset + weight);
    rows = quantize_rows(y).

    ``x`` and ``residual`` are ``[..., K]``, ``weight`` ``[K]``; ``weight_offset`` is 1 for Gemma.
    h is rounded to the dtype of ``x``, as a model that adds in that dtype does, and is returned; it
    is ``x`` itself without a ``residual``. y is float32 and not rounded on the way to 8 bits.
    Dtypes, rows with NaN and errors are those of :func:`quantize_rows`. (1910.07467)
    """
    op = "rmsnorm_quant"
    given = {"x": x} if residual is None else {"x": x, "residual": residual}
    _check_rows(op, given)
    _check_vector(op, "weight", weight, x)
    if not eps >= 0:
        raise ValueError(f"{op}: eps={eps} must not be negative")
    data, scale, new = torch.ops.fastrl.rmsnorm_quant(
        x.detach(),
        weight.detach(),
        None if residual is None else residual.detach(),
        eps,
        weight_offset,
        choose(op, impl, x.device, HAS[op]),
    )
    return QuantizedRows(data, scale), x if residual is None else new


def glu_quant(
    gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto"
) -> QuantizedRows:
    """A gated MLP's activation, quantized: quantize_rows(act(gate) * up), in float32.

    ``activation`` is ``"silu"``, g / (1 + e^-g), or ``"gelu_tanh"``, GELU's tanh approximation.
    ``gate`` and ``up`` are ``[..., K]``. Dtypes, rows with NaN (also where the product overflows)
    and errors are those of :func:`quantize_rows`. (2002.05202)
    """
    _check_rows("glu_quant", {"gate": gate, "up": up})
    check_activation("glu_quant", activation)
    chosen = choose("glu_quant", impl, gate.device, HAS["glu_quant"])
    return QuantizedRows(
        *torch.ops.fastrl.glu_quant(gate.detach(), up.detach(), activation, chosen)
    )


def quantized_linear(
    x: Tensor | QuantizedRows,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x times a quantized weight, transposed, plus ``bias``.

    With qweight.compute "int8": y_mn = (float(sum_k q_mk w_nk) * s_m) * s_n + bias_n, the sum exact
    in int32, the rest in float32 in this order: the same bits in every implementation, for any
    batch and number of threads. q and s are :func:`quantize_rows` of ``x``, or ``x`` itself where
    it was quantized before (once for q, k and v, say).
    "bf16": both operands rounded to bf16, products summed in float32. "fp8": x in e4m3 with a scale
    for each row, products summed in float32, on a GPU by ``torch._scaled_mm``.

    ``x`` is ``[..., K]`` in float32, bfloat16 or float16, ``bias`` ``[N]``; the result is
    ``[..., N]`` in ``out_dtype``, by default that of ``x``, or float32 for quantized rows. It is
    written to ``out`` if that is given, contiguous and of this shape and dtype. A row with a
    NaN or an infinity gives NaN. There is no gradient: ValueError for an ``x`` that requires one
    where gradients are recorded, and for arguments that do not fit.
    """
    op = "quantized_linear"
    data, scale = (x.data, x.scale) if isinstance(x, QuantizedRows) else (x, None)
    if not isinstance(qweight, QuantizedWeight):
        raise ValueError(f"{op}: qweight must be what quantize returns, got {type(qweight)}")
    if scale is None:
        _check_rows(op, {"x": data})
        if data.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: x requires a gradient and this op has none; use no_grad")
    elif qweight.compute != "int8":
        raise ValueError(f"{op}: x is int8 rows, but qweight.compute is {qweight.compute!r}")
    elif data.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != data.shape[:-1]:
        raise ValueError(
            f"{op}: x must be int8 rows with a float32 scale each, got {data.dtype} "
            f"{tuple(data.shape)} and {scale.dtype} {tuple(scale.shape)}"
        )
    if data.shape[-1:] != (qweight.columns,):
        raise ValueError(
            f"{op}: x must be [..., K={qweight.columns}] for a weight {qweight.shape}, "
            f"got {tuple(data.shape)}"
        )
    if bias is not None and (bias.shape != (qweight.rows,) or not bias.is_floating_point()):
        raise ValueError(
            f"{op}: bias must be floating point [N={qweight.rows}], "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    for name, tensor in (("qweight", qweight.data), ("bias", bias)):
        if tensor is not None and tensor.device != data.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and x on {data.device}")
    out_dtype = out_dtype or (data.dtype if scale is None else torch.float32)
    if out_dtype not in FLOATS:
        raise ValueError(f"{op}: out_dtype={out_dtype} must be float32, bfloat16 or float16")
    shape = (*data.shape[:-1], qweight.rows)
    if out is None:
        out = data.new_empty(shape, dtype=out_dtype)
    elif out.shape != shape or out.dtype != out_dtype or out.device != data.device:
        raise ValueError(
            f"{op}: out must be {out_dtype} {shape} on {data.device}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    elif not out.is_contiguous() or out.requires_grad:
        raise ValueError(f"{op}: out must be contiguous and not require a gradient")
    scaled = impl == "auto" and scale is None and fits(data, qweight)
    torch.ops.fastrl.quantized_linear(
        data.detach(),
        scale,
        None if bias is None else bias.detach(),
        *qweight.arguments,
        out,
        "scaled" if scaled else choose(op, impl, data.device, HAS[op]),
    )
    return out


def dequantize(
    qweight: QuantizedWeight, dtype: torch.dtype = torch.float32, *, impl: str = "auto"
) -> Tensor:
    """The weight ``[N, K]`` that ``qweight`` stands for: float32 products, rounded to ``dtype``.

    For nf4 the bits of bitsandbytes' ``dequantize_4bit``. Raises ValueError for another ``dtype``
    than float32, bfloat16 or float16.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dequantize: dtype={dtype} must be float32, bfloat16 or float16")
    chosen = choose("dequantize", impl, qweight.device, HAS["dequantize"])
    return torch.ops.fastrl.dequantize(dtype, *qweight.arguments, chosen)


def pool_score(
    hidden: Tensor,
    last: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Scores of sequences from their last tokens: float32 ``[B, heads]``.

    score_bh = sum_k RMSNorm(hidden[last_b])_k head_hk + bias_h, norm and sums in float32, in an
    order that does not depend on the batch.

    ``hidden`` is ``[T, H]``, all tokens before the final norm (reshape ``[B, T, H]``); ``last`` is
    int64 ``[B]``, the row of each sequence's last real token: ``cu_seqlens[1:] - 1`` where they are
    packed. ``norm_weight`` ``[H]`` and ``weight_offset`` as in :func:`rmsnorm_quant`, ``head``
    ``[heads, H]``, ``bias`` ``[heads]``. Raises ValueError for a row that does not exist and for
    shapes and dtypes that do not fit.
    """
    op = "pool_score"
    _check_rows(op, {"hidden": hidden})
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must be [T, H], got {tuple(hidden.shape)}")
    if last.dim() != 1 or last.dtype != torch.int64:
        raise ValueError(f"{op}: last must be int64 [B], got {last.dtype} {tuple(last.shape)}")
    _check_vector(op, "norm_weight", norm_weight, hidden)
    if head.dim() != 2 or head.shape[1] != hidden.shape[1] or not head.is_floating_point():
        raise ValueError(
            f"{op}: head must be floating point [heads, H={hidden.shape[1]}], "
            f"got {head.dtype} {tuple(head.shape)}"
        )
    if bias is not None and (bias.shape != head.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"{op}: bias must be floating point [{len(head)}], got {bias.dtype} {tuple(bias.shape)}"
        )
    given: Mapping[str, Tensor | None] = {"last": last, "head": head, "bias": bias}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and hidden on {hidden.device}")
    if not torch.compiler.is_compiling() and last.numel():
        low, high = int(last.min()), int(last.max())
        if low < 0 or high >= len(hidden):
            raise ValueError(
                f"{op}: last must be rows of hidden, 0 to {len(hidden) - 1}, got {low} to {high}"
            )
    return torch.ops.fastrl.pool_score(
        hidden.detach(),
        last,
        norm_weight.detach(),
        head.detach(),
        None if bias is None else bias.detach(),
        eps,
        weight_offset,
        choose(op, impl, hidden.device, HAS[op]),
    )


def _check_rows(op: str, given: Mapping[str, Tensor]) -> None:
    """ValueError unless all are alike, and their rows not too long for sums of int8."""
    check_alike(op, given)
    name, x = next(iter(given.items()))
    check_width(f"{op}: {name}", x.shape[-1])


def _check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    if vector.shape != x.shape[-1:] or vector.dtype not in FLOATS or vector.device != x.device:
        raise ValueError(
            f"{op}: {name} must be float32, bfloat16 or float16 [{x.shape[-1]}] on {x.device}, "
            f"got {vector.dtype} {tuple(vector.shape)} on {vector.device}"
        )
