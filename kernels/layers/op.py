"""What a decoder layer computes between its products: argument checks, choice of implementation."""

import torch
from torch import Tensor

from fastrl.kernels.checks import FLOATS, check_activation, check_alike
from fastrl.kernels.layers import library, reference  # noqa: F401 (library has the operators)
from fastrl.kernels.native import choose

HAS = ("cpu", "triton")


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm of each row: ``(y, h)``, with gradients.

    h = x + residual;  y = h / sqrt(mean_k(h^2) + eps) * (weight_offset + weight).

    ``x`` and ``residual`` are ``[..., K]`` in float32, bfloat16 or float16 (float64 where
    ``impl="reference"``), ``weight`` ``[K]``; ``weight_offset`` is 1 for Gemma. h is rounded to the
    dtype of ``x`` and is ``x`` itself without a ``residual``; y is computed in float32 and rounded
    once, and so are the gradients. Gradients go to ``x``, ``residual`` and ``weight``; the weight's
    is summed over rows in a fixed order. Raises ValueError naming the argument that does not fit.
    (1910.07467)
    """
    op = "rmsnorm"
    chosen = _checked(op, impl, {"x": x} if residual is None else {"x": x, "residual": residual})
    _check_weight(op, "weight", weight, x)
    if chosen == "reference":
        return reference.rmsnorm(x, weight, residual, eps, weight_offset)
    y, h, _ = torch.ops.fastrl.rmsnorm(x, weight, residual, eps, weight_offset, chosen)
    return y, x if residual is None else h


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Heads turned by their tokens' positions, and normed before that where asked, with gradients.

    With n = x, or each head's :func:`rmsnorm` (Qwen3's q_norm and k_norm), and j = i + D / 2:
    y_i = n_i cos_i - n_j sin_i;  y_j = n_j cos_i + n_i sin_i.

    ``x`` is ``[T, heads, D]`` with D even, ``cos`` and ``sin`` ``[T, D / 2]`` float32 without a
    gradient, ``norm_weight`` ``[D]``. Dtypes, gradients and errors are those of :func:`rmsnorm`.
    (2104.09864)
    """
    op = "rope"
    chosen = _checked(op, impl, {"x": x})
    if x.dim() != 3 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x must be [T, heads, D] with D even, got {tuple(x.shape)}")
    angles = (len(x), x.shape[-1] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != angles or table.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{op}: {name} must be float32 of shape {angles}, "
                f"got {table.dtype} {tuple(table.shape)}"
            )
        if table.device != x.device:
            raise ValueError(f"{op}: {name} is on {table.device} and x on {x.device}")
    if norm_weight is not None:
        _check_weight(op, "norm_weight", norm_weight, x)
    if chosen == "reference":
        return reference.rope(x, cos, sin, norm_weight, eps, weight_offset)
    return torch.ops.fastrl.rope(
        x, cos.detach(), sin.detach(), norm_weight, eps, weight_offset, chosen
    )


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto") -> Tensor:
    """A gated MLP's activation, act(gate) * up, with gradients.

    ``activation`` is ``"silu"``, g / (1 + e^-g), or ``"gelu_tanh"``, GELU's tanh approximation.
    ``gate`` and ``up`` have one shape; all that the backward keeps is the two. Dtypes and errors
    are those of :func:`rmsnorm`. (2002.05202)
    """
    op = "glu"
    chosen = _checked(op, impl, {"gate": gate, "up": up})
    check_activation(op, activation)
    if chosen == "reference":
        return reference.glu(gate, up, activation)
    return torch.ops.fastrl.glu(gate, up, activation, chosen)


def _checked(op: str, impl: str, tensors: dict[str, Tensor]) -> str:
    """The implementation; tensors have one dtype, shape and device, those of the first."""
    first, x = next(iter(tensors.items()))
    chosen = choose(op, impl, x.device, HAS)
    check_alike(op, tensors, (*FLOATS, torch.float64) if chosen == "reference" else FLOATS)
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {first} must be [..., K] with K > 0, got shape {tuple(x.shape)}")
    return chosen


def _check_weight(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    if weight.shape != x.shape[-1:] or not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"{op}: {name} must be floating point [{x.shape[-1]}] on {x.device}, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
